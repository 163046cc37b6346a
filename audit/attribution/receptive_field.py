"""The units of a layer: where its features stand among its outputs, and which pixels they see."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.gradients import input_gradient
from audit.errors import UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.representation.layers import Representation, describe_layers
from audit.types import Features, Images

Read = Callable[[Images], Features]


class Units(NamedTuple):
    """Where the features of a layer stand among its flattened outputs (K,), and at which unit of the map, if any."""

    columns: Tensor
    unit: tuple[int, ...]


def units(network: nn.Module, layer: str, images: Images, unit: tuple[int, ...] | None = None) -> Units:
    """Return where a layer's features are: channels of a map or of tokens at one unit, else every coordinate.

    `unit` is (row, column) of a map, (token,) of a sequence; the middle one where it is None. Raises UsageError for a
    unit that is not there.
    """
    path = layer.partition("@")[0].partition("#")[0]
    shape = next((info.shape for info in describe_layers(network, images[:1]) if info.name == path), ())
    with torch.no_grad():
        dimension = Representation(network, layer)(images[:1]).shape[1]
    everything = torch.arange(dimension)
    if len(shape) not in (2, 3) or everything.numel() != torch.Size(shape).numel():
        if unit:
            raise UsageError(f"layer {layer!r} has no map, so no unit {unit}: leave the unit out")
        return Units(everything, ())
    places = shape[1:] if len(shape) == 3 else shape[:1]  # channels come first in maps, last in token sequences
    chosen = tuple(size // 2 for size in places) if unit is None else unit
    if len(chosen) != len(places) or any(not 0 <= at < size for at, size in zip(chosen, places, strict=True)):
        raise UsageError(f"unit {chosen} is not on the map of layer {layer!r}, which is {'x'.join(map(str, places))}")
    grid = everything.view(shape)
    return Units(grid[:, chosen[0], chosen[1]] if len(shape) == 3 else grid[chosen[0]], chosen)


def receptive_field(read: Read, images: Images, columns: Tensor, count: int = 16) -> Tensor:
    """Return which pixels (H, W) any of the features depends on: where a gradient is not zero.

    Looked for at a few of the images and at random ones, with random weights, so that what is zero there is zero by
    the network's wiring (or by units that are silent on all of them).
    """
    generator = keyed_generator(Purpose.RECEPTIVE_FIELD)
    noise = torch.rand((count, *images.shape[1:]), generator=generator).to(images)
    leaf = torch.cat([images[:count], noise]).requires_grad_()
    values = read(leaf)[:, columns]
    weights = torch.randn(values.shape, generator=generator).to(values)
    found: Tensor = (input_gradient(values, leaf, weights) != 0).any(0).any(0)
    return found


def field_size(field: Tensor) -> tuple[int, int]:
    """Return height and width of the smallest box around the true pixels (H, W); (0, 0) where there is none."""
    if not field.any():
        return 0, 0
    rows, columns = field.any(1).nonzero(), field.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
