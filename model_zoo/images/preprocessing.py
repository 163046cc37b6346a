"""The way from a decoded image to the pixels that a network receives: resize and central crop. Imports no torch.

Both happen before any search, so that eps is in pixels of the image that the network receives; the normalisation is
inside the network.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import floor
from typing import Any, Literal

from audit.errors import UnknownNameError, UsageError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
# How an image is fitted into a size: by its shorter side, with distortion, whole with borders, or so as to cover it.
FITS = ("shorter", "exact", "inside", "cover")
_MAX_SIDE = 4096


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize and central crop of a decoded image, in pixels; `resize` and `crop` are empty where that step is left out.

    `fit` says what `resize` means: (side,) is the length of the `shorter` side; (height, width) is the size itself
    (`exact`), a size around the whole image (`inside`, with borders of the colour `fill` in [0, 1]), or one that the
    image covers (`cover`). Of an odd number of pixels to crop, `centre` says which side loses more: "rounded" as by
    torchvision, "floored" (the lower right) as by transformers. Raises UsageError for a size, UnknownNameError for an
    interpolation that is not legal.
    """

    resize: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    interpolation: str = "bilinear"
    fit: str = "shorter"
    channels: int = 3
    fill: tuple[float, ...] = ()
    centre: Literal["rounded", "floored"] = "rounded"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UnknownNameError("interpolation", self.interpolation, INTERPOLATIONS)
        sides = (*self.resize, *self.crop)
        if not all(1 <= side <= _MAX_SIDE for side in sides) or len(self.crop) not in (0, 2):
            raise UsageError(f"image sizes {sides} are not legal; sides are 1 to {_MAX_SIDE} pixels")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """The shape (C, H, W) of every image after this preprocessing; None where it depends on the image."""
        size = self.crop or (self.resize if self.fit == "exact" else ())
        return (self.channels, *size) if len(size) == 2 else None

    def described(self) -> dict[str, Any]:
        """Return the preprocessing as JSON data, without what is left out."""
        found: dict[str, Any] = {"resize": list(self.resize), "crop": list(self.crop), "channels": self.channels}
        if self.resize:
            found |= {"fit": self.fit, "interpolation": self.interpolation}
        if self.fill:
            found["fill"] = list(self.fill)
        if self.crop and self.centre != "rounded":
            found["centre"] = self.centre
        return {name: value for name, value in found.items() if value != []}


def from_crop_fraction(size: tuple[int, int, int], config: Mapping[str, Any]) -> Preprocessing:
    """Return timm's preprocessing for images (C, H, W), from the keys of its configurations.

    They are `crop_pct`, the share of a side that the crop keeps, `crop_mode`, `interpolation` and `mean`. Raises
    UsageError for values that are not legal.
    """
    channels, *sides = size
    fraction, mode = float(config.get("crop_pct") or 0.875), config.get("crop_mode") or "center"
    if not 0.05 <= fraction <= 20:
        raise UsageError(f"crop_pct {fraction!r} is not the share of a side that a crop keeps, such as 0.875")
    scaled = tuple(floor(side / fraction) for side in sides)
    interpolation = str(config.get("interpolation") or "bicubic")
    fill: tuple[float, ...] = ()
    fit = {"squash": "exact", "border": "inside"}.get(mode, "shorter" if scaled[0] == scaled[1] else "cover")
    if fit == "inside":
        fill = tuple(float(value) for value in config.get("mean") or (0.485, 0.456, 0.406))
    elif fit == "cover" and not _timm_keeps_interpolation():
        interpolation = "bilinear"  # whatever the configuration says
    elif fit == "shorter":
        scaled = scaled[:1]
    return Preprocessing(
        resize=scaled, crop=tuple(sides), interpolation=interpolation, fit=fit, channels=channels, fill=fill
    )


def _timm_keeps_interpolation() -> bool:
    """Return whether the installed timm resizes to sizes that are not square as the configuration says."""
    found = re.findall(r"\d+", version("timm"))
    return tuple(map(int, found[:3])) >= (1, 0, 31)


def from_options(resize: str, crop: str, interpolation: str, channels: int = 3) -> Preprocessing | None:
    """Return the preprocessing of the options of a `file:` reference; None where none is given.

    `resize` is the shorter side (`256`) or a size (`224x224`), `crop` a side or a size. Raises UsageError.
    """
    if not (resize or crop or interpolation):
        return None
    if interpolation and not resize:
        raise UsageError(f"interpolation={interpolation!r} needs resize=, the length of the shorter side in pixels")
    resized, cropped = _sides(resize, "resize"), _sides(crop, "crop")
    return Preprocessing(
        resize=resized,
        crop=cropped * 2 if len(cropped) == 1 else cropped,
        interpolation=interpolation.lower() or "bilinear",
        fit="exact" if len(resized) == 2 else "shorter",
        channels=channels,
    )


def _sides(text: str, name: str) -> tuple[int, ...]:
    parts = text.lower().split("x") if text else []
    if len(parts) > 2 or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{name}={text!r} is not a size in pixels; write {name}=224 or {name}=224x320")
    return tuple(map(int, parts))
