"""The steps of a network on a ball of images, and the backward pass that bounds linear functions of its values.

Every step but an activation is affine and is pulled back exactly. An activation is replaced by a line below or above
it, whichever the sign of the pulled-back coefficient asks for. With g the coefficients at every activation, f the value
at the clean image x0, and A the coefficients at the image,

    <rows, f(x)> >= <rows, f(x0)> + sum over activations of <g, line(u0) - act(u0)> + <A, x - x0>,

because all affine steps cancel against the clean image. Every term after the first is at most zero.

Source: Zhang et al. 2018 (CROWN), theorem 3.2; Xu et al. 2020, "Automatic Perturbation Analysis for Scalable Certified
Robustness and Beyond", algorithm 1, for general graphs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.robust_images.balls import box, least_change
from audit.certificate.robust_images.lines import Lines
from audit.certificate.robust_images.patches import LocalPull, Patch, single_entries
from audit.types import Images

MARGIN = 1e-8
"""Share of the size of all terms of a bound by which a bound of the backward pass is lowered.

The terms are computed in float64, with a unit roundoff of 1.1e-16, by sums of at most about 1e4 products in at most
about 1e2 steps. The margin leaves a factor of 1e8 for the growth of rounding errors, which the difference between
float32 and float64 bounds measures.
"""

Pull = Callable[[Tensor], Tensor]
"""The transposed linear map: coefficients (M, ...) of a step's result to those of its argument."""


class Step(NamedTuple):
    """One step: its arguments, the transposed map to each, its shape without the batch, and multiplications a row.

    `local` is the transposed map on patches, the same for each argument; None where there is none.
    """

    arguments: tuple[int, ...]
    pulls: tuple[Pull, ...]
    shape: torch.Size
    cost: float
    local: LocalPull | None = None


class Rows(NamedTuple):
    """Linear functions (M, ...) of a step's values, each for image `image` (M,) of the batch, or all for (1,)."""

    coefficients: Tensor
    image: Tensor

    def select(self, which: Tensor | slice) -> "Rows":
        """Return some of the rows."""
        return Rows(self.coefficients[which], self.image[which])


class RowCost(NamedTuple):
    """Multiplications of one row of a backward pass, and the entries of its largest step."""

    multiplications: float
    entries: int


