"""What no head exceeds beside what heads achieve, layer by layer: achieved <= best possible head <= certified.

The certificate bounds every head on a layer. Heads that exist are measured under an attack on the same images; one
that keeps more than the bound shows that its attack is weak, since the bound has its exhibits.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS as ATTACKS
from audit.adversary.label_attack import LabelAttack, margin
from audit.adversary.threat import ThreatModel
from audit.certificate.certificate import Certificate, CertificateSettings, NotApplicable, certify, certify_held_out
from audit.certificate.collision_search import Layer
from audit.certificate.collisions import Meetings
from audit.certificate.equality import Standard, standing
from audit.certificate.near_collisions import CurvePoint, delta_curve
from audit.certificate.transfer import at_layer, strengthened
from audit.representation.layers import Representation
from audit.training.heads import HeadName, HeadTraining, OnLayer, train_adversarial, train_standard
from audit.types import Images, Labels

_BATCH = 128


class Examples(NamedTuple):
    """Images (M, C, H, W) and labels (M,) that heads are trained on; none of them may be certified."""

    images: Images
    labels: Labels


@dataclass(frozen=True, eq=False)
class Case:
    """A network, the images (N, C, H, W) and labels (N,) to certify, and how many classes there are.

    A `headless` network answers nothing of its own; without `examples` no head is trained.
    """

    network: nn.Module
    clean: Images
    labels: Labels
    classes: int
    headless: bool = False
    examples: Examples | None = None


@dataclass(frozen=True)
class CertificationSettings:
    """How to certify, how heads are trained and attacked, and whether held-out hubs limit the population too."""

    certificate: CertificateSettings = field(default_factory=CertificateSettings)
    attack: LabelAttack = field(default_factory=lambda: ATTACKS["audit"])
    heads: HeadTraining = field(default_factory=HeadTraining)
    held_out: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """One row: the bound on every head of a layer under one threat model, and the best head achieved.

    Bounds and accuracies are fractions of the `images`; None where there is none, and `reason` says why no bound can
    be given. `heads` are the adversarial accuracies of heads under `attack`; `carried_from` names where meetings came
    from that this search missed; `delta_curve` is the bound where nearness counts as meeting; `flags` say what is
    doubtful.
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "delta_curve": [point._asdict() for point in self.delta_curve]}


class Outcome(NamedTuple):
    """A row, the threat model it is for, and the certificate behind it where there is one."""

    row: LayerCertificate
    threat: ThreatModel
    certificate: Certificate | None


Watch = Callable[[str, ThreatModel, str, int], None]
"""Hears the layer and the threat model at work, the stage, and how many images have met something so far."""


class _Head(NamedTuple):
    """A head with its layer as one classifier, its adversarial accuracy, and the passes it took to measure."""

    network: nn.Module
    accuracy: float
    passes: int


_Found = dict[tuple[str, ThreatModel], Certificate | NotApplicable]


def certify_layers(
    case: Case,
    layers: Sequence[str],
    threats: Sequence[ThreatModel],
    settings: CertificationSettings | None = None,
    watch: Watch = lambda _layer, _threat, _stage, _converged: None,
) -> list[Outcome]:
    """Return a row and a certificate for every layer, by name, under every threat model, layer by layer.

    Raises what `certify` and `Representation` raise for networks, names and images that do not fit.
    """
    return _Certification(case, settings or CertificationSettings(), watch).outcomes(layers, threats)


