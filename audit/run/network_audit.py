"""Audit of a network given as a Python object, without a model reference or a run folder."""

import time

from torch import nn

from audit.adversary.passes import frozen_parameters
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import ThreatModel
from audit.config.settings import AuditSettings
from audit.hashing import tensors_sha256, weights_sha256
from audit.records import AuditRecord
from audit.run.assembly import AuditedNetwork, AuditParts, assemble
from audit.run.identity import NetworkIdentity, audit_identity
from audit.run.layer_audit import LayerAudit, SearchStarts
from audit.run.loading import check_network_inputs
from audit.run.sanity_checks import sanity_checks
from audit.types import Images, Labels, standard_torch_state

_SOURCE = "python"
_ROUNDING = 1e-5  # of pixels that were computed from 8 bits: far below half a grey level


@standard_torch_state()
def audit_model(
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
    settings = settings or AuditSettings()
    network.eval()
    target = TargetModel(network, images, labels)
    target = TargetModel(target.network, _without_rounding(target.images), target.labels)
    network, images, labels = target.network, target.images, target.labels
    check_network_inputs(network, images, labels)
    started = time.monotonic()
    with frozen_parameters(network):
        robustness = evaluate_robustness(target, threat, settings.attack, settings.seeds[0])
        starts = SearchStarts(attacked=robustness.accuracy.outcome.images)
        result = LayerAudit(network, images, labels, layer, settings).under(threat, starts)
    checks = sanity_checks(network, images, labels)
    name, weights = type(network).__name__, weights_sha256(network)
    data = tensors_sha256(images, labels)
    return assemble(
        AuditParts(
            network=AuditedNetwork(model=name, source=_SOURCE, family=name, dataset=_SOURCE, weights_sha256=weights),
            layer=layer,
            threat=threat,
            settings=settings,
            robustness=robustness,
            result=result,
            sanity_checks=checks,
            identity=audit_identity(NetworkIdentity(_SOURCE, name, "", weights), data, layer, threat, settings),
            device=images.device,
            seconds=time.monotonic() - started,
        )
    )


def _without_rounding(images: Images) -> Images:
    """Return images clipped to [0, 1] where rounding alone took them outside."""
    if not images.is_floating_point() or not images.numel():
        return images
    low, high = float(images.min()), float(images.max())
    outside = (low < 0 or high > 1) and low >= -_ROUNDING and high <= 1 + _ROUNDING
    return images.clamp(0, 1) if outside else images
