"""The units of a layer: the positions of their features in the flattened activations, and their receptive fields."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.passes import input_gradient
from audit.errors import UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.representation.layers import Representation, describe_layers
from audit.types import FeatureMap, Images


class UnitFeatures(NamedTuple):
    """Columns (K,) of some features in the flattened activations, and their unit of the map; () without a map."""

    columns: Tensor
    unit: tuple[int, ...]


def unit_features(network: nn.Module, layer: str, images: Images, unit: tuple[int, ...] | None = None) -> UnitFeatures:
    """Return the features of a layer: the channels at one unit of a map or token sequence, else all coordinates.

    `unit` is (row, column) of a map or (token,) of a sequence, by default the middle one. Raises UsageError for a unit
    outside the map.
    """
    path = layer.partition("@")[0].partition("#")[0]
    shape = next((info.shape for info in describe_layers(network, images[:1]) if info.name == path), ())
    with torch.no_grad():
        dimension = Representation(network, layer)(images[:1]).shape[1]
    columns = torch.arange(dimension)
    if len(shape) not in (2, 3) or columns.numel() != torch.Size(shape).numel():
        if unit:
            raise UsageError(f"layer {layer!r} has no map, so no unit {unit}: leave the unit out")
        return UnitFeatures(columns, ())
    sizes = shape[1:] if len(shape) == 3 else shape[:1]  # channels are the first axis of maps, the last of sequences
    position = tuple(size // 2 for size in sizes) if unit is None else unit
    if len(position) != len(sizes) or any(not 0 <= at < size for at, size in zip(position, sizes, strict=True)):
        raise UsageError(f"unit {position} is outside the map of layer {layer!r}, which is {'x'.join(map(str, sizes))}")
    grid = columns.view(shape)
    return UnitFeatures(grid[:, position[0], position[1]] if len(shape) == 3 else grid[position[0]], position)


def receptive_field(encode: FeatureMap, images: Images, columns: Tensor, count: int = 16) -> Tensor:
    """Return a mask (H, W) of the pixels that any of the features in `columns` (K,) depends on.

    These are the pixels with a nonzero gradient of a random combination of the features, at `count` of the images and
    `count` random images. A pixel that only inactive units depend on is missed.
    """
    generator = keyed_generator(Purpose.RECEPTIVE_FIELD)
    noise = torch.rand((count, *images.shape[1:]), generator=generator).to(images)
    leaf = torch.cat([images[:count], noise]).requires_grad_()
    features = encode(leaf)[:, columns]
    weights = torch.randn(features.shape, generator=generator).to(features)
    field: Tensor = (input_gradient(features, leaf, weights) != 0).any(0).any(0)
    return field


def field_size(field: Tensor) -> tuple[int, int]:
    """Return height and width of the bounding box of a mask (H, W); (0, 0) for an empty mask."""
    if not field.any():
        return 0, 0
    rows, columns = field.any(1).nonzero(), field.any(0).nonzero()
    return int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
