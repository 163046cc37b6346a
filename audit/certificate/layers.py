"""Certificates of the layers of a network, with measured heads: best measured head <= best head <= certified bound.

A certificate bounds every head on a layer. The network's own head and trained heads are attacked on the same images;
one above the bound shows that the attack is weak, since the collision witnesses prove the bound.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS as ATTACKS
from audit.adversary.label_attack import LabelAttack
from audit.adversary.threat import ThreatModel
from audit.certificate.certificate import certify, certify_held_out
from audit.certificate.contradictions import MeasuredHead, contradictions
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EqualityCriterion
from audit.certificate.near_collisions import delta_curve
from audit.certificate.results import Certificate, LayerCertificate, NotApplicable
from audit.certificate.robust_images.results import BoundEffort, Ledger
from audit.certificate.settings import CertificateSettings
from audit.certificate.transfer import strengthen, transfer_to_layer
from audit.certificate.validity import valid_rows
from audit.errors import UnknownNameError
from audit.representation.layers import Representation
from audit.training.heads import HeadName, HeadTraining, LayerClassifier, train_adversarial_head, train_standard_heads
from audit.types import Images, Labels

HEADS = ("own", "slf", "mlp", "alf")
"""Heads that are measured beside a certificate: the network's own; linear, multilayer and adversarially trained."""


class HeadTrainingData(NamedTuple):
    """Images (M, C, H, W) and labels (M,) that heads are trained on, disjoint from the certified images."""

    images: Images
    labels: Labels


@dataclass(frozen=True, eq=False)
class CertificationInputs:
    """A network, the images (N, C, H, W) and labels (N,) to certify, and the number of classes.

    A `headless` network has no classifier of its own; without `training_data` no head is trained.
    """

    network: nn.Module
    clean: Images
    labels: Labels
    classes: int
    headless: bool = False
    training_data: HeadTrainingData | None = None


@dataclass(frozen=True)
class CertificationSettings:
    """Settings of certificates, of the attack on heads and of their training.

    `measured` names the heads that are measured: the network's own, and those that are trained. `held_out` adds the
    held-out bound, `ledger` the ledger of images that the network provably keeps, by bounds of the effort `bounds`.
    Raises UnknownNameError for an unknown head.
    """

    certificate: CertificateSettings = field(default_factory=CertificateSettings)
    attack: LabelAttack = field(default_factory=lambda: ATTACKS["audit"])
    heads: HeadTraining = field(default_factory=HeadTraining)
    held_out: bool = False
    measured: tuple[str, ...] = HEADS
    ledger: bool = False
    bounds: BoundEffort = field(default_factory=BoundEffort)

    def __post_init__(self) -> None:
        for name in self.measured:
            if name not in HEADS:
                raise UnknownNameError("head", name, HEADS)


class LayerResult(NamedTuple):
    """The row of a layer, its threat model, and the certificate and the ledger of images if there are any."""

    row: LayerCertificate
    threat: ThreatModel
    certificate: Certificate | None
    ledger: Ledger | None


LayerProgress = Callable[[str, ThreatModel, str, int], None]
"""Called with the layer, the threat model, the stage, and the number of images that have collided so far."""


_Place = tuple[str, ThreatModel]  # a layer by name and a threat model


def certify_layers(
    inputs: CertificationInputs,
    layers: Sequence[str],
    threats: Sequence[ThreatModel],
    settings: CertificationSettings | None = None,
    on_progress: LayerProgress = lambda _layer, _threat, _stage, _collided: None,
) -> list[LayerResult]:
    """Certify every layer, by name, under every threat model, and measure heads on it; return one result for each.

    Results are in the order of the layers, and for each layer in the order of the threat models. Raises what
    `certify` and `Representation` raise for networks, names and images that do not fit.
    """
    return _Certification(inputs, settings or CertificationSettings(), on_progress).results(layers, threats)


