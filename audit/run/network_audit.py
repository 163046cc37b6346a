"""Audit of a network given as a Python object, without a model reference or a run folder."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from audit.adversary.attack_checks import Check
from audit.adversary.label_attack import LabelAttack
from audit.adversary.memory.batch_size import fitting_batches
from audit.adversary.memory.stages import Profile, stage
from audit.adversary.passes import frozen_parameters
from audit.adversary.robustness import Robustness, TargetModel, evaluate_robustness
from audit.adversary.threat import ThreatModel
from audit.certificate.layers import CertificationInputs, CertificationSettings, certify_layers
from audit.certificate.results import LayerCertificate
from audit.certificate.settings import CertificateSettings
from audit.config.settings import AuditSettings
from audit.hashing import tensors_sha256, weights_sha256
from audit.records import AuditRecord
from audit.representation.headless import Headless
from audit.representation.layers import Representation
from audit.run.assembly import AuditedNetwork, AuditParts, assemble
from audit.run.encoders.head_images import head_plan, heads_identity
from audit.run.encoders.heads import AuditedImages, EncoderAccuracy, measure_encoder
from audit.run.gates.inputs import check_encoder_inputs, check_network_inputs
from audit.run.identity import NetworkIdentity, audit_identity
from audit.run.intermediate import Memo
from audit.run.layer_audit import LayerAudit, LayerResult, Reuse, SearchStarts
from audit.run.sanity_checks import sanity_checks
from audit.run.upkeep.pass_meter import StagePasses
from audit.types import Images, Labels, pixel_extremes, standard_torch_state

_SOURCE = "python"
_ROUNDING = 1e-5  # of pixels that were computed from 8 bits: far below half a grey level
_Value = TypeVar("_Value")

OnStage = Callable[[str, str, ThreatModel | None, float], None]
"""Called at the start of a stage with its name, the layer ("" for none), the threat model (None for none), and about
how many passes it takes."""


_Arguments = ParamSpec("_Arguments")


def _timed(audit: Callable[_Arguments, AuditRecord]) -> Callable[_Arguments, AuditRecord]:
    """Return the audit with the costs of its stages in the record."""

    @wraps(audit)
    def timed(*args: _Arguments.args, **settings: _Arguments.kwargs) -> AuditRecord:
        profile = Profile()
        with profile.measured("other"):
            record = audit(*args, **settings)
        return replace(record, timing=profile.to_dict())

    return timed


def _unwatched(_stage: str, _layer: str, _threat: ThreatModel | None, _passes: float) -> None:
    return


@dataclass(frozen=True)
class NetworkFacts:
    """What a record states of a network and its data beside numbers; nothing here decides one.

    An empty name or family is that of the network's class. `trained_eps` is in pixel units; `details` is JSON data.
    """

    name: str = ""
    family: str = ""
    training: str = "unknown"
    trained_eps: float = 0.0
    dataset: str = _SOURCE
    details: Mapping[str, Any] = field(default_factory=dict)


@standard_torch_state()
def audit_network(
    network: nn.Module,
    images: Images,
    labels: Labels,
    layer: str,
    threat: ThreatModel,
    settings: AuditSettings | None = None,
) -> AuditRecord:
    """Audit a network at one layer under one threat model.

    Images are (N, C, H, W) in [0, 1], labels (N,), as tensors on the network's device, NumPy arrays or lists. The
    network is put in eval mode, and its parameters are left without gradients. Torch's modes and default type do not
    matter. Raises UsageError or MismatchError for invalid input, InvalidModelError for a network whose outputs are not
    finite. MI values of the record are in nats.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1 (RV) and Theorem 3.4.
    """
    return NetworkAudit(TargetModel(network, images, labels)).record(layer, threat, settings or AuditSettings())


class NetworkAudit:
    """Audits of one network on one set of images; layers, threat models and settings share what they can.

    A record is the same as that of an audit by itself: no search starts from the result of another one. The network is
    put in eval mode. Raises what `check_network_inputs` raises.
    """

    @standard_torch_state()
    def __init__(self, target: TargetModel, facts: NetworkFacts | None = None, on_stage: OnStage = _unwatched) -> None:
        target.network.eval()
        self.target = replace(target, images=_without_rounding(target.images))
        self.facts, self.on_stage = facts or NetworkFacts(), on_stage
        check = check_encoder_inputs if isinstance(target.network, Headless) else check_network_inputs
        check(self.target.network, self.target.images, self.target.labels)
        self._heads: Memo[tuple[str, str, ThreatModel, LabelAttack, int], EncoderAccuracy] = Memo()
        self._robustness: Memo[tuple[ThreatModel, LabelAttack, int], Robustness] = Memo()
        self._layers: Memo[tuple[str, AuditSettings], LayerAudit] = Memo(slots=1)

    @standard_torch_state()
    @_timed
    def record(self, layer: str, threat: ThreatModel, settings: AuditSettings) -> AuditRecord:
        """Return the record of one layer under one threat model; raises what the attack and the estimator raise."""
        started = time.monotonic()
        network = self.target.network
        settings.estimator.check_labels(self.target.labels)
        with frozen_parameters(network), fitting_batches(network, self.target.images):
            heads = self._headed(layer, threat, settings) if isinstance(network, Headless) else None
            robustness = heads.robustness if heads else self._attacked(layer, threat, settings)
            result = self._estimated(layer, threat, settings, robustness)
            certificate = self._certified(layer, threat, settings) if settings.certificate else None
        return assemble(
            AuditParts(
                network=_audited(self.facts, type(network).__name__, self._weights_sha256),
                layer=layer,
                threat=threat,
                settings=settings,
                robustness=robustness,
                heads=heads,
                result=result._replace(determines_logits=robustness is not None) if heads else result,
                sanity_checks=self._sanity,
                certificate=certificate,
                identity=audit_identity(self._identity, self._data_sha256, layer, threat, settings)
                | ({"heads": heads_identity("")} if heads else {}),
                device=self.target.images.device,
                seconds=time.monotonic() - started,
            )
        )

    @standard_torch_state()
    def expected(self, layer: str, settings: AuditSettings, norm: str) -> StagePasses:
        """Return about how many passes the stages of a layer take; raises what `Representation` raises."""
        expected = StagePasses(settings, len(self.target.images), norm=norm)
        if not settings.certificate:
            return expected
        with torch.no_grad():
            features = Representation(self.target.network, layer)(self.target.images[:1])
        return expected._replace(dimension=features.shape[1])

    def _attacked(self, layer: str, threat: ThreatModel, settings: AuditSettings) -> Robustness:
        def attack() -> Robustness:
            self.on_stage("attack", "", threat, self.expected(layer, settings, threat.norm).attack)
            return evaluate_robustness(self.target, threat, settings.attack, settings.seeds[0])

        return self._robustness.get((threat, settings.attack, settings.seeds[0]), attack)

    def _headed(self, layer: str, threat: ThreatModel, settings: AuditSettings) -> EncoderAccuracy:
        """Return the accuracies of heads on a layer of an encoder, cross-fitted on the images."""
        target, attack, seed = self.target, settings.attack, settings.seeds[0]

        def measure() -> EncoderAccuracy:
            self.on_stage("attack", layer, threat, self.expected(layer, settings, threat.norm).attack)
            classes = int(target.labels.max()) + 1
            audited = AuditedImages(target.images, target.labels, classes, head_plan(target, None, seed))
            return measure_encoder(
                Representation(target.network, layer, settings.reduce), audited, threat, attack, seed
            )

        return self._heads.get((layer, settings.reduce, threat, attack, seed), measure)

    def _estimated(
        self, layer: str, threat: ThreatModel, settings: AuditSettings, robustness: Robustness | None
    ) -> LayerResult:
        target, expected = self.target, self.expected(layer, settings, threat.norm)

        def normal(seed: int, compute: Callable[[], _Value], /) -> _Value:
            self.on_stage(f"normal case, seed {seed}", layer, None, expected.normal)
            return compute()

        def worst(seed: int, compute: Callable[[], _Value], /) -> _Value:
            self.on_stage(f"worst case, seed {seed}", layer, threat, expected.worst(seed))
            return compute()

        def create() -> LayerAudit:
            reuse = Reuse(normal=normal)
            return LayerAudit(target.network, target.images, target.labels, layer, settings, reuse)

        audit = self._layers.get((layer, settings), create)
        starts = SearchStarts(attacked=robustness.accuracy.outcome.images if robustness else None)
        return audit.under(threat, starts, worst)

    def _certified(self, layer: str, threat: ThreatModel, settings: AuditSettings) -> LayerCertificate:
        self.on_stage("certificate", layer, threat, self.expected(layer, settings, threat.norm).certificate)
        return _certificate(self.target, layer, threat, settings)

    @cached_property
    def _sanity(self) -> tuple[Check, ...]:
        return sanity_checks(self.target.network, self.target.images, self.target.labels)

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.target.network)

    @cached_property
    def _data_sha256(self) -> str:
        return tensors_sha256(self.target.images, self.target.labels)

    @property
    def _identity(self) -> NetworkIdentity:
        return NetworkIdentity(_SOURCE, type(self.target.network).__name__, "", self._weights_sha256)


@stage("certificate")
def _certificate(target: TargetModel, layer: str, threat: ThreatModel, settings: AuditSettings) -> LayerCertificate:
    """Return the certificate of a layer; only the network's own head is measured, as there is no training data."""
    asked = CertificateSettings(seed=settings.seeds[0])
    chosen = CertificationSettings(asked, settings.attack, ledger=settings.ledger)
    classes, headless = int(target.labels.max()) + 1, isinstance(target.network, Headless)
    inputs = CertificationInputs(target.network, target.images, target.labels, classes, headless)
    return certify_layers(inputs, [layer], [threat], chosen)[0].row


def _audited(facts: NetworkFacts, kind: str, sha256: str) -> AuditedNetwork:
    """Return what a record states of a network of a class `kind`, with the hash of its weights."""
    return AuditedNetwork(
        model=facts.name or kind,
        source=_SOURCE,
        family=facts.family or kind,
        dataset=facts.dataset,
        training=facts.training,
        trained_eps=facts.trained_eps,
        weights_sha256=sha256,
        details=facts.details,
    )


def _without_rounding(images: Images) -> Images:
    """Return images clipped to [0, 1] where rounding alone took them outside."""
    if not images.is_floating_point() or not images.numel():
        return images
    low, high = pixel_extremes(images)
    outside = (low < 0 or high > 1) and low >= -_ROUNDING and high <= 1 + _ROUNDING
    return images.clamp(0, 1) if outside else images
