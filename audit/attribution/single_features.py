"""Single features of a layer: what each tells of the image, and how much of it an adversary takes away.

A feature is one coordinate of a layer; of a convolution it is one channel at one unit, which sees its own receptive
field only. Each feature is searched alone, with images of its own, so **these numbers are a picture of a layer and
never a bound on it**: the vulnerability of a layer is not the sum of its features', and neither limits the other.

A continuous feature takes every value between its least and its largest in the ball, because the ball is connected.
So a network is searched for these two ends alone; where between them the values tell least is a problem on the line.

Source: Zhu, Zhang & Evans 2020, section 5.3 and Figure 3 (feature vulnerability); Appendix C for what does not add up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, log, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.gradients import input_gradient
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import ThreatModel
from audit.attribution.intervals import least_telling
from audit.attribution.receptive_field import Read, field_size, receptive_field, units
from audit.errors import UnknownNameError, UsageError
from audit.information.gaussian_mixture import plug_in_terms
from audit.random_keys import Purpose, keyed_generator
from audit.representation.layers import Representation
from audit.types import Images, Judged

_HELD = 2**23  # pixels of the copies that one chunk of features may hold
_SEARCHED = 60  # parts of a hundred that the search takes of the work, about
Scale = Literal["feature", "layer"]
Watch = Callable[[str, int], None]


@dataclass(frozen=True)
class FeatureSettings:
    """How features are read and searched.

    `noise` is the deviation of the noise through which a feature is read: in deviations of the feature itself, or with
    `scale` layer in the root mean square of all of them. `steps` and `relative_step` (x eps) are those of the search
    for the two ends, which starts at the corner that the shared first gradient points to; `restarts` adds random
    starts. `settle` steps of mean shift end the search on the line. `batch_size` bounds memory and decides nothing.
    """

    noise: float = 0.5
    scale: Scale = "feature"
    steps: int = 10
    relative_step: float = 0.25
    restarts: int = 1
    settle: int = 30
    draws: int = 4
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "settle", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a feature search must be at least 1")
        if not 0 < self.noise < float("inf"):
            raise UsageError(f"noise {self.noise!r} must be above 0 and finite: it is in deviations of the feature")
        if self.scale not in ("feature", "layer"):
            raise UnknownNameError("noise scale", self.scale, ("feature", "layer"))


class Ends(NamedTuple):
    """Values of K features on N images (N, K): clean, the least and the largest found in the ball.

    `silent` (K,) is the share of images at which a feature has no gradient: there the search may miss its ends.
    `passes` counts forward+backward passes of single images, a half for either alone.
    """

    clean: Tensor
    low: Tensor
    high: Tensor
    silent: Tensor
    passes: float


@dataclass(frozen=True)
class FeatureRow:
    """One feature: nats of I(X; g_i(X) + noise) on the images as they are, at worst, and their difference.

    `reach` is how far the adversary moves it: the median of (largest - least) / 2, in deviations of the clean values.
    """

    feature: int
    normal_nats: float
    normal_nats_se: float
    worst_nats: float
    worst_nats_se: float
    rv: float
    rv_se: float
    reach: float
    silent: float


@dataclass(frozen=True)
class FeatureAudit:
    """The features of a layer, the most vulnerable first, and what they were measured with.

    `field` is the height and width of the receptive field of the unit, in pixels; `unit` is empty where a layer has
    no map; `ceiling_nats` is the most that so many images could have said.
    """

    layer: str
    unit: tuple[int, ...]
    field: tuple[int, int]
    images: int
    ceiling_nats: float
    rows: tuple[FeatureRow, ...]
    passes: float


@dataclass(frozen=True)
class FeatureRequest:
    """Which features: those named (all where none is), at which unit of a map (the middle one), by which seed.

    `watch` is told what goes on and how many of a hundred parts of the work are done.
    """

    features: tuple[int, ...] = ()
    unit: tuple[int, ...] | None = None
    seed: int = 0
    watch: Watch = lambda _stage, _done: None

    def chosen(self, count: int) -> Tensor:
        """Return the numbers (K,) of the features; raises UsageError for one that a layer of `count` has not."""
        for feature in self.features:
            if not 0 <= feature < count:
                raise UsageError(f"feature {feature} is not there: the layer has features 0 to {count - 1}")
        return torch.tensor(self.features or range(count), dtype=torch.long)


def audit_features(
    network: nn.Module,
    images: Images,
    layer: str,
    threat: ThreatModel,
    settings: FeatureSettings | None = None,
    request: FeatureRequest | None = None,
) -> FeatureAudit:
    """Return what each feature of a layer tells of images (N, C, H, W), normally and at worst.

    The network is taken in eval mode. Raises UsageError for a layer, unit or feature that is not there.
    """
    settings, request = settings or FeatureSettings(), request or FeatureRequest()
    network.eval()
    read = Representation(network, layer)
    found = units(network, layer, images, request.unit)
    chosen = request.chosen(len(found.columns))
    columns = found.columns[chosen].to(images.device)
    field = receptive_field(read, images, columns)
    ends = reach(read, images, columns, threat, settings, request)
    layer_scale = settings.noise * float(ends.clean.var(0, correction=0).mean().sqrt())
    rows = []
    for number, feature in enumerate(chosen.tolist()):
        request.watch("information of each feature", _SEARCHED + (100 - _SEARCHED) * number // len(chosen))
        scale = layer_scale if settings.scale == "layer" else None
        rows.append(_row(feature, number, ends, settings, (scale, request.seed)))
    ranked = tuple(sorted(rows, key=lambda row: (-row.rv, row.feature)))
    return FeatureAudit(layer, found.unit, field_size(field), len(images), log(len(images)), ranked, ends.passes)


def reach(
    read: Read,
    images: Images,
    columns: Tensor,
    threat: ThreatModel,
    settings: FeatureSettings,
    request: FeatureRequest | None = None,
) -> Ends:
    """Return the least and the largest value found of features `columns` (K,) in each image's ball.

    The first gradient of all features comes from one forward pass and one vector-Jacobian product a feature. From the
    corners it points to, each feature is followed in its own copies of the images, a chunk of features at a time.
    """
    request = request or FeatureRequest()
    chunk = max(1, _HELD // images.numel())
    parts = []
    for done, some in enumerate(columns.split(chunk)):
        request.watch("ends of each feature", _SEARCHED * done * chunk // len(columns))
        parts.append(_ends(read, images, some, threat, (settings, request.seed)))
    clean, low, high, silent = (torch.cat(each, -1) for each in list(zip(*parts, strict=True))[:4])
    return Ends(clean, low, high, silent, sum(part.passes for part in parts))


def _ends(read: Read, images: Images, columns: Tensor, threat: ThreatModel, how: tuple[FeatureSettings, int]) -> Ends:
    settings, seed = how
    clean, gradients = _first_gradients(read, images, columns, settings.batch_size)
    silent = (gradients.flatten(2) == 0).all(2).float().mean(1)
    if threat.eps == 0:
        return Ends(clean, clean, clean, silent, len(images) * (1 + len(columns)) / 2)
    which = torch.arange(len(columns), device=images.device).repeat_interleave(len(images))
    copies, slopes = images.repeat(len(columns), 1, 1, 1), gradients.flatten(0, 1)
    pgd = PGD(settings.steps, settings.relative_step, restarts=settings.restarts, batch_size=settings.batch_size)
    found = []
    for sign in (1.0, -1.0):

        def objective(moved: Images, index: Tensor, sign: float = sign) -> Judged:
            values = sign * read(moved).gather(1, columns[which[index]][:, None])[:, 0]
            return Judged(values, torch.zeros_like(values, dtype=torch.bool))

        corner = threat.step(copies, sign * slopes, copies, threat.eps)
        drawn = keyed_generator(seed, Purpose.FEATURE_SEARCH, int(columns[0]))
        found.append(minimise(objective, copies, threat, pgd, drawn, corner))
    low, high = (x.value.view(len(columns), -1).T for x in found)
    passes = len(images) * (1 + len(columns)) / 2 + sum(x.passes + x.forwards / 2 for x in found)
    # a batched pass rounds: no end may lie inside the clean value
    return Ends(clean, torch.minimum(low, clean), torch.maximum(-high, clean), silent, passes)


def _first_gradients(read: Read, images: Images, columns: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the clean values (N, K) and their gradients (K, N, C, H, W): one forward pass, K products."""
    values, gradients = [], []
    for batch in images.split(batch_size):
        leaf = batch.detach().requires_grad_()
        features = read(leaf)[:, columns]
        gradients.append(torch.stack([input_gradient(each.sum(), leaf, keep=True) for each in features.unbind(1)]))
        values.append(features.detach())
    return torch.cat(values), torch.cat(gradients, 1)


