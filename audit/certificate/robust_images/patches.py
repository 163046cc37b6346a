"""The backward pass for single entries of convolutional maps, on the window of pixels that an entry depends on.

Same bounds as `Tape.least`, at a fraction of the cost: coefficients outside the window are zero.

Source: Xu et al. 2020, "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond" (patches mode).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from audit.certificate.proof.operations import Convolution


class Patch(NamedTuple):
    """Coefficients (M, C, h, w) of a map's entries in a window whose first entry is at `top`, `left` (M,).

    Entries outside the map have coefficients of padding, which count as zero.
    """

    coefficients: Tensor
    top: Tensor
    left: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the window."""
        return self.coefficients.shape[2], self.coefficients.shape[3]

    def cropped(self, maps: Sequence[Tensor], image: Tensor) -> tuple[Tensor, ...]:
        """Return the windows (M, C, h, w) of each of the maps (N, C, H, W) of images (M,), zero outside the maps."""
        rows, columns = self._places()
        height, width = maps[0].shape[2:]
        # one row of zeros more: what lies outside the map is read from there
        stacked = torch.cat([part.movedim(1, 3) for part in maps], 3).reshape(-1, len(maps) * maps[0].shape[1])
        stacked = torch.cat([stacked, torch.zeros_like(stacked[:1])])
        flat = rows[:, :, None] * width + columns[:, None, :] + (image * height * width)[:, None, None]
        flat = torch.where(self._inside(height, width), flat, len(stacked) - 1)
        found = stacked.index_select(0, flat.flatten()).view(*flat.shape, -1)
        return tuple(part.movedim(3, 1) for part in found.split(maps[0].shape[1], dim=3))

    def _places(self) -> tuple[Tensor, Tensor]:
        """Return the rows (M, h) and columns (M, w) of the windows."""
        height, width = self.size
        rows = self.top[:, None] + torch.arange(height, device=self.top.device)
        return rows, self.left[:, None] + torch.arange(width, device=self.left.device)

    def _inside(self, height: int, width: int) -> Tensor:
        rows, columns = self._places()
        return ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]

    def masked(self, height: int, width: int) -> "Patch":
        """Return the patch with zero coefficients outside a map of a height and width."""
        return self._replace(coefficients=self.coefficients * self._inside(height, width)[:, None])

    def add(self, other: "Patch") -> "Patch":
        """Return the sum with another patch of the same map and rows, on the union of the windows."""
        # the same distance for every row: both windows move with the entry
        down, right = int((other.top - self.top)[0]), int((other.left - self.left)[0])
        up, left = min(down, 0), min(right, 0)
        size = (
            max(self.size[0], down + other.size[0]) - up,
            max(self.size[1], right + other.size[1]) - left,
        )
        first, second = self._within(-up, -left, size), other._within(down - up, right - left, size)
        return first._replace(coefficients=first.coefficients + second.coefficients)

    def _within(self, down: int, right: int, size: tuple[int, int]) -> "Patch":
        """Return the patch in a window of a larger size that starts `down` and `right` entries before its own."""
        sides = [right, size[1] - right - self.size[1], down, size[0] - down - self.size[0]]
        wide = functional.pad(self.coefficients, sides)
        return Patch(wide, self.top - down, self.left - right)


LocalPull = Callable[[Patch], Patch]
"""The transposed map of a step on patches: of the step's result to those of its argument."""


def single_entries(entry: Tensor, shape: Sequence[int], like: Tensor) -> Patch:
    """Return the patches of single entries (M,), indices into flattened maps of a shape (C, H, W)."""
    channels, height, width = shape
    unit = torch.zeros(len(entry), channels, 1, 1, dtype=like.dtype, device=like.device)
    unit[torch.arange(len(entry), device=like.device), entry // (height * width)] = 1.0
    unit = unit.to(memory_format=torch.channels_last)
    return Patch(unit, entry % (height * width) // width, entry % width)


def convolution_pull(apply: Convolution, weight: Tensor) -> LocalPull:
    """Return the transposed map of a convolution on patches."""
    (down, right), (above, before), dilation, groups = apply.geometry

    def pull(patch: Patch) -> Patch:
        if patch.size == (1, 1) and groups == 1 and dilation == (1, 1):  # much faster as a matrix product
            columns = patch.coefficients.flatten(1) @ weight.movedim(1, 3).flatten(1)
            wide = columns.view(-1, *weight.shape[2:], weight.shape[1]).movedim(3, 1)
            return Patch(wide, patch.top * down - above, patch.left * right - before)
        wide = functional.conv_transpose2d(
            patch.coefficients, weight, stride=(down, right), dilation=dilation, groups=groups
        )
        return Patch(wide, patch.top * down - above, patch.left * right - before)

    return pull


def factor_pull(factor: Tensor) -> LocalPull | None:
    """Return the transposed map of a product with a factor per channel; None for any other factor."""
    if factor.numel() != 1 and not (factor.dim() == 4 and factor.shape[2:] == (1, 1)):
        return None
    return lambda patch: patch._replace(coefficients=patch.coefficients * factor)


def same_pull(patch: Patch) -> Patch:
    """Return the patch: the transposed map of adding a constant, or of either argument of a sum."""
    return patch
