"""Decode one image of a user's file to 8-bit pixels, as the library that wrote the layout does."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from audit.errors import AuditError, EnvironmentFault, UnsafeError, UsageError
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.images.transforms import preprocess
from model_zoo.untrusted import check_file, reason

GREY = ("1", "L")
COLOUR = ("P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
# An allow-list, because Pillow passes some formats to other programs (EPS to Ghostscript).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MAX_PIXELS = 1 << 24


def decode(
    origin: str, source: Path | bytes | None, preprocessing: Preprocessing | None = None, *, upright: bool = True
) -> Tensor:
    """Return one image as uint8 (C, H, W): one channel for grey images, three for others, or those of `preprocessing`.

    Of an animation it is the first frame. With `upright`, the image is turned as its EXIF orientation says. Raises
    EnvironmentFault for an image that cannot be decoded, UnsafeError for more than 16 million pixels, UsageError for
    another pixel format.
    """
    try:
        if isinstance(source, Path):
            check_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at its own limit; ours raises
            pixels = _pixels(origin, BytesIO(source) if isinstance(source, bytes) else source, preprocessing, upright)
    except AuditError:
        raise
    except Image.DecompressionBombError as error:  # raised by Pillow before it reports the size
        raise UnsafeError(f"{origin} claims more than {_MAX_PIXELS} pixels; it is not decoded") from error
    except Exception as error:  # the decoders raise different types
        message = f"{origin} cannot be decoded as an image ({reason(error)}); remove or replace it"
        raise EnvironmentFault(message) from error
    return torch.from_numpy(pixels)[None] if pixels.ndim == 2 else torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(origin: str, source: Any, preprocessing: Preprocessing | None, upright: bool) -> "np.ndarray[Any, Any]":
    with Image.open(source, formats=FORMATS) as image:
        width, height = image.size
        if width * height > _MAX_PIXELS:
            raise UnsafeError(f"{origin} claims {width}x{height} pixels, more than {_MAX_PIXELS}; it is not decoded")
        if image.mode not in (*GREY, *COLOUR):
            raise UsageError(f"{origin} has the pixel format {image.mode}; store 8-bit grey or colour images")
        grey = image.mode in GREY if preprocessing is None else preprocessing.channels == 1
        turned = ImageOps.exif_transpose(image) if upright else image
        found = turned.convert("L" if grey else "RGB")
        return np.array(found if preprocessing is None else preprocess(found, preprocessing))
