"""Read the configuration of transformers: how images are made, their shape, and the names of the outputs."""

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from audit.errors import UsageError
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.model_types import ImageShape
from model_zoo.untrusted import printable

# Pillow's numbers of interpolations
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_WHOLE_ABOVE = 384  # ConvNeXt's processor distorts images of this size or more, and crops smaller ones


class Processing(NamedTuple):
    """Resize and crop of decoded images, and the normalisation of pixels in [0, 1]; () for none."""

    preprocessing: Preprocessing | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def processing_of(config: Mapping[str, Any], name: str) -> Processing:
    """Return what a preprocessor_config.json does to images; raises UsageError for values that are not legal."""
    try:
        mean, std = _normalisation(config)
        return Processing(_preprocessing(config), mean, std)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        message = f"preprocessor_config.json of {name} holds a value of the wrong kind"
        raise UsageError(f"{message}: {printable(error)}") from error


def _preprocessing(config: Mapping[str, Any]) -> Preprocessing | None:
    resizes, size = config.get("do_resize", True), config.get("size")
    crops = config.get("do_center_crop", "crop_size" in config and config.get("crop_size") is not None)
    crop = _sides(config.get("crop_size", size)) if crops else ()
    resample = _RESAMPLE[int(config.get("resample", 2))]
    if not resizes or size is None:
        return Preprocessing(crop=crop, centre="floored") if crop else None
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if "crop_pct" in config and config["crop_pct"] is not None and shortest is not None:
        return _by_crop_fraction(int(shortest), float(config["crop_pct"]), resample)
    if shortest is not None:
        return Preprocessing(resize=(int(shortest),), crop=crop, interpolation=resample, centre="floored")
    if isinstance(size, int) and crop:  # configurations before sizes had names
        return Preprocessing(resize=(size,), crop=crop, interpolation=resample, centre="floored")
    return Preprocessing(resize=_sides(size), crop=crop, interpolation=resample, fit="exact", centre="floored")


def _by_crop_fraction(side: int, fraction: float, resample: str) -> Preprocessing:
    if side >= _WHOLE_ABOVE:
        return Preprocessing(resize=(side, side), interpolation=resample, fit="exact")
    if not 0.05 <= fraction <= 20:
        raise ValueError(f"crop_pct {fraction!r}")
    return Preprocessing(resize=(int(side / fraction),), crop=(side, side), interpolation=resample, centre="floored")


def _sides(size: Any) -> tuple[int, int]:
    """Return height and width of a size: a number, a pair, or names of sides."""
    if isinstance(size, Mapping):
        both = size.get("shortest_edge")
        pair = (size.get("height", both), size.get("width", both))
    else:
        pair = (size, size) if isinstance(size, int) else tuple(size)
    return int(pair[0]), int(pair[1])


def _normalisation(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of pixels in [0, 1], with the scale of another range than [0, 1] in them."""
    scale = 255 * float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 255.0
    if config.get("do_normalize", True):
        mean = [float(value) for value in config.get("image_mean") or (0.5, 0.5, 0.5)]
        std = [float(value) for value in config.get("image_std") or (0.5, 0.5, 0.5)]
    elif abs(scale - 1) < 1e-9:
        return (), ()
    else:
        mean, std = [0.0], [1.0]
    found = tuple(value / scale for value in mean), tuple(value / scale for value in std)
    if len(mean) != len(std) or not all(map(isfinite, (*found[0], *found[1]))) or min(std) <= 0:
        raise ValueError(f"image_mean {mean}, image_std {std}")
    return found


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names in id2label in the order of outputs, () where they are none or only numbered."""
    held = config.get("id2label")
    if not isinstance(held, dict):
        return ()
    names = [held.get(str(number), held.get(number)) for number in range(len(held))]
    numbered = all(isinstance(name, str) and name.startswith("LABEL_") for name in names)
    return () if numbered or not all(isinstance(name, str) for name in names) else tuple(map(str, names))


def image_shape(preprocessing: Preprocessing | None, settings: Any) -> ImageShape | None:
    """Return the shape of images after their preprocessing, else that in the settings of a network."""
    if preprocessing is not None and preprocessing.shape is not None:
        return preprocessing.shape
    size, channels = getattr(settings, "image_size", None), int(getattr(settings, "num_channels", 3))
    if isinstance(size, int):
        return channels, size, size
    return (channels, int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None
