"""Put a normalisation that stands outside a network inside it, so that images and radii are in pixel units."""

from collections.abc import Iterable
from math import isfinite

import numpy as np
import torch
from torch import Tensor, nn

from audit.errors import UsageError
from model_zoo.model_types import Normalized

_LARGEST = 2.0  # of a mean or deviation in units of [0, 1]; those in units of 0 to 255 are far above
_GREYS = 255


def wrap(model: nn.Module, mean: object, std: object) -> nn.Module:
    """Return a network that normalises its images itself: (N, C, H, W) in [0, 1] -> `model((images - mean) / std)`.

    `mean` and `std` are in units of images in [0, 1]: a number a channel, or one for all, as lists, arrays or tensors.
    Layers keep the names that they have in `model`. Raises UsageError for values that no such normalisation has, and
    for a model that `wrap` returned.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if isinstance(model, Normalized):
        raise UsageError("the model normalises its images already: wrap the network inside it instead")
    means, stds = _numbers("mean", mean), _numbers("std", std)
    if 1 not in (len(means), len(stds)) and len(means) != len(stds):
        raise UsageError(f"mean has {len(means)} numbers, std has {len(stds)}: each needs one a channel")
    if min(stds) <= 0:
        raise UsageError(f"std {stds} must be above 0")
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    return Normalized(model, means, stds).to(device).train(model.training)


def _numbers(name: str, values: object) -> tuple[float, ...]:
    flat = values.ravel().tolist() if isinstance(values, Tensor | np.ndarray) else values
    given = list(flat) if isinstance(flat, Iterable) and not isinstance(flat, str | bytes) else [flat]
    numbers = [float(each) for each in given if isinstance(each, int | float | np.number)]
    if not given or len(numbers) < len(given) or not all(map(isfinite, numbers)):
        raise UsageError(f"{name} {values!r} is not a finite number, or one a channel, such as (0.485, 0.456, 0.406)")
    found = tuple(numbers)
    if max(map(abs, found)) > _LARGEST:
        scaled = ", ".join(f"{each / _GREYS:.4g}" for each in found)
        raise UsageError(f"{name} {found} is in units of 0 to 255: images lie in [0, 1], so write ({scaled})")
    return found
