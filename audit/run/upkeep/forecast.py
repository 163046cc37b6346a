"""What a benchmark will cost: passes, time, memory and disk, from a short calibration instead of formulas.

Each estimator and the attack are run on two small sets of images of one small network; passes and the time beside
them are read as lines in the number of images. Then every model's own time per pass is measured on one batch. The
result is rough: attacks stop early at images that fall early, and a busy machine is slower.
"""

import json
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import logits_of
from audit.adversary.robustness import Target, attacked
from audit.adversary.threat import ThreatModel
from audit.config.settings import AuditSettings
from audit.run.layer_audit import LayerAudit, assemble
from audit.types import Images, Labels

SIZES = (60, 180)  # images of the calibration: few, but enough for every estimator's splits
_LARGE = 20_000  # values of an image, above which a small batch times a pass well enough


class Line(NamedTuple):
    """A cost that is `fixed` and grows by `per_image` with the images; never negative."""

    fixed: float
    per_image: float

    def at(self, images: int) -> float:
        """Return the cost for so many images."""
        return max(0.0, self.fixed + self.per_image * images)


class Rates(NamedTuple):
    """What one attack and one seed of one estimator cost: passes, and seconds that are no passes.

    `record_bytes` is what a record of one seed takes on the disk.
    """

    attack_passes: Line
    attack_seconds: Line
    passes: Line
    seconds: Line
    record_bytes: int


class Sample(NamedTuple):
    """A small network with images (N, C, H, W) and labels (N,) to calibrate on; N is at least the largest of SIZES."""

    network: nn.Module
    images: Images
    labels: Labels


class Forecast(NamedTuple):
    """What the cells of one model will cost: single-image forward+backward passes, seconds, bytes."""

    passes: float
    seconds: float
    memory: int
    disk: int


def calibrate(sample: Sample, threat: ThreatModel, settings: AuditSettings) -> Rates:
    """Run one attack and one seed of one estimator on a few images, twice, and return what they cost."""
    each = seconds_per_pass(sample.network, sample.images[:64])
    runs = [_measured(sample, count, threat, settings) for count in SIZES]
    lines = [_line([run[number] for run in runs]) for number in range(4)]
    attack, spent, passes, seconds = lines
    return Rates(
        attack,
        Line(spent.fixed - each * attack.fixed, spent.per_image - each * attack.per_image),
        passes,
        Line(seconds.fixed - each * passes.fixed, seconds.per_image - each * passes.per_image),
        int(runs[-1][4]),
    )


def _measured(
    sample: Sample, count: int, threat: ThreatModel, settings: AuditSettings
) -> tuple[float, float, float, float, int]:
    """Return passes and seconds of the attack and of the estimator, and the size of the record."""
    network, images, labels = sample.network, sample.images[:count], sample.labels[:count]
    started = time.monotonic()
    robustness = attacked(Target(network, images, labels), threat, settings.attack, 0)
    between = time.monotonic()
    measured = LayerAudit(network, images, labels, "logits", settings).under(threat)
    ended = time.monotonic()
    record = assemble(robustness, measured, "logits", threat, settings)
    size = len(json.dumps(record.to_dict(), indent=1, allow_nan=False))
    own = sum(run.passes for run in measured.per_seed)
    return float(robustness.accuracy.passes), between - started, own, ended - between, size


def _line(values: list[float]) -> Line:
    slope = max(0.0, (values[1] - values[0]) / (SIZES[1] - SIZES[0]))
    return Line(values[0] - slope * SIZES[0], slope)


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


def batch_bytes(network: nn.Module, images: Images, batch: int) -> int:
    """Return what a batch takes at least: weights, images, outputs of all innermost modules and their gradients."""
    sizes: list[int] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out: sizes.append(_bytes(out)))
        for module in network.modules()
        if not any(True for _ in module.children())
    ]
    try:
        logits_of(network, images[:1], 1)
    finally:
        for handle in handles:
            handle.remove()
    weights = sum(_bytes(tensor) for tensor in network.state_dict().values())
    return weights + batch * (2 * sum(sizes) + 4 * _bytes(images[:1]))


def _bytes(output: object) -> int:
    return output.numel() * output.element_size() if isinstance(output, Tensor) else 0


class Work(NamedTuple):
    """The cells of one model that are to do: how many images and seeds, which attacks, which estimators' cells."""

    images: int
    seeds: int
    attacks: int
    rates: tuple[Rates, ...]


def forecast(work: Work, seconds: float, memory: int) -> Forecast:
    """Return the cost of one model's cells; `seconds` is its time per pass, `memory` that of a batch.

    Layers and estimators share what the attack found, so it counts once a threat model.
    """
    if not work.rates:
        return Forecast(0.0, 0.0, memory, 0)
    first, images = work.rates[0], work.images
    attack = work.attacks * first.attack_passes.at(images)
    own = work.seeds * sum(rates.passes.at(images) for rates in work.rates)
    beside = work.attacks * first.attack_seconds.at(images)
    beside += work.seeds * sum(rates.seconds.at(images) for rates in work.rates)
    disk = sum(rates.record_bytes for rates in work.rates)
    return Forecast(attack + own, (attack + own) * seconds + beside, memory, disk)
