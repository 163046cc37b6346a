"""Assemble the record of a finished audit from its parts."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from math import hypot, inf, isfinite, log, sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch

from audit.adversary.attack_checks import Check
from audit.adversary.robustness import Robustness
from audit.adversary.staged.outcome import Accuracy
from audit.adversary.threat import ThreatModel
from audit.certificate.results import LayerCertificate
from audit.config.settings import AuditSettings
from audit.information.consistency import (
    SeedMean,
    bound_flags,
    certificate_flags,
    distrust_flags,
    estimate_flags,
    search_distrust_flags,
)
from audit.information.estimator import History, Vulnerability
from audit.proportion import wilson
from audit.records import AuditRecord
from audit.run.encoders.heads import EncoderAccuracy
from audit.run.layer_audit import LayerResult
from audit.run.sanity_checks import sanity_flags
from audit.storage import digest
from audit.theory import adversarial_accuracy_bound, adversarial_risk_bound, fano_accuracy_bound

_PACKAGES = ("rvaudit", "torch", "torchvision", "timm", "robustbench", "numpy")


@dataclass(frozen=True, kw_only=True)
class AuditedNetwork:
    """Name, origin and training of the audited network and the name of its data set, as records store them.

    `code_trusted` means that user code built the network; `details` are further facts of any kind, as JSON data.
    """

    model: str
    source: str
    family: str
    dataset: str
    weights_sha256: str
    training: str = "unknown"
    trained_eps: float = 0.0
    weights_pinned: bool = False
    code_trusted: bool = False
    flags: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AuditParts:
    """Everything that a record is made of."""

    network: AuditedNetwork
    layer: str
    threat: ThreatModel
    settings: AuditSettings
    robustness: Robustness | None
    result: LayerResult
    sanity_checks: tuple[Check, ...]
    certificate: LayerCertificate | None = None
    heads: EncoderAccuracy | None = None
    identity: Mapping[str, Any]
    device: torch.device
    seconds: float


class Summary(NamedTuple):
    """Estimates over seeds with the accuracy bounds they imply, the flags they earn, and the passes they took."""

    normal: SeedMean
    worst: SeedMean
    rv: SeedMean
    bounds: Mapping[str, Any]
    flags: tuple[str, ...]
    passes: int


def summarise(robustness: Robustness | None, result: LayerResult, settings: AuditSettings) -> Summary:
    """Return the summary of one layer's estimates beside the accuracies of its network or of heads."""
    accuracy, runs, floors = robustness and robustness.accuracy, result.per_seed, result.floors
    normal = over_seeds([run.normal.nats for run in runs], [run.normal.stderr for run in runs])
    worst = over_seeds([run.worst.nats for run in runs], [run.worst.stderr for run in runs])
    ceiling = runs[0].normal.ceiling
    # only a ceiling of ln(images) is one that more images would raise; at ln K an estimate is not saturated
    flags = estimate_flags(normal, worst, floors, ceiling if ceiling == log(runs[0].normal.images) else inf)
    upper = fmean(run.worst.nats if run.worst.upper is None else run.worst.upper for run in runs)
    stated = settings.estimator.bounds_heads and all(run.worst.bounds_heads for run in runs)
    bounds = _bounds(worst.nats, upper, accuracy) if accuracy and stated else {}
    if bounds and accuracy and result.determines_logits:
        flags += bound_flags(bounds["fano_accuracy_bound"], accuracy.adversarial.low)
    flags += distrust_flags(robustness.checks if robustness else ()) + search_distrust_flags(result.checks)
    flags += sorted({flag for run in runs for flag in (*run.normal.flags, *run.worst.flags)})
    rv = over_seeds([run.nats for run in runs], [run.stderr for run in runs])
    passes = round((accuracy.passes if accuracy else 0) + sum(run.passes for run in runs))
    return Summary(normal, worst, rv, bounds, tuple(flags), passes)


