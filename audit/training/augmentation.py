"""Random shifts and horizontal flips of single images, and their inverse."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from audit.types import Images


class Shifts(NamedTuple):
    """Source rows (N, H) and columns (N, W) of each of N images, in the image padded by `margin` pixels."""

    rows: Tensor
    columns: Tensor
    margin: int

    def apply(self, images: Images) -> Images:
        """Return shifted images, or perturbations, (N, C, H, W), with zeros outside the original frame."""
        if self.margin == 0 and not self._flips():
            return images
        padded = F.pad(images, (self.margin,) * 4)
        shifted: Tensor = padded[self._source_indices(images)]
        return shifted

    def undo(self, shifted: Images) -> Images:
        """Return shifted images or perturbations at their original positions, with zeros for pixels shifted out."""
        if self.margin == 0 and not self._flips():
            return shifted
        margin = self.margin
        padded = F.pad(torch.zeros_like(shifted), (margin,) * 4)
        padded[self._source_indices(shifted)] = shifted
        return padded[..., margin : padded.shape[-2] - margin, margin : padded.shape[-1] - margin]

    def _flips(self) -> bool:
        return bool((self.columns[:, 0] > self.columns[:, -1]).any())

    def _source_indices(self, images: Images) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, channels = images.shape[:2]
        image = torch.arange(count, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[None, :, None, None]
        rows, columns = (index.to(images.device) for index in (self.rows, self.columns))
        return image, channel, rows[:, None, :, None], columns[:, None, None, :]


def draw_shifts(images: Images, max_shift: int, generator: torch.Generator, *, flip: bool = False) -> Shifts:
    """Return shifts of up to `max_shift` pixels for images (N, C, H, W), flipped with probability 1/2 if `flip`."""
    count, (height, width) = len(images), images.shape[-2:]
    offsets = torch.randint(2 * max_shift + 1, (2, count, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    if flip:
        flipped = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
    return Shifts(rows, columns, max_shift)
