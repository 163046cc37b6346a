"""Random shifts and mirrorings of single images, and their undoing for what lies in the same pixels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.types import Images


class Shifts(NamedTuple):
    """Where each of N images is taken from: rows (N, H) and columns (N, W) of itself with `margin` pixels around."""

    rows: Tensor
    columns: Tensor
    margin: int

    def apply(self, images: Images) -> Images:
        """Return images (N, C, H, W) moved, zeros (black) where nothing was; the same for what was added to them."""
        if self.margin == 0 and not self._mirrored():
            return images
        padded = F.pad(images, (self.margin,) * 4)
        moved: Tensor = padded[self._where(images)]
        return moved

    def undo(self, moved: Images) -> Images:
        """Return what was moved where it was before; zeros where it had left the frame."""
        if self.margin == 0 and not self._mirrored():
            return moved
        margin = self.margin
        padded = F.pad(torch.zeros_like(moved), (margin,) * 4)
        padded[self._where(moved)] = moved
        return padded[..., margin : padded.shape[-2] - margin, margin : padded.shape[-1] - margin]

    def _mirrored(self) -> bool:
        return bool((self.columns[:, 0] > self.columns[:, -1]).any())

    def _where(self, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, channels = images.shape[:2]
        which = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        rows, columns = (index.to(images.device) for index in (self.rows, self.columns))
        return which, channel, rows[:, None, :, None], columns[:, None, None, :]


def draw_shifts(images: Images, most: int, generator: torch.Generator, *, flip: bool = False) -> Shifts:
    """Return shifts of up to `most` pixels each way for images (N, C, H, W), half of them mirrored if `flip`."""
    count, (height, width) = len(images), images.shape[-2:]
    offsets = torch.randint(2 * most + 1, (2, count, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return Shifts(rows, columns, most)
