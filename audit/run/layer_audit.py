"""One audit: accuracies, normal- and worst-case information, RV, the limit they imply, and what speaks against it."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from math import inf, isfinite, log, sqrt
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import Accuracy, logits_of
from audit.adversary.attack_checks import Check
from audit.adversary.fused import agree, faster
from audit.adversary.gradient_checks import worst_case_checks
from audit.adversary.robustness import Robustness, Target, attacked
from audit.adversary.threat import ThreatModel
from audit.config.settings import AuditSettings
from audit.errors import MismatchError, UnknownNameError, UsageError
from audit.hashing import tensors_sha256, weights_sha256
from audit.information.estimator import History, Known, MIEstimate, Subject, Vulnerability
from audit.information.floors import (
    Floors,
    Spread,
    bound_flags,
    distrust_flags,
    estimate_flags,
    floor,
    largest_share,
    search_distrust_flags,
)
from audit.random_keys import Purpose, keyed_generator
from audit.records import VERSION, AuditRecord
from audit.representation.layers import Representation
from audit.run.sanity_checks import gated, gates
from audit.storage import digest
from audit.theory import max_accuracy, max_adversarial_accuracy, min_adversarial_risk
from audit.types import Encoded, Images, Labels, Objective

_FEWEST = 50
_CHECKED = 20  # images, and at most a tenth of all, that the worst case's objective is checked on: 1 % of the passes


class Layer(NamedTuple):
    """What the seeds said of one layer, the floors measured beside them, its dimension, and checks of its search."""

    per_seed: tuple[Vulnerability, ...]
    floors: Floors | None
    dimension: int
    checks: tuple[Check, ...] = ()


def audit_model(
    network: nn.Module,
    images: Images,
    labels: Labels,
    layer: str,
    threat: ThreatModel,
    settings: AuditSettings | None = None,
) -> AuditRecord:
    """Audit a bare network at one named layer under one threat model.

    Images are (N, C, H, W) in [0, 1], labels (N,); network and images must be on one device. The network is put in
    eval mode and its parameters are left without gradients. Raises UsageError or MismatchError for unfit input,
    InvalidModelError where the network's outputs cannot be given a number.
    """
    settings = settings or AuditSettings()
    network.eval()
    check_input(network, images, labels)
    started = time.monotonic()
    robustness = attacked(Target(network, images, labels), threat, settings.attack, settings.seeds[0])
    measured = LayerAudit(network, images, labels, layer, settings).under(threat)
    record = assemble(robustness, measured, layer, threat, settings)
    weights = weights_sha256(network)
    identity = {
        "weights_sha256": weights,
        "data_sha256": tensors_sha256(images, labels),
        "layer": layer,
        "norm": threat.norm,
    }
    record = gated(record, gates(network, images, labels))
    version = replace(settings.attack, version=settings.attack.version_in(threat.norm))
    decided = repr(replace(settings, attack=version))
    return _named(record, network, {**identity, "eps": threat.eps, "settings": decided}, started)


def check_input(network: nn.Module, images: Images, labels: Labels, fewest: int = _FEWEST) -> None:
    """Raise where images, labels and network do not belong together, are too few, or pixels are not in [0, 1]."""
    if images.dim() != 4 or not images.is_floating_point() or len(images) == 0:
        raise MismatchError(f"images are {_described(images)}, not floats of the shape (N, C, H, W)")
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise MismatchError(f"labels are {_described(labels)}, not int64 of the shape (N,)")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise UsageError(f"images range from {low:.3g} to {high:.3g}, not within [0, 1]: normalisation belongs inside")
    if len(images) < fewest:
        raise UsageError(f"{len(images)} images are too few: an audit needs {fewest}, or its errors mean nothing")
    if len(images) != len(labels):
        raise MismatchError(f"{len(images)} images, but {len(labels)} labels")
    with torch.no_grad():
        outputs = network(images[:2])
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise MismatchError("the network's output is not one row of logits an image (N, K), for two or more classes")
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or last >= outputs.shape[1]:
        raise MismatchError(f"labels reach from {first} to {last}, but the network has {outputs.shape[1]} outputs")


Keep = Callable[[int, Literal["normal", "worst"], Callable[[], Any]], Any]
"""Returns one seed's estimate of a case: computed now, or what an earlier process kept of it."""


def _computed(_seed: int, _case: str, compute: Callable[[], Any]) -> Any:
    return compute()