def assemble(parts: AuditParts) -> AuditRecord:
    """Return the record of an audit."""
    network, threat, settings = parts.network, parts.threat, parts.settings
    floors, estimator = parts.result.floors, settings.estimator
    summary, first = summarise(parts.robustness, parts.result, settings), parts.result.per_seed[0].normal
    certificate, passes = _certificate_fields(parts.certificate)
    return AuditRecord(
        cell_id=digest(parts.identity),
        model=network.model,
        source=network.source,
        family=network.family,
        training=network.training,
        trained_eps=network.trained_eps,
        dataset=network.dataset,
        layer=parts.layer,
        dimension=parts.result.dimension,
        norm=threat.norm,
        eps=threat.eps,
        weights_sha256=network.weights_sha256,
        weights_pinned=network.weights_pinned,
        code_trusted=network.code_trusted,
        estimator=estimator.name,
        quantity=estimator.quantity,
        ranks=estimator.ranks,
        attack=settings.attack.name_in(threat.norm),
        seeds=len(settings.seeds),
        images=(parts.robustness.accuracy.natural if parts.robustness else parts.result).images,
        critic_images=first.images,
        normal_nats=summary.normal.nats,
        normal_nats_se=summary.normal.stderr,
        worst_nats=summary.worst.nats,
        worst_nats_se=summary.worst.stderr,
        rv=summary.rv.nats,
        rv_se=summary.rv.stderr,
        ceiling_nats=first.ceiling,
        floor_nats=floors.normal if floors else None,
        **summary.bounds,
        **_accuracy_fields(parts.robustness, parts.heads),
        **_probe_fields(parts.result),
        **certificate,
        flags=_flags(parts, summary),
        checks=_checks(parts),
        passes=summary.passes + passes + (parts.heads.passes if parts.heads else 0),
        seconds=parts.seconds,
        details=_details(parts),
    )


def over_seeds(values: list[float], stderrs: list[float]) -> SeedMean:
    """Return mean and standard error of one value a seed.

    The variance is that of the mean over seeds plus that of the sample. Seeds share images, so that more of them do not
    lower the latter.
    """
    by_seeds = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return SeedMean(fmean(values), hypot(by_seeds, fmean(stderrs)))


def _bounds(worst_nats: float, upper: float, accuracy: Accuracy) -> dict[str, Any]:
    """Return Theorem 3.4 as printed, and exact Fano, which holds for any class shares.

    Exact Fano is taken at the `upper` end of the interval of the worst case, where an estimator states one.
    """
    return {
        "adversarial_accuracy_bound": adversarial_accuracy_bound(worst_nats, accuracy.num_classes),
        "adversarial_risk_bound": adversarial_risk_bound(worst_nats, accuracy.num_classes),
        "fano_accuracy_bound": fano_accuracy_bound(max(0.0, upper), accuracy.largest_share),
    }


def _accuracy_fields(robustness: Robustness | None, heads: EncoderAccuracy | None) -> dict[str, Any]:
    """Return the record's fields of accuracies, and of the heads that have them; none if no head can be measured."""
    if robustness is None:
        return {}
    natural, adversarial = robustness.accuracy.natural, robustness.accuracy.adversarial
    return {
        **({"natural_head": heads.natural_head, "adversarial_head": heads.adversarial_head} if heads else {}),
        "num_classes": robustness.accuracy.num_classes,
        "natural_accuracy": natural.value,
        "natural_accuracy_low": natural.low,
        "natural_accuracy_high": natural.high,
        "adversarial_accuracy": adversarial.value,
        "adversarial_accuracy_low": adversarial.low,
        "adversarial_accuracy_high": adversarial.high,
        "adversarial_gap": natural.value - adversarial.value,
    }


def _probe_fields(result: LayerResult) -> dict[str, Any]:
    """Return the largest accuracy of fitted classifiers on the worst-case images over seeds, if any were fitted."""
    found = [run.worst.accuracy for run in result.per_seed if run.worst.accuracy is not None]
    if not found:
        return {}
    best = max(found, key=lambda accuracy: accuracy.value)
    names = ("worst_probe_accuracy", "worst_probe_accuracy_low", "worst_probe_accuracy_high")
    return dict(zip(names, best[:3], strict=True))