@dataclass(frozen=True, eq=False)
class Relaxation:
    """The lines of an activation step on the balls of a batch: values (N, ...) before and after, at the clean image."""

    lines: Lines
    before: Tensor
    after: Tensor

    @cached_property
    def below(self) -> Tensor:
        """The lower line minus the activation at the clean image, (N, ...), at most zero."""
        lines = self.lines
        return (lines.lower_slope * self.before + lines.lower_offset - self.after).clamp_max(0)

    @cached_property
    def above(self) -> Tensor:
        """The upper line minus the activation at the clean image, (N, ...), at least zero."""
        lines = self.lines
        return (lines.upper_slope * self.before + lines.upper_offset - self.after).clamp_min(0)

    def pull(self, rows: Rows, slope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return coefficients (M, ...) before the activation, and the (M,) that the lines cost at the clean image.

        `slope` (M, ...) replaces the lower slopes where these are free.
        """
        lines, image = self.lines, rows.image
        lower, below = lines.lower_slope[image], self.below[image]
        if slope is not None:
            free = lines.free[image]
            lower = torch.where(free, slope, lower)
            below = torch.where(free, (slope * self.before[image] - self.after[image]).clamp_max(0), below)
        upper, above = lines.upper_slope[image], self.above[image]
        coefficients, positive = rows.coefficients, rows.coefficients.clamp_min(0)
        # negative coefficients are all less the positive ones: two passes over memory fewer than two clamped copies
        spent = torch.linalg.vecdot(positive.flatten(1), (below - above).flatten(1))
        spent = spent + torch.linalg.vecdot(coefficients.flatten(1), above.flatten(1))
        return torch.addcmul(coefficients * upper, positive, lower - upper), spent

    def pull_patch(self, patch: Patch, image: Tensor) -> tuple[Patch, Tensor]:
        """Return a patch before the activation, and the (M,) that the lines cost at the clean image."""
        lines, coefficients = self.lines, patch.coefficients
        positive, negative = coefficients.clamp_min(0), coefficients.clamp_max(0)
        maps = (lines.lower_slope, lines.upper_slope, self.below, self.above)
        lower, upper, below, above = patch.cropped(maps, image)
        spent = (positive * below + negative * above).flatten(1).sum(1)
        return patch._replace(coefficients=positive * lower + negative * upper), spent


class MaximumRelaxation(NamedTuple):
    """The lines of a maximum over windows (N, C, K, L): the entry of largest lower bound below; above, the entry
    itself where it is `certain`, else the `ceiling` (N, C, 1, L)."""

    entry: Tensor
    certain: Tensor
    ceiling: Tensor
    before: Tensor

    def pull(self, rows: Rows, slope: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return coefficients (M, C, K, L) before the maximum, and the (M,) that the lines cost at the clean image."""
        image, coefficients = rows.image, rows.coefficients.unsqueeze(2)
        positive, negative = coefficients.clamp_min(0), coefficients.clamp_max(0)
        before, entry, certain = self.before[image], self.entry[image], self.certain[image]
        chosen, after = before.gather(2, entry), before.amax(2, keepdim=True)
        above = torch.where(certain, chosen, self.ceiling[image])
        spent = positive * (chosen - after) + negative * (above - after).clamp_min(0)
        kept = positive + torch.where(certain, negative, torch.zeros_like(negative))
        zeros = coefficients.new_zeros(len(coefficients), *before.shape[1:])
        return zeros.scatter(2, entry.expand_as(kept), kept), spent.flatten(1).sum(1)


@dataclass(eq=False)
class Tape:
    """The steps on the balls around clean images (N, C, H, W); step 0 is the image itself."""

    clean: Images
    threat: ThreatModel
    steps: list[Step] = field(default_factory=list)
    relaxations: dict[int, Relaxation | MaximumRelaxation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        low, high = box(self.clean, self.threat)
        self._down, self._up = low - self.clean, high - self.clean
        self.record(Step((), (), self.clean.shape[1:], 0.0))

    def record(self, step: Step) -> int:
        """Append a step and return its index."""
        self.steps.append(step)
        return len(self.steps) - 1

    def activate(self, argument: int, shape: torch.Size, relaxation: Relaxation | MaximumRelaxation) -> int:
        """Append an activation and return its index."""
        index = self.record(Step((argument,), (), shape, 0.0))
        self.relaxations[index] = relaxation
        return index

    def ancestors(self, at: int) -> list[int]:
        """Return the steps that step `at` depends on, itself included, last first."""
        needed = {at}
        for index in range(at, -1, -1):
            if index in needed:
                needed.update(self.steps[index].arguments)
        return sorted(needed, reverse=True)

    def least(self, at: int, values: Tensor, rows: Rows, slopes: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return lower bounds (M,) of rows of the values of step `at`, which are `values` (N, ...) at the clean images.

        `slopes` are lower slopes (M, ...) of activation steps. Differentiable in `slopes`. Lowered by `MARGIN`.
        """
        terms = rows.coefficients * values[rows.image]
        reference, size = terms.flatten(1).sum(1), terms.flatten(1).abs().sum(1)
        coefficients = {at: rows.coefficients}
        spent = torch.zeros_like(reference)
        # rows of one image share its lines, which are then broadcast instead of copied
        image = rows.image[:1] if bool((rows.image == rows.image[:1]).all()) else rows.image
        for index in self.ancestors(at)[:-1]:
            step, current = self.steps[index], coefficients.pop(index)
            if index in self.relaxations:
                slope = None if slopes is None else slopes.get(index)
                pulled, cost = self.relaxations[index].pull(Rows(current, image), slope)
                spent, arguments = spent + cost, [pulled]
            else:
                arguments = [pull(current) for pull in step.pulls]
            for argument, pulled in zip(step.arguments, arguments, strict=True):
                earlier = coefficients.get(argument)
                coefficients[argument] = pulled if earlier is None else earlier + pulled
        down, up = self._down[image].flatten(1), self._up[image].flatten(1)
        change = least_change(coefficients[0].flatten(1), down, up, self.threat)
        return reference + spent + change - MARGIN * (size - spent - change)

    def dense_cost(self, at: int) -> RowCost:
        """Return the cost of one row that `least` pulls back from a step."""
        steps = [self.steps[index] for index in self.ancestors(at)]
        return RowCost(sum(step.cost for step in steps), max(step.shape.numel() for step in steps))

    def local_cost(self, at: int) -> RowCost | None:
        """Return the cost of one entry in `least_of_entries`; None where that does not apply."""
        inner, shape = self.ancestors(at)[:-1], self.steps[at].shape
        activations = {index for index in inner if isinstance(self.relaxations.get(index), Relaxation)}
        if len(shape) != 3 or any(self.steps[i].local is None for i in inner if i not in activations):
            return None
        patches = {at: single_entries(torch.zeros(1, dtype=torch.int64, device=self.clean.device), shape, self.clean)}
        cost, largest = 0.0, 0
        for index in inner:
            step, current = self.steps[index], patches.pop(index)
            size = current.coefficients.numel()
            cost, largest = cost + step.cost * size / step.shape.numel(), max(largest, size)
            pulled = current if index in activations or step.local is None else step.local(current)
            for argument in step.arguments:
                patches[argument] = pulled if argument not in patches else patches[argument].add(pulled)
        return RowCost(cost, max(largest, patches[0].coefficients.numel()))

    def least_of_entries(self, at: int, values: Tensor, places: tuple[Tensor, Tensor], side: Tensor) -> Tensor:
        """Return lower bounds (M,), as `least` gives them, of single entries of the maps of step `at`, times `side`.

        `places` are the images (M,) and indices (M,) into their flattened maps; `side` (M,) is 1 or -1.
        """
        image, entry = places
        reference = side * values.flatten(1)[image, entry]
        start = single_entries(entry, self.steps[at].shape, values)
        start = start._replace(coefficients=side[:, None, None, None] * start.coefficients)
        return reference + self._local(at, start, image, reference)

    def _local(self, at: int, start: Patch, image: Tensor, reference: Tensor) -> Tensor:
        """Return what the ball may take away, (M,), from the entries of a patch, `MARGIN` included."""
        patches, spent, zero_outside = {at: start}, torch.zeros_like(reference), {at}
        for index in self.ancestors(at)[:-1]:
            step, current, relaxation = self.steps[index], patches.pop(index), self.relaxations.get(index)
            if isinstance(relaxation, Relaxation):
                pulled, cost = relaxation.pull_patch(current, image)
                spent = spent + cost
                zero_outside.update(step.arguments if patches.keys().isdisjoint(step.arguments) else ())
            else:
                assert step.local is not None
                # entries outside the map are padding; an activation has made them zero already
                inside = current if index in zero_outside else current.masked(*step.shape[1:])
                pulled = step.local(inside)
                zero_outside.difference_update(step.arguments)
            for argument in step.arguments:
                earlier = patches.get(argument)
                patches[argument] = pulled if earlier is None else earlier.add(pulled)
        last = patches[0]
        down, up = last.cropped((self._down, self._up), image)
        change = least_change(last.coefficients.flatten(1), down.flatten(1), up.flatten(1), self.threat)
        return spent + change - MARGIN * (reference.abs() - spent - change)
