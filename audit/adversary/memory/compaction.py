"""Batches from which finished images are dropped: entries moved together, and few different sizes."""

from torch import Tensor

_SIZES_PER_OCTAVE = 16  # batch sizes from one power of two to the next


def compact(done: Tensor, kept: int, *tensors: Tensor) -> None:
    """Move entries that are not done into the first `kept` places, over entries that are done."""
    open_ = (~done[kept:]).nonzero().flatten() + kept
    places = done[:kept].nonzero().flatten()[: len(open_)]
    for tensor in tensors:
        tensor[places] = tensor[open_]


def batch_length(left: int) -> int:
    """Return `left` rounded up, by at most a sixteenth, to one of few batch sizes.

    Kernels are compiled for each size: the first pass of a small network with a new size takes as long as two.
    """
    grain = max(1, (1 << left.bit_length()) // (2 * _SIZES_PER_OCTAVE))
    return -(-left // grain) * grain