def _certificate_fields(found: LayerCertificate | None) -> tuple[dict[str, Any], int]:
    """Return the record's fields of a certificate, and the passes it took."""
    if found is None:
        return {}, 0
    low, high = found.kept_population or (None, None)
    fields = {
        "certified_bound": found.certified_bound,
        "certified_bound_population": found.certified_bound_population,
        "certified_tier": found.certified_tier if found.certified_bound is not None else "",
        "best_head": found.best_head or "",
        "best_head_accuracy": found.best_head_accuracy,
        "proved_share": found.proved,
        "not_broken_share": found.not_broken,
        "kept_population_low": low,
        "kept_population_high": high,
    }
    return fields, found.passes + found.attack_passes + found.ledger_passes


def _flags(parts: AuditParts, summary: Summary) -> tuple[str, ...]:
    certificate = parts.certificate.flags if parts.certificate else ()
    heads = [*_head_flags(parts.certificate, summary.bounds), *_tighter_flags(parts.certificate, summary.bounds)]
    return (*sanity_flags(parts.sanity_checks), *summary.flags, *heads, *certificate, *parts.network.flags)


def _head_flags(certificate: LayerCertificate | None, bounds: Mapping[str, Any]) -> list[str]:
    """Return the flag of a bound that a head trained on the layer exceeds."""
    # the network's own head is compared by `summarise`
    heads = {head: share for head, share in certificate.heads.items() if head != "own"} if certificate else {}
    if certificate is None or not bounds or not heads:
        return []
    name = max(heads, key=heads.__getitem__)
    measured = wilson(round(heads[name] * certificate.images), certificate.images)
    return bound_flags(bounds["fano_accuracy_bound"], measured.low, f"the {name} head's adversarial accuracy")


def _tighter_flags(certificate: LayerCertificate | None, bounds: Mapping[str, Any]) -> list[str]:
    """Return the flag of an estimated bound that a certified one on the same images undercuts."""
    certified = certificate.certified_bound if certificate else None
    return [] if certified is None or not bounds else certificate_flags(bounds["fano_accuracy_bound"], certified)


def _checks(parts: AuditParts) -> tuple[dict[str, Any], ...]:
    attack = parts.robustness.checks if parts.robustness else ()
    checks = (*parts.sanity_checks, *attack, *parts.result.checks)
    return tuple(check._asdict() for check in checks)


def _details(parts: AuditParts) -> dict[str, Any]:
    seeds, runs, floors = parts.settings.seeds, parts.result.per_seed, parts.result.floors
    return {
        "per_seed": [_seed_row(seed, run) for seed, run in zip(seeds, runs, strict=True)],
        "curves": [_curves(seed, run) for seed, run in zip(seeds, runs, strict=True)],
        "worst_floor_nats": floors.worst if floors else None,
        "determines_logits": parts.result.determines_logits,
        **({"certificate": parts.certificate.to_dict()} if parts.certificate else {}),
        **({"heads": parts.heads.details()} if parts.heads else {}),
        **parts.network.details,
        "identity": dict(parts.identity),
        "provenance": provenance(parts.device),
        "data_sha256": parts.identity["data_sha256"],
    }


def provenance(device: torch.device) -> dict[str, str]:
    """Return the versions and the hardware that a record was made with."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {name: version(name) for name in _PACKAGES if find_spec(name)}  # robustbench is optional
    return {"python": platform.python_version(), "device": hardware, **versions}


def _seed_row(seed: int, run: Vulnerability) -> dict[str, Any]:
    served = run.origin.label if run.origin else ""
    row = {"seed": seed, "rv": run.nats, "served": served, "held_out_images": run.normal.images}
    for case, each in (("normal", run.normal), ("worst", run.worst)):
        row |= {f"{case}_nats": each.nats, f"{case}_nats_se": each.stderr, f"{case}_parts": dict(each.parts)}
        row |= {f"{case}_by_images": _curve(each.by_images)} if each.by_images else {}
    return row


def _curves(seed: int, run: Vulnerability) -> dict[str, Any]:
    cases = (("normal", run.normal), ("worst", run.worst))
    curves = {case: {"validation": each.history, "training": each.training_history} for case, each in cases}
    return {"seed": seed} | {case: {name: _curve(each) for name, each in row.items()} for case, row in curves.items()}


def _curve(history: History) -> list[list[float | None]]:
    """Return a curve as JSON data, with None for values that are not finite, which strict JSON cannot hold."""
    return [[step, value if isfinite(value) else None] for step, value in history]