class LayerAudit:
    """One layer of one network on one set of images: what its threat models share is computed once.

    Every seed's estimates go through `keep`, so that a run that is killed need not begin again. `clean` is what the
    layer says of the images as they are, where that is known.
    """

    keep: Keep = staticmethod(_computed)

    def __init__(
        self,
        network: nn.Module,
        images: Images,
        labels: Labels,
        layer: str,
        settings: AuditSettings,
        clean: Encoded | None = None,
    ) -> None:
        self.network, self.settings = network, settings
        self.representation = Representation(network, layer, settings.reduce)
        self.subject = Subject(self._encode, images, labels, clean)

    def _encode(self, images: Images) -> Encoded:
        """Searches, which ask for gradients, go through a faster copy of the network; what is read never does."""
        layer = self._faster if images.requires_grad else self.representation
        return layer.encode(images) if self.settings.estimator.reads_answers else layer.encode_features(images)

    @cached_property
    def _faster(self) -> Representation:
        representation, images = self.representation, self.subject.images
        folded = faster(self.network, images)
        if folded is self.network:
            return representation
        try:
            same = Representation(folded, representation.layer, representation.reduce)
        except UnknownNameError:  # it was folded into another
            return representation
        return same if agree(representation, same, images) else representation

    @cached_property
    def normal(self) -> tuple[MIEstimate, ...]:
        """The normal case for every seed: no threat model enters it."""
        normal = self.settings.estimator.normal
        return tuple(self.keep(seed, "normal", partial(normal, self.subject, seed)) for seed in self.settings.seeds)

    @cached_property
    def dimension(self) -> int:
        """How many features the layer has."""
        with torch.no_grad():
            return self.representation(self.subject.images[:1]).shape[1]

    def under(self, threat: ThreatModel, starts: Mapping[int, Images] | None = None) -> Layer:
        """Return the layer's vulnerability for every seed, with the floors that predictions put under it.

        `starts` are each seed's worst-case images of a smaller ball, or of a layer further on.
        """
        settings, per_seed = self.settings, self.searched(threat, starts)
        floors = _floors(self.network, self.subject, per_seed, settings) if self._proves else None
        return Layer(per_seed, floors, self.dimension, self._checks(threat))

    def searched(self, threat: ThreatModel, starts: Mapping[int, Images] | None = None) -> tuple[Vulnerability, ...]:
        """Return every seed's vulnerability; what served the first one is what the others look for."""
        found: list[Vulnerability] = []
        both = self.settings.estimator.vulnerability
        for seed, normal in zip(self.settings.seeds, self.normal, strict=True):
            known = Known(normal, (starts or {}).get(seed), found[0].served if found else "")
            found.append(self.keep(seed, "worst", partial(both, self.subject, threat, seed, known)))
        return tuple(found)

    @cached_property
    def _objective(self) -> Objective | None:
        return self.settings.estimator.objective(self.subject)

    def _checks(self, threat: ThreatModel) -> tuple[Check, ...]:
        if threat.eps == 0 or self._objective is None:
            return ()
        few = self.subject.images[: min(_CHECKED, len(self.subject.images) // 10)]
        return worst_case_checks(self._objective, few, threat, self.settings.seeds[0])

    @property
    def _proves(self) -> bool:
        """Whether the network's answer is read off this layer alone; else it proves nothing about it."""
        if self.settings.estimator.floor_kind == "smoothed":
            return self.representation.layer == "logits"  # noise further down passes through layers we do not run again
        return self.representation.carries_answer(self.subject.images[:1])


def assemble(
    robustness: Robustness, measured: Layer, layer: str, threat: ThreatModel, settings: AuditSettings
) -> AuditRecord:
    """Return the record of one audit; names, hashes and times are the caller's to fill in."""
    accuracy = robustness.accuracy
    runs, floors, estimator = measured.per_seed, measured.floors, settings.estimator
    normal = _spread([run.normal.nats for run in runs], [run.normal.stderr for run in runs])
    worst = _spread([run.worst.nats for run in runs], [run.worst.stderr for run in runs])
    rv = _spread([run.nats for run in runs], [run.stderr for run in runs])
    ceiling, classes = runs[0].normal.ceiling, accuracy.num_classes
    # a ceiling such as ln K, that no further images would raise, is no sign of saturation
    flags = estimate_flags(normal, worst, floors, ceiling if ceiling == log(runs[0].normal.images) else inf)
    limits = _limits(worst.nats, accuracy) if estimator.limits_heads else {}
    if limits:
        flags += bound_flags(limits["fano_accuracy_bound"], accuracy.adversarial.low)
    flags += distrust_flags(robustness.checks) + search_distrust_flags(measured.checks)
    flags += sorted({flag for run in runs for flag in (*run.normal.flags, *run.worst.flags)})
    return AuditRecord(
        cell_id="", model="", source="", family="", training="unknown", trained_eps=0.0, dataset="", weights_sha256="",
        layer=layer, dimension=measured.dimension, norm=threat.norm, eps=threat.eps, num_classes=classes,
        estimator=estimator.name, quantity=estimator.quantity, ranks=estimator.ranks,
        attack=settings.attack.name_in(threat.norm), seeds=len(settings.seeds),
        images=accuracy.natural.images, critic_images=runs[0].normal.images,
        normal_nats=normal.nats, normal_nats_se=normal.stderr, worst_nats=worst.nats, worst_nats_se=worst.stderr,
        rv=rv.nats, rv_se=rv.stderr, ceiling_nats=ceiling, floor_nats=floors.normal if floors else None,
        **limits,
        natural_accuracy=accuracy.natural.value, natural_accuracy_low=accuracy.natural.low,
        natural_accuracy_high=accuracy.natural.high, adversarial_accuracy=accuracy.adversarial.value,
        adversarial_accuracy_low=accuracy.adversarial.low, adversarial_accuracy_high=accuracy.adversarial.high,
        adversarial_gap=accuracy.natural.value - accuracy.adversarial.value, flags=tuple(flags),
        checks=tuple(check._asdict() for check in (*robustness.checks, *measured.checks)),
        passes=round(accuracy.passes + sum(run.passes for run in runs)),
        details={"per_seed": [_seed_row(seed, run) for seed, run in zip(settings.seeds, runs, strict=True)],
                 "curves": [_curves(seed, run) for seed, run in zip(settings.seeds, runs, strict=True)],
                 "worst_floor_nats": floors.worst if floors else None},
    )  # fmt: skip


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of the shape {tuple(tensor.shape)}"


def _limits(worst_nats: float, accuracy: Accuracy) -> dict[str, Any]:
    """Theorem 3.4 as printed, and exact Fano, which holds for any class shares and is never above it."""
    return {
        "adversarial_accuracy_bound": max_adversarial_accuracy(worst_nats, accuracy.num_classes),
        "adversarial_risk_bound": min_adversarial_risk(worst_nats, accuracy.num_classes),
        "fano_accuracy_bound": max_accuracy(max(0.0, worst_nats), accuracy.largest_share),
    }


def _floors(network: nn.Module, subject: Subject, runs: tuple[Vulnerability, ...], settings: AuditSettings) -> Floors:
    kind, size = settings.estimator.floor_kind, settings.attack.batch_size
    logits, share = logits_of(network, subject.images, size), largest_share(subject.labels)
    noise = [run.normal.parts["noise"] if kind == "smoothed" else 0.0 for run in runs]
    moved = []
    for run, deviation in zip(runs, noise, strict=True):
        answers = _noisy(logits_of(network, run.moved, size), deviation).argmax(1)
        moved.append(floor(answers, subject.labels[run.which.to(answers.device)], share, kind))
    slack = (logits.shape[1] - 1) / (2 * runs[0].normal.images) if kind == "answers" else 0.0
    return Floors(floor(_noisy(logits, noise[0]).argmax(1), subject.labels, share, kind), fmean(moved), slack)


def _noisy(logits: Tensor, deviation: float) -> Tensor:
    return logits + deviation * torch.randn(logits.shape, generator=keyed_generator(0, Purpose.FLOOR_NOISE)).to(logits)


def _spread(values: list[float], sampling: list[float]) -> Spread:
    """Standard error over seeds, but never under what sampling alone gives: few seeds can agree by luck."""
    by_sampling = fmean(sampling) / sqrt(len(values))
    by_seeds = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return Spread(fmean(values), max(by_sampling, by_seeds))


def _seed_row(seed: int, run: Vulnerability) -> dict[str, Any]:
    return {
        "seed": seed, "rv": run.nats, "served": run.served, "held_out_images": run.normal.images,
        "normal_nats": run.normal.nats, "normal_nats_se": run.normal.stderr,
        "normal_parts": dict(run.normal.parts),
        "worst_nats": run.worst.nats, "worst_nats_se": run.worst.stderr,
        "worst_parts": dict(run.worst.parts),
    }  # fmt: skip


def _curves(seed: int, run: Vulnerability) -> dict[str, Any]:
    return {
        "seed": seed,
        "normal": {"validation": _plain(run.normal.history), "training": _plain(run.normal.training_history)},
        "worst": {"validation": _plain(run.worst.history), "training": _plain(run.worst.training_history)},
    }


def _plain(history: History) -> list[list[float | None]]:
    """Lists, as JSON reads them back, and None where a value is not a number, which strict JSON cannot hold."""
    return [[step, value if isfinite(value) else None] for step, value in history]


def _named(record: AuditRecord, network: nn.Module, identity: dict[str, Any], started: float) -> AuditRecord:
    return replace(
        record,
        cell_id=digest({"version": VERSION, **identity}),
        model=type(network).__name__,
        source="python",
        family=type(network).__name__,
        dataset="python",
        weights_sha256=identity["weights_sha256"],
        seconds=time.monotonic() - started,
        details={**record.details, "identity": identity},
    )
