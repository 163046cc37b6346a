"""Pixels as float images in [0, 1]: checks of their range, and the preprocessing of stored arrays."""

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from audit.errors import UsageError
from audit.types import empty_pixels, image_slices, pixel_extremes
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.images.transforms import preprocess

_UNSCALED_ABOVE = 1.5
_NORMALISED_BELOW = -0.1
_OFF_LEVEL = 1e-2  # of a grey level, for floats that were computed from 8-bit pixels
_ROUNDING = 1e-5  # of floats computed from 8-bit pixels: far below half a grey level


def unit_floats(pixels: Tensor, ref: str) -> Tensor:
    """Return pixels, uint8 or float, as float32 in [0, 1]; values outside by rounding alone are clipped.

    Raises UsageError for another type or range.
    """
    if pixels.dtype == torch.uint8:
        return _converted(pixels, lambda part: part.to(torch.float32) / 255)
    if not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        raise UsageError(f"the images of {ref} are {kind}; store uint8, or floats in [0, 1]")
    low, high = pixel_extremes(pixels.to(torch.float32))
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:  # false for NaN
        return _converted(pixels, lambda part: part.to(torch.float32).clamp(0, 1))
    images = pixels.to(torch.float32)
    check_range(images, ref)
    return images


def _converted(pixels: Tensor, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """Return stored pixels (N, C, H, W) as float32, converted part by part."""
    images = empty_pixels(pixels.shape, torch.empty(0))
    for part in image_slices(images):
        images[part] = convert(pixels[part])
    return images


def check_range(images: Tensor, ref: str) -> None:
    """Raise UsageError for pixels outside [0, 1], naming the likely cause."""
    low, high = pixel_extremes(images)
    if not (isfinite(low) and isfinite(high)):
        raise UsageError(f"the images of {ref} hold values that are not finite; store uint8, or floats in [0, 1]")
    if low >= 0 and high <= 1:
        return
    if low < _NORMALISED_BELOW:
        advice = "they seem to be normalised: undo that, because normalisation belongs inside the network"
    elif high > _UNSCALED_ABOVE:
        advice = "float images with max > 1.5: divide by 255"
    else:
        advice = "clip them"
    raise UsageError(f"the images of {ref} range from {low:.6g} to {high:.6g} instead of [0, 1]; {advice}")


def preprocess_arrays(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return stored pixels (N, C, H, W), uint8 or float, after resize and crop, as the type that they have.

    Arrays of one size were made as the input of a network: those that already have the preprocessing's shape are
    returned unchanged.
    """
    if tuple(pixels.shape[1:]) == preprocessing.shape:
        return pixels
    if pixels.dtype == torch.uint8:
        return torch.stack([_bytes_through(image, preprocessing) for image in pixels])
    if not pixels.is_floating_point():
        return pixels  # refused where the pixels become floats
    levels = (pixels * 255).round()
    if levels.min() >= 0 and levels.max() <= 255 and (pixels * 255 - levels).abs().max() < _OFF_LEVEL:
        return preprocess_arrays(levels.to(torch.uint8), preprocessing)  # exactly as the image files they came from
    if pixels.shape[1] == 1 and preprocessing.channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)
    return torch.stack([preprocess(image.to(torch.float32), preprocessing).clamp(0, 1) for image in pixels])


def _bytes_through(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return one image (C, H, W) after a round through Pillow, as for an image file with these pixels."""
    import numpy as np
    from PIL import Image

    grey = len(image) == 1
    stored = Image.fromarray((image[0] if grey else image.permute(1, 2, 0)).contiguous().numpy())
    found = np.array(preprocess(stored.convert("L" if preprocessing.channels == 1 else "RGB"), preprocessing))
    return torch.from_numpy(found)[None] if found.ndim == 2 else torch.from_numpy(found).permute(2, 0, 1)