class _Certification:
    """Certification of layers of one network under several threat models, with shared heads and collisions.

    Collisions found for one layer and threat model are tried at the others and count where they are valid, so that
    the bound increases neither with eps nor from a layer to a later one.
    """

    def __init__(
        self, inputs: CertificationInputs, settings: CertificationSettings, on_progress: LayerProgress
    ) -> None:
        inputs.network.eval().requires_grad_(False)
        self.inputs, self.settings, self.on_progress = inputs, settings, on_progress
        self._network = _NetworkResults(inputs, settings)
        self._layers: dict[str, _LayerHeads] = {}
        self._seconds: dict[_Place, float] = {}

    def results(self, layers: Sequence[str], threats: Sequence[ThreatModel]) -> list[LayerResult]:
        places = [(name, threat) for name in dict.fromkeys(layers) for threat in dict.fromkeys(threats)]
        for name, _ in places:
            self._layers.setdefault(name, _LayerHeads(self.inputs, name, self.settings))
        found = {place: self._certify(*place) for place in places}
        strengthened = {place: self._strengthen(place, found) for place in places}
        return [self._result(*place, *strengthened[place]) for place in places]

    def _certify(self, name: str, threat: ThreatModel) -> Certificate | NotApplicable:
        started, inputs = time.monotonic(), self.inputs
        self.on_progress(name, threat, "hubs", 0)
        found = certify(
            self._layers[name].layer,
            inputs.clean,
            inputs.labels,
            threat,
            self.settings.certificate,
            lambda stage, collided: self.on_progress(name, threat, stage, collided),
        )
        self._seconds[name, threat] = time.monotonic() - started
        return found

    def _strengthen(
        self, place: _Place, found: Mapping[_Place, Certificate | NotApplicable]
    ) -> tuple[Certificate | NotApplicable, str]:
        """Return the certificate of a place with the collisions of other places, and the names of those that helped."""
        best, origins = found[place], list[str]()
        for other, candidate in found.items():
            if other == place or isinstance(candidate, NotApplicable) or isinstance(best, NotApplicable):
                continue
            if other[1].norm != place[1].norm or other[1].eps > place[1].eps or candidate.bound.kept >= best.bound.kept:
                continue
            collisions, layer = candidate.collisions, self._layers[place[0]].layer
            if other[0] != place[0]:
                collisions = transfer_to_layer(layer.precise, collisions)
            criterion = EqualityCriterion(best.tier, best.noise)
            valid = collisions.select(valid_rows(layer, self.inputs.clean, collisions, place[1], criterion))
            better = strengthen(best, valid, self.inputs.labels, self.settings.certificate)
            if better is not best:
                best, origins = better, [*origins, f"{other[0]} at {other[1].eps:.4g}"]
        return best, ", ".join(origins)

    def _result(
        self, name: str, threat: ThreatModel, found: Certificate | NotApplicable, carried_from: str
    ) -> LayerResult:
        started, settings = time.monotonic(), self.settings
        heads, flags = self._heads(name, threat), list[str]()
        best = max(heads, key=lambda head: heads[head].accuracy, default=None)
        if isinstance(found, Certificate):
            flags = contradictions(found, heads, (self.inputs.clean, self.inputs.labels), settings.attack.name)
        ledger = self._network.ledger(threat, lambda: self.on_progress(name, threat, "ledger", 0))
        bounds = self._bounds(name, threat, found)
        if ledger is not None:
            bounds |= ledger.columns(settings.certificate.confidence)
        row = LayerCertificate(
            layer=name,
            norm=threat.norm,
            eps=threat.eps,
            images=len(self.inputs.clean),
            dimension=self._layers[name].dimension,
            certified_tier=settings.certificate.tier,
            confidence=settings.certificate.confidence,
            carried_from=carried_from,
            flags=tuple(flags),
            best_head=best,
            best_head_accuracy=heads[best].accuracy if best else None,
            heads={head: value.accuracy for head, value in heads.items()},
            attack=settings.attack.name if heads else "",
            attack_passes=sum(head.passes for head in heads.values()),
            seconds=self._seconds[name, threat] + time.monotonic() - started,
            **bounds,
        )
        return LayerResult(row, threat, found if isinstance(found, Certificate) else None, ledger)

    def _bounds(self, name: str, threat: ThreatModel, found: Certificate | NotApplicable) -> dict[str, Any]:
        """Return the columns of a row that come from the certificate."""
        if isinstance(found, NotApplicable):
            return {"reason": f"not applicable: {found.reason}"}
        inputs, settings = self.inputs, self.settings.certificate
        held_out = None
        if self.settings.held_out:
            self.on_progress(name, threat, "held-out hubs", 0)
            half = certify_held_out(self._layers[name].layer, inputs.clean, inputs.labels, threat, settings)
            held_out = None if isinstance(half, NotApplicable) else half.population
        return {
            "certified_bound": found.bound.certified,
            "certified_bound_randomised": found.bound.randomised / found.bound.images,
            "certified_bound_population": found.population,
            "certified_bound_held_out": held_out,
            "at_hubs": found.at_hubs,
            "pairs": found.pairs,
            "delta_curve": delta_curve(found, inputs.labels, settings.seconds / 6),
            "passes": round(found.passes),
        }

    def _heads(self, name: str, threat: ThreatModel) -> dict[str, MeasuredHead]:
        """Measure the trained heads of a layer, and the network's own if its logits depend on the layer alone."""
        self.on_progress(name, threat, "heads", len(self.inputs.clean))
        layer, heads, asked = self._layers[name], dict[str, MeasuredHead](), self.settings.measured
        decides = not self.inputs.headless and layer.representation.determines_logits(self.inputs.clean[:1])
        if "own" in asked and decides:
            heads["own"] = self._network.head(threat)
        trained = layer.trained(threat, asked).items()
        return heads | {head: _measure(network, self.inputs, threat, self.settings) for head, network in trained}


