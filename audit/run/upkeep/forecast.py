"""Forecast of a benchmark's cost: passes, time, memory and disk, from a short calibration.

The attack and each estimator are run on two small sets of images with one small network. Passes, and the time beyond
them, are taken as linear in the number of images; the time of a pass is then measured on each model. The forecast is
rough: attacks stop early at images that they break early, and a busy machine is slower.
"""

import json
import time
from typing import NamedTuple

import torch
from torch import nn

from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.adversary.threat import ThreatModel
from audit.config.settings import AuditSettings
from audit.run.assembly import AuditedNetwork, AuditParts, assemble
from audit.run.identity import NetworkIdentity, audit_identity
from audit.run.layer_audit import LayerAudit
from audit.types import Images, Labels

SIZES = (60, 180)  # images of the calibration: few, but enough for every estimator's splits
_LARGE = 20_000  # values of an image; a small batch of larger images suffices to time a pass


class LinearCost(NamedTuple):
    """A cost `fixed + per_image * images`, at least 0."""

    fixed: float
    per_image: float

    def at(self, images: int) -> float:
        """Return the cost of a number of images.

        >>> LinearCost(2.0, 0.5).at(10)
        7.0
        """
        return max(0.0, self.fixed + self.per_image * images)


class Rates(NamedTuple):
    """The cost of one attack and of one seed of one estimator: passes, and seconds beyond those of the passes.

    `record_bytes` is the size of a record of one seed.
    """

    attack_passes: LinearCost
    attack_seconds: LinearCost
    passes: LinearCost
    seconds: LinearCost
    record_bytes: int


class CalibrationSet(NamedTuple):
    """A small network with images (N, C, H, W) and labels (N,), N at least the larger of SIZES."""

    network: nn.Module
    images: Images
    labels: Labels


class Forecast(NamedTuple):
    """The cost of one model's cells: forward+backward passes of single images, seconds, bytes of memory and disk."""

    passes: float
    seconds: float
    memory: int
    disk: int


class Work(NamedTuple):
    """Unfinished cells of one model: images, seeds, the number of attacks, and the rates of each cell's estimator."""

    images: int
    seeds: int
    attacks: int
    rates: tuple[Rates, ...]


class _Cost(NamedTuple):
    attack_passes: float
    attack_seconds: float
    passes: float
    seconds: float
    record_bytes: int


def calibrate(calibration: CalibrationSet, threat: ThreatModel, settings: AuditSettings) -> Rates:
    """Measure the cost of one attack and one seed of one estimator at both sizes, and return the rates."""
    per_pass = seconds_per_pass(calibration.network, calibration.images[:64])
    small, large = (_measured(calibration, count, threat, settings) for count in SIZES)
    attack_passes = _linear(small.attack_passes, large.attack_passes)
    passes = _linear(small.passes, large.passes)
    return Rates(
        attack_passes,
        _beyond_passes(_linear(small.attack_seconds, large.attack_seconds), attack_passes, per_pass),
        passes,
        _beyond_passes(_linear(small.seconds, large.seconds), passes, per_pass),
        large.record_bytes,
    )


def _measured(calibration: CalibrationSet, count: int, threat: ThreatModel, settings: AuditSettings) -> _Cost:
    network, images, labels = calibration.network, calibration.images[:count], calibration.labels[:count]
    started = time.monotonic()
    robustness = evaluate_robustness(TargetModel(network, images, labels), threat, settings.attack, 0)
    between = time.monotonic()
    result = LayerAudit(network, images, labels, "logits", settings).under(threat)
    ended = time.monotonic()
    parts = AuditParts(
        network=AuditedNetwork(model="", source="", family="", dataset="", weights_sha256=""),
        layer="logits",
        threat=threat,
        settings=settings,
        robustness=robustness,
        result=result,
        sanity_checks=(),
        identity=audit_identity(NetworkIdentity("", "", "", ""), "", "logits", threat, settings),
        device=images.device,
        seconds=ended - started,
    )
    size = len(json.dumps(assemble(parts).to_dict(), indent=1, allow_nan=False))
    passes = sum(run.passes for run in result.per_seed)
    return _Cost(float(robustness.accuracy.passes), between - started, passes, ended - between, size)


def _linear(small: float, large: float) -> LinearCost:
    slope = max(0.0, (large - small) / (SIZES[1] - SIZES[0]))
    return LinearCost(small - slope * SIZES[0], slope)


def _beyond_passes(seconds: LinearCost, passes: LinearCost, per_pass: float) -> LinearCost:
    return LinearCost(seconds.fixed - per_pass * passes.fixed, seconds.per_image - per_pass * passes.per_image)


def seconds_per_pass(network: nn.Module, images: Images) -> float:
    """Return the time of one image's forward and backward pass inside a batch, on the images' device."""
    batch = images[:8] if images[0].numel() > _LARGE else images
    leaf = batch.detach().clone().requires_grad_()
    began = 0.0
    for _ in range(2):  # the first pass warms up
        began = time.monotonic()
        torch.autograd.grad(network(leaf).sum(), leaf)
        if leaf.device.type == "cuda":
            torch.cuda.synchronize(leaf.device)
    return (time.monotonic() - began) / len(batch)


def forecast(work: Work, seconds: float, memory: int) -> Forecast:
    """Return the cost of one model's cells; `seconds` is its time per pass, `memory` that of a batch.

    Layers and estimators share attacks, so each threat model's attack counts once.
    """
    if not work.rates:
        return Forecast(0.0, 0.0, memory, 0)
    first, images = work.rates[0], work.images
    attack = work.attacks * first.attack_passes.at(images)
    own = work.seeds * sum(rates.passes.at(images) for rates in work.rates)
    beyond = work.attacks * first.attack_seconds.at(images)
    beyond += work.seeds * sum(rates.seconds.at(images) for rates in work.rates)
    disk = sum(rates.record_bytes for rates in work.rates)
    return Forecast(attack + own, (attack + own) * seconds + beyond, memory, disk)