def _row(feature: int, number: int, ends: Ends, settings: FeatureSettings, how: tuple[float | None, int]) -> FeatureRow:
    clean, low, high = (values[:, number].double() for values in (ends.clean, ends.low, ends.high))
    deviation, largest = float(clean.std(correction=0)), float(clean.abs().max())
    layer_scale, seed = how
    # where a feature varies by rounding alone, noise so large that it tells nothing
    own = settings.noise * deviation if deviation > 1e-6 * largest else max(1.0, largest)
    scale = layer_scale or own
    middle = clean.mean()
    clean, low, high = ((values - middle) / scale for values in (clean, low, high))
    worst = least_telling(clean, low, high, settings.settle, settings.draws, seed)
    normal_terms, worst_terms = (
        plug_in_terms(values[:, None], keyed_generator(seed, Purpose.FEATURE_READING), settings.draws)[0]
        for values in (clean, worst)
    )
    (normal, normal_se), (least, least_se) = _mean(normal_terms), _mean(worst_terms)
    half = float((high - low).median()) / 2 * scale
    return FeatureRow(
        feature=feature, normal_nats=normal, normal_nats_se=normal_se, worst_nats=least, worst_nats_se=least_se,
        rv=normal - least, rv_se=hypot(normal_se, least_se), reach=half / deviation if deviation else 0.0,
        silent=float(ends.silent[number]),
    )  # fmt: skip


def _mean(terms: Tensor) -> tuple[float, float]:
    return float(terms.mean()), float(terms.std()) / sqrt(len(terms))