class _NetworkResults:
    """What all layers of a network share under a threat model: its own head's accuracy, and the ledger of images."""

    def __init__(self, inputs: CertificationInputs, settings: CertificationSettings) -> None:
        self.inputs, self.settings = inputs, settings
        self._heads: dict[ThreatModel, MeasuredHead] = {}
        self._ledgers: dict[ThreatModel, Ledger] = {}

    def head(self, threat: ThreatModel) -> MeasuredHead:
        if threat not in self._heads:
            self._heads[threat] = _measure(self.inputs.network, self.inputs, threat, self.settings)
        return self._heads[threat]

    def ledger(self, threat: ThreatModel, on_start: Callable[[], None]) -> Ledger | None:
        """Return the ledger of images; None without a classifier, or if none is asked for."""
        from audit.certificate.robust_images.ledger import LedgerInputs, keep_ledger

        inputs = self.inputs
        if inputs.headless or not self.settings.ledger:
            return None
        if threat not in self._ledgers:
            candidates = self.head(threat).images
            on_start()
            precise = copy.deepcopy(inputs.network).double()
            given = LedgerInputs(inputs.network, precise, inputs.clean, inputs.labels)
            self._ledgers[threat] = keep_ledger(given, threat, candidates, self.settings.bounds)
        return self._ledgers[threat]


class _LayerHeads:
    """One layer and the heads trained on it; heads trained on clean images are shared by all threat models."""

    def __init__(self, inputs: CertificationInputs, name: str, settings: CertificationSettings) -> None:
        self.inputs, self.settings = inputs, settings.heads
        self.representation = Representation(inputs.network, name)
        self.layer = DualPrecisionLayer.of(self.representation)
        with torch.no_grad():
            self.dimension = self.representation(inputs.clean[:1]).shape[1]

    @cached_property
    def standard(self) -> dict[HeadName, LayerClassifier]:
        inputs, data = self.inputs, self.inputs.training_data
        assert data is not None
        return train_standard_heads(self.representation, *data, inputs.classes, self.settings)

    def trained(self, threat: ThreatModel, asked: Sequence[str]) -> Mapping[HeadName, LayerClassifier]:
        """Return the trained heads of those asked for; none of another kind is trained."""
        data = self.inputs.training_data
        if data is None or not {"slf", "mlp", "alf"} & set(asked):
            return {}
        found: dict[HeadName, LayerClassifier] = {head: self.standard[head] for head in self.standard if head in asked}
        if "alf" in asked:
            found["alf"] = train_adversarial_head(self.standard["slf"], *data, threat, self.settings)
        return found


def _measure(
    network: nn.Module, inputs: CertificationInputs, threat: ThreatModel, settings: CertificationSettings
) -> MeasuredHead:
    """Attack a classifier on the certified images."""
    seed = settings.certificate.seed
    found = measure_accuracy(network, inputs.clean, inputs.labels, threat, settings.attack, seed)
    return MeasuredHead(network, found.adversarial.value, found.passes, found.outcome.images)