class _Certification:
    """Layers of one network under several threat models; what they share is computed once.

    Meetings found once are tried wherever they should hold too, and a plain forward pass says whether they do. So a
    bound rises neither with eps nor from a layer to a later one; that it does not is looked at, not taken for granted.
    """

    def __init__(self, case: Case, settings: CertificationSettings, watch: Watch) -> None:
        case.network.eval().requires_grad_(False)
        self.case, self.settings, self.watch = case, settings, watch
        self._own: dict[ThreatModel, _Head] = {}
        self._layers: dict[str, _LayerHeads] = {}
        self._seconds: dict[tuple[str, ThreatModel], float] = {}

    def outcomes(self, layers: Sequence[str], threats: Sequence[ThreatModel]) -> list[Outcome]:
        places = [(name, threat) for name in dict.fromkeys(layers) for threat in dict.fromkeys(threats)]
        for name, _ in places:
            self._layers.setdefault(name, _LayerHeads(self.case, name, self.settings))
        searched = {place: self._searched(*place) for place in places}
        origins = {place: self._carried(place, searched) for place in places}
        return [self._outcome(*place, *origins[place]) for place in places]

    def _searched(self, name: str, threat: ThreatModel) -> Certificate | NotApplicable:
        started, case = time.monotonic(), self.case
        self.watch(name, threat, "hubs", 0)
        found = certify(
            self._layers[name].layer, case.clean, case.labels, threat, self.settings.certificate,
            lambda stage, converged: self.watch(name, threat, stage, converged),
        )  # fmt: skip
        self._seconds[name, threat] = time.monotonic() - started
        return found

    def _carried(self, place: tuple[str, ThreatModel], searched: _Found) -> tuple[Certificate | NotApplicable, str]:
        """Return the certificate of a place with what other places found and it missed, and the names of those."""
        best, origins = searched[place], list[str]()
        for other, found in searched.items():
            if other == place or isinstance(found, NotApplicable) or isinstance(best, NotApplicable):
                continue
            if other[1].eps > place[1].eps or found.bound.kept >= best.bound.kept:
                continue
            stood = self._standing(found.meetings, other[0], place, best)
            better = strengthened(best, stood, self.case.labels, self.settings.certificate)
            if better is not best:
                best, origins = better, [*origins, f"{other[0]} at {other[1].eps:.4g}"]
        return best, ", ".join(origins)

    def _standing(self, meetings: Meetings, origin: str, place: tuple[str, ThreatModel], like: Certificate) -> Meetings:
        layer = self._layers[place[0]].layer
        if origin != place[0]:
            meetings = at_layer(layer.precise, meetings)
        return meetings.kept(standing(layer, self.case.clean, meetings, place[1], Standard(like.tier, like.noise)))

    def _outcome(
        self, name: str, threat: ThreatModel, found: Certificate | NotApplicable, carried_from: str
    ) -> Outcome:
        started = time.monotonic()
        heads, flags = self._heads(name, threat), list[str]()
        best = max(heads, key=lambda head: heads[head].accuracy, default=None)
        if isinstance(found, Certificate):
            flags = _contradictions(found, heads, self.case, self.settings.attack.name)
        bounds = self._bounds(name, threat, found)
        settings = self.settings
        row = LayerCertificate(
            layer=name, norm=threat.norm, eps=threat.eps, images=len(self.case.clean),
            dimension=self._layers[name].dimension, certified_tier=settings.certificate.tier,
            confidence=settings.certificate.confidence, carried_from=carried_from, flags=tuple(flags),
            best_head=best, best_head_accuracy=heads[best].accuracy if best else None,
            heads={head: value.accuracy for head, value in heads.items()}, attack=settings.attack.name if heads else "",
            attack_passes=sum(head.passes for head in heads.values()), **bounds,
            seconds=self._seconds[name, threat] + time.monotonic() - started,
        )  # fmt: skip
        return Outcome(row, threat, found if isinstance(found, Certificate) else None)

    def _bounds(self, name: str, threat: ThreatModel, found: Certificate | NotApplicable) -> dict[str, Any]:
        if isinstance(found, NotApplicable):
            return {"reason": f"not applicable: {found.reason}"}
        case, settings = self.case, self.settings.certificate
        held_out = None
        if self.settings.held_out:
            self.watch(name, threat, "held-out hubs", 0)
            half = certify_held_out(self._layers[name].layer, case.clean, case.labels, threat, settings)
            held_out = None if isinstance(half, NotApplicable) else half.population
        return {
            "certified_bound": found.bound.certified,
            "certified_bound_randomised": found.bound.randomised / found.bound.images,
            "certified_bound_population": found.population,
            "certified_bound_held_out": held_out,
            "at_hubs": found.at_hubs,
            "pairs": found.pairs,
            "delta_curve": delta_curve(found, case.labels, settings.seconds / 6),
            "passes": round(found.passes),
        }

    def _heads(self, name: str, threat: ThreatModel) -> dict[str, _Head]:
        """Return the heads on a layer: the network's own where its answer goes through the layer alone, and trained."""
        self.watch(name, threat, "heads", len(self.case.clean))
        layer, heads = self._layers[name], dict[str, _Head]()
        if not self.case.headless and layer.representation.carries_answer(self.case.clean[:1]):
            if threat not in self._own:
                self._own[threat] = self._measured(self.case.network, threat)
            heads["own"] = self._own[threat]
        trained = layer.trained(threat).items()
        return heads | {head: self._measured(network, threat) for head, network in trained}

    def _measured(self, network: nn.Module, threat: ThreatModel) -> _Head:
        seed = self.settings.certificate.seed
        found = measure_accuracy(network, self.case.clean, self.case.labels, threat, self.settings.attack, seed)
        return _Head(network, found.adversarial.value, found.passes)


class _LayerHeads:
    """One layer, and the heads that were trained on it; those trained on images as they are serve every eps."""

    def __init__(self, case: Case, name: str, settings: CertificationSettings) -> None:
        self.case, self.settings = case, settings.heads
        self.representation = Representation(case.network, name)
        self.layer = Layer.of(self.representation)
        with torch.no_grad():
            self.dimension = self.representation(case.clean[:1]).shape[1]

    @cached_property
    def standard(self) -> dict[HeadName, OnLayer]:
        case, examples = self.case, self.case.examples
        assert examples is not None
        return train_standard(self.representation, *examples, case.classes, self.settings)

    def trained(self, threat: ThreatModel) -> Mapping[HeadName, OnLayer]:
        if self.case.examples is None:
            return {}
        adversarial = train_adversarial(self.standard["slf"], *self.case.examples, threat, self.settings)
        return self.standard | {"alf": adversarial}


@torch.no_grad()
def _contradictions(certificate: Certificate, heads: Mapping[str, _Head], case: Case, attack: str) -> list[str]:
    """Return what speaks against an attack or, worse, against the certificate itself."""
    bound, flags = certificate.bound, list[str]()
    for name, head in heads.items():
        if head.accuracy > bound.certified:
            flags.append(
                f"weak attack: {name} keeps {head.accuracy:.3f} under {attack}, "
                f"and no head keeps more than {bound.certified:.3f}"
            )
        if (kept := kept_on_exhibits(head.network, certificate.meetings, case)) > bound.kept:
            flags.append(f"contradicted: {name} keeps {kept} images on the exhibits, of {bound.kept} possible")
    return flags


@torch.no_grad()
def kept_on_exhibits(network: nn.Module, meetings: Meetings, case: Case) -> int:
    """Return how many images (N,) a classifier has right, as they are and wherever the meetings moved them."""
    kept = _right(network, case.clean, case.labels)
    if len(meetings.members):
        moved = meetings.moved.to(case.clean.dtype)
        kept[meetings.members[~_right(network, moved, case.labels[meetings.members])]] = False
    return int(kept.sum())


def _right(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    return margin(torch.cat([network(batch) for batch in images.split(_BATCH)]), labels) > 0
