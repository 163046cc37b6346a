"""Results of certification: the certificate of a layer, and the row that tables show of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from audit.certificate.collision_search import GroupDistances
from audit.certificate.collisions import Collisions
from audit.certificate.equality import EqualityTier
from audit.certificate.packing import PackingBound


class NotApplicable(NamedTuple):
    """Why a layer cannot be certified."""

    reason: str


class Certificate(NamedTuple):
    """An upper bound on the adversarial accuracy of every head on a layer, with its collision witnesses.

    `bound` counts the images of the sample, `population` bounds the accuracy on their distribution. `collisions` are
    valid at `tier`; `at_hubs` counts the images at each hub, `pairs` the pairs besides. `noise` is the layer's noise
    floor and `scale` the root mean square norm of its features, in feature units. `passes` counts forward+backward
    passes of single images. `attempts` holds every group that the search tried, collided or not.
    """

    bound: PackingBound
    population: float
    tier: EqualityTier
    noise: float
    collisions: Collisions
    at_hubs: tuple[int, ...]
    pairs: int
    passes: float
    scale: float
    attempts: tuple[GroupDistances, ...]


class HeldOutBound(NamedTuple):
    """A population bound from hubs chosen on one half of the images and reached by the other half.

    `bound` counts the images of the second half, with indices `images`, from collisions at these hubs alone.
    """

    bound: PackingBound
    population: float
    images: Tensor
    collisions: Collisions


class CurvePoint(NamedTuple):
    """Upper bound on the accuracy of any head under eps on the image and `delta` / 2 on the features.

    `delta` is in feature units, `relative` the same as a fraction of the features' root mean square norm.
    """

    delta: float
    relative: float
    bound: float


@dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """One row: certified bound on any head of a layer under one threat model, and the best measured head.

    Bounds and accuracies are fractions of the `images`, `eps` is in pixel units. A bound that does not apply is None,
    and `reason` says why. `heads` maps trained heads to their adversarial accuracy under `attack`; `carried_from`
    names the layers and radii whose collisions tightened this bound; `delta_curve` is the bound with near collisions;
    `flags` are warnings. `proved`, `broken` and `undecided` are the shares of the ledger of images, None without one,
    `kept_population` limits on the network's adversarial accuracy on the distribution of the images;
    `ledger_reason` says why nothing is proved, and `ledger_passes` what the ledger cost.
    """

    layer: str
    norm: str
    eps: float
    images: int
    dimension: int
    certified_tier: str
    confidence: float
    certified_bound: float | None = None
    certified_bound_randomised: float | None = None
    certified_bound_population: float | None = None
    certified_bound_held_out: float | None = None
    best_head: str | None = None
    best_head_accuracy: float | None = None
    heads: Mapping[str, float] = field(default_factory=dict)
    attack: str = ""
    at_hubs: tuple[int, ...] = ()
    pairs: int = 0
    carried_from: str = ""
    delta_curve: tuple[CurvePoint, ...] = ()
    passes: int = 0
    attack_passes: int = 0
    seconds: float = 0.0
    reason: str = ""
    flags: tuple[str, ...] = ()
    proved: float | None = None
    broken: float | None = None
    undecided: float | None = None
    kept_population: tuple[float, ...] | None = None
    ledger_reason: str = ""
    ledger_passes: int = 0

    @property
    def not_broken(self) -> float | None:
        """The share of images without a known adversarial image, a multiple of 1 / `images`; None without a ledger."""
        return None if self.broken is None else (self.images - round(self.broken * self.images)) / self.images

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "delta_curve": [point._asdict() for point in self.delta_curve]}
