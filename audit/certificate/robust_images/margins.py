"""Lower bounds of the margins of a network over balls of images, by methods of increasing cost.

Source: Xu et al. 2021, "Fast and Complete: Enabling Complete Verification with Rapid and Massively Parallel Incomplete
Verifiers" (alpha-CROWN), section 3, for slopes that are optimised by gradient ascent.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.robust_images.bounds import Bounds
from audit.certificate.robust_images.network import BoundedNetwork
from audit.certificate.robust_images.results import Method, Slopes
from audit.certificate.robust_images.tape import Relaxation, Rows, Tape
from audit.types import Images, Labels

_LEVELS = 255  # slopes are multiples of 1/255, so that a file holds them as bytes
_HOPE = 4.0  # an image is given up if its gain so far, times this, does not reach zero
_JUDGED_AFTER = 5  # steps


class Margins(NamedTuple):
    """Lower bounds (N,) of the least margin over all other classes, and the slopes that gave some of them."""

    least: Tensor
    slopes: Slopes


def margin_rows(labels: Labels, classes: int, like: Tensor) -> tuple[Rows, Tensor]:
    """Return the rows (N (K - 1), K) of the true class minus every other, and the other classes (N (K - 1),)."""
    image = torch.arange(len(labels), device=labels.device).repeat_interleave(classes - 1)
    others = torch.arange(classes, device=labels.device).expand(len(labels), -1)
    other = others[others != labels[:, None]]
    coefficients = torch.zeros(len(image), classes, device=labels.device, dtype=like.dtype)
    every = torch.arange(len(image), device=labels.device)
    coefficients[every, labels[image]], coefficients[every, other] = 1.0, -1.0
    return Rows(coefficients, image), other


@torch.no_grad()
def bound_margins(
    network: BoundedNetwork, clean: Images, labels: Labels, threat: ThreatModel, method: Method
) -> Margins:
    """Return lower bounds of the margins of clean images (N, C, H, W) with labels (N,) over their balls."""
    tape, logits = network.read(clean, threat, refine=method != "intervals")
    rows, other = margin_rows(labels, logits.shape[1], logits.value)
    found = network.least(tape, logits, rows)
    least = found.view(len(labels), -1).amin(1)
    doubtful = (found <= 0).nonzero().flatten()
    if method == "intervals" or len(doubtful) == 0 or network.effort.slope_steps == 0:
        return Margins(least, Slopes.none())
    search = _SlopeSearch(network, tape, logits)
    better, levels = search.run(rows.select(doubtful))
    found[doubtful] = torch.maximum(found[doubtful], better)
    least = found.view(len(labels), -1).amin(1)
    used = least[rows.image[doubtful]] > 0
    return Margins(least, Slopes(rows.image[doubtful][used], other[doubtful][used], levels[used]))


@torch.no_grad()
def check_margins(
    network: BoundedNetwork,
    sample: tuple[Images, Labels],
    threat: ThreatModel,
    method: Method,
    slopes: Slopes,
) -> Tensor:
    """Return lower bounds (N,) of the least margins of images (N, C, H, W) and labels (N,), with given slopes.

    `slopes.image` are indices of these images; a pair of image and class without slopes has the default ones.
    """
    clean, labels = sample
    tape, logits = network.read(clean, threat, refine=method != "intervals")
    rows, other = margin_rows(labels, logits.shape[1], logits.value)
    found = network.least(tape, logits, rows)
    if len(slopes.image):
        place = {pair: k for k, pair in enumerate(zip(rows.image.tolist(), other.tolist(), strict=True))}
        pairs = zip(slopes.image.tolist(), slopes.other.tolist(), strict=True)
        which = torch.tensor([place[pair] for pair in pairs], device=clean.device)
        given = unpacked(slopes.levels.to(clean) / _LEVELS, tape)
        found[which] = torch.maximum(found[which], network.least(tape, logits, rows.select(which), given))
    return found.view(len(labels), -1).amin(1)


def relu_steps(tape: Tape) -> dict[int, torch.Size]:
    """Return the shapes of the activations whose lower slope may be free, by step."""
    relaxed = tape.relaxations.items()
    return {at: tape.steps[at].shape for at, each in relaxed if isinstance(each, Relaxation)}


def unpacked(flat: Tensor, tape: Tape) -> dict[int, Tensor]:
    """Return slopes (S, A) as one tensor (S, ...) for each activation."""
    shapes = relu_steps(tape)
    parts = flat.split([shape.numel() for shape in shapes.values()], dim=1)
    return {at: part.view(-1, *shape) for (at, shape), part in zip(shapes.items(), parts, strict=True)}


@dataclass(frozen=True, eq=False)
class _SlopeSearch:
    """Gradient ascent on the lower slopes of some rows, each row with slopes of its own."""

    network: BoundedNetwork
    tape: Tape
    logits: Bounds

    def run(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the best lower bounds (M,) found, and the slopes (M, A) that give them, uint8."""
        effort, count = self.network.effort, len(rows.image)
        start = {at: self._lines(at)[rows.image] for at in relu_steps(self.tape)}
        slopes = torch.cat([part.flatten(1) for part in start.values()], 1)
        best, levels = torch.full((count,), -torch.inf).to(slopes), _levels(slopes)
        first, active = best, torch.arange(count, device=slopes.device)
        moments = torch.zeros_like(slopes), torch.zeros_like(slopes)
        for step in range(effort.slope_steps):
            value, gradient = self._ascent(rows.select(active), slopes)
            better = value > best[active]
            best = best.index_copy(0, active[better], value[better])
            levels[active[better]] = _levels(slopes[better])
            first = best if step == 0 else first
            keep = self._worthwhile(rows.image[active], best[active], first[active], step)
            if not bool(keep.any()):
                break
            active, slopes, gradient = active[keep], slopes[keep], gradient[keep]
            moments = moments[0][keep], moments[1][keep]
            slopes, moments = _adam(slopes, gradient, moments, (step + 1, effort.slope_rate * 0.95**step))
        return best, levels

    def _lines(self, at: int) -> Tensor:
        relaxation = self.tape.relaxations[at]
        assert isinstance(relaxation, Relaxation)
        return relaxation.lines.lower_slope

    def _ascent(self, rows: Rows, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds (M,) at the rounded slopes (M, A), and the gradient (M, A)."""
        self.network.spend(len(rows.image) * self.network.row_cost(self.tape, self.logits.at))
        with torch.enable_grad():
            leaf = (_levels(slopes).to(slopes) / _LEVELS).requires_grad_()
            value = self.network.least(self.tape, self.logits, rows, unpacked(leaf, self.tape))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    def _worthwhile(self, image: Tensor, best: Tensor, first: Tensor, step: int) -> Tensor:
        """Return which rows (M,) are still negative, and belong to an image that may still be proved."""
        negative = best <= 0
        if step < _JUDGED_AFTER:
            return negative
        hopeless = best + _HOPE * (best - first) < 0
        lost = torch.zeros(len(self.logits.value), dtype=torch.bool, device=image.device)
        lost[image[hopeless]] = True
        return negative & ~lost[image]


def _levels(slopes: Tensor) -> Tensor:
    return (slopes * _LEVELS).round().clamp(0, _LEVELS).to(torch.uint8)


def _adam(
    slopes: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], schedule: tuple[int, float]
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return slopes in [0, 1] after one ascent step. Source: Kingma & Ba 2015, algorithm 1."""
    step, rate = schedule
    first = 0.9 * moments[0] + 0.1 * gradient
    second = 0.999 * moments[1] + 0.001 * gradient.square()
    direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-12)
    return (slopes + rate * direction).clamp(0, 1), (first, second)
