"""Read data sets from user files: a folder per class, an npz archive, or a Hugging Face image parquet."""

import json
import warnings
import zipfile
from collections.abc import Iterator
from io import BytesIO
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from audit.errors import AuditError, EnvironmentFault, UnsafeError, UsageError
from model_zoo.images.named import RawImages
from model_zoo.untrusted import check_file, printable

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_GREY = ("1", "L")
_COLOUR = ("P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
# An allow-list, because Pillow passes some formats to other programs (EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_BATCH = 128
_MAX_PIXELS = 1 << 24
_MAX_CLASSES = 1_000_000
_MAX_ROWS = 20_000_000
_MAX_COMPRESSION = 100  # images never compress by this factor
_SLACK = 1_000_000


def read_folder(path: Path, count: int | None) -> RawImages:
    """Return the images of a folder with one subfolder per class, alternating between the classes.

    Raises EnvironmentFault for a folder without such images, UsageError for images of unequal size.
    """
    if not path.is_dir():
        raise EnvironmentFault(f"folder {path} does not exist; give a folder with one subfolder per class")
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    listed = [[f for f in sorted(folder.iterdir()) if f.suffix.lower() in _SUFFIXES] for folder in folders]
    files = [(file, label) for label, members in enumerate(listed) for file in members]
    if not files:
        raise EnvironmentFault(f"folder {path} has no images in class subfolders ({', '.join(_SUFFIXES)})")
    position = {file: index for index, (file, _) in enumerate(files)}
    turns = ((file, label) for turn in zip_longest(*listed) for label, file in enumerate(turn) if file is not None)
    chosen = list(islice(turns, count))
    pixels = _stack([(str(file), _decode(str(file), file)) for file, _ in chosen])
    labels = torch.tensor([label for _, label in chosen])
    classes = tuple(folder.name for folder in folders)
    return RawImages(pixels, labels, classes, tuple(position[file] for file, _ in chosen), len(files))


def read_npz(path: Path, count: int | None) -> RawImages:
    """Return the arrays `images` (NCHW, NHWC or NHW; uint8 or float) and `labels` (N,) of an npz archive.

    An optional string array `classes` names the classes. Raises EnvironmentFault for an unreadable file, UsageError
    for missing or mismatched arrays.
    """
    arrays = _npz_arrays(path)
    images, labels = _channels_first(arrays["images"], path), arrays["labels"]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu" or not len(labels):
        message = f"labels of {path} are {labels.dtype} {labels.shape} for {len(images)} images"
        raise UsageError(f"{message}; store one integer per image")
    whole = RawImages(
        pixels=torch.from_numpy(np.ascontiguousarray(images)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=tuple(map(str, arrays["classes"]))
        if "classes" in arrays
        else _numbered_classes(int(labels.max()), path),
        indices=tuple(range(len(labels))),
        available=len(labels),
    )
    return whole.first(count)


def _npz_arrays(path: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    _check_exists(path, "npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        _check_unpacked_size(unpacked, path)
        with np.load(path, allow_pickle=False) as arrays_of:
            arrays = {name: arrays_of[name] for name in ("images", "labels", "classes") if name in arrays_of}
            names = list(arrays_of)
    except AuditError:
        raise
    except Exception as error:  # zip, zlib, numpy and its header parser raise different types
        message = f"{path} is not an npz archive of plain arrays ({_reason(error)})"
        raise EnvironmentFault(f"{message}; write it with numpy.savez(path, images=..., labels=...)") from error
    if "images" not in arrays or "labels" not in arrays:
        raise UsageError(
            f"{path} needs the arrays 'images' and 'labels'; it has {', '.join(map(printable, names)) or 'none'}"
        )
    return arrays


def _channels_first(images: "np.ndarray[Any, Any]", path: Path) -> "np.ndarray[Any, Any]":
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        message = f"images of {path} have the shape {images.shape}"
        raise UsageError(f"{message}; store (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, or (N, H, W)")
    return images if first else images.transpose(0, 3, 1, 2)


def read_parquet(path: Path, count: int | None) -> RawImages:
    """Return the first rows of a parquet file in the Hugging Face layout: a struct with `bytes`, and `label`.

    Only the requested rows are read. Raises EnvironmentFault for an unreadable file, UsageError for missing columns
    or images of unequal size.
    """
    # Imported here because pyarrow takes half a second that other data sets do not need.
    import pyarrow.parquet

    _check_exists(path, "parquet file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            image_column, label_column = _find_columns(file.schema_arrow.names, path)
            _check_parquet_size(file.metadata, path)
            rows = list(islice(_rows(file, image_column, label_column, path), count))
            classes = _class_names(file.schema_arrow.metadata or {}, label_column)
            if not classes:
                batches = file.iter_batches(columns=[label_column])
                classes = _numbered_classes(
                    max((max(batch.column(0).to_pylist()) for batch in batches), default=0), path
                )
            available = file.metadata.num_rows
    except AuditError:
        raise
    except Exception as error:  # pyarrow and Python raise different types for every damaged part
        message = f"{path} cannot be read as a Hugging Face image parquet ({_reason(error)})"
        raise EnvironmentFault(f"{message}; fetch it again") from error
    if not rows:
        raise UsageError(f"{path} has no rows; give a file with images")
    decoded = [
        (f"row {index} of {path}", _decode(f"row {index} of {path}", data)) for index, (data, _) in enumerate(rows)
    ]
    numbers = torch.tensor([label for _, label in rows])
    return RawImages(_stack(decoded), numbers, classes, tuple(range(len(rows))), available)


def _find_columns(names: list[str], path: Path) -> tuple[str, str]:
    image = next((name for name in ("image", "img") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label") if name in names), None)
    if image is None or label is None:
        raise UsageError(
            f"{path} needs a column 'image' or 'img' and a column 'label'; it has {', '.join(map(printable, names))}"
        )
    return image, label


def _check_parquet_size(metadata: Any, path: Path) -> None:
    """Raise UnsafeError for more rows than any data set has, or an implausible unpacked size."""
    if metadata.num_rows > _MAX_ROWS:
        raise UnsafeError(f"{path} claims {metadata.num_rows} rows, more than {_MAX_ROWS}; it is not read")
    _check_unpacked_size(
        sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), path
    )


def _check_unpacked_size(unpacked: int, path: Path) -> None:
    """Raise UnsafeError for a file that unpacks to more than a hundred times its size."""
    size = check_file(path)
    if unpacked > _MAX_COMPRESSION * size + _SLACK:
        message = f"{path} has {size} bytes and unpacks to {unpacked}"
        raise UnsafeError(f"{message}, more than {_MAX_COMPRESSION} times as many; it is not read")


def _rows(file: Any, image: str, label: str, path: Path) -> Iterator[tuple[bytes, int]]:
    unpacked = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=[image, label]):
        unpacked += batch.nbytes  # an image repeated in every row takes no space in the file
        _check_unpacked_size(unpacked, path)
        images, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
        yield from ((item["bytes"], number) for item, number in zip(images, labels, strict=True))


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the `datasets` library writes into the schema, () without them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()


def _decode(origin: str, source: Path | bytes | None) -> Tensor:
    """Return one image as uint8 (C, H, W): one channel for grey images, three for others."""
    try:
        if isinstance(source, Path):
            check_file(source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at its own limit; ours raises
            mode, pixels = _pixels(origin, BytesIO(source) if isinstance(source, bytes) else source)
    except AuditError:
        raise
    except Image.DecompressionBombError as error:  # raised by Pillow before it reports the size
        raise UnsafeError(f"{origin} claims more than {_MAX_PIXELS} pixels; it is not decoded") from error
    except Exception as error:  # the decoders raise different types
        message = f"{origin} cannot be decoded as an image ({_reason(error)}); remove or replace it"
        raise EnvironmentFault(message) from error
    if mode not in (*_GREY, *_COLOUR):
        raise UsageError(f"{origin} has the pixel format {mode}; store 8-bit grey or colour images")
    return torch.from_numpy(pixels)[None] if pixels.ndim == 2 else torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(origin: str, source: Any) -> tuple[str, "np.ndarray[Any, Any]"]:
    with Image.open(source, formats=_FORMATS) as image:
        width, height = image.size
        if width * height > _MAX_PIXELS:
            raise UnsafeError(f"{origin} claims {width}x{height} pixels, more than {_MAX_PIXELS}; it is not decoded")
        return image.mode, np.array(image.convert("L" if image.mode in _GREY else "RGB"))


def _stack(decoded: list[tuple[str, Tensor]]) -> Tensor:
    origin, first = decoded[0]
    for other, image in decoded:
        if image.shape != first.shape:
            sizes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (first, image))
            raise UsageError(f"{origin} and {other} are {sizes}; all images must share channels and size")
    return torch.stack([image for _, image in decoded])


def _numbered_classes(highest: int, path: Path) -> tuple[str, ...]:
    if highest >= _MAX_CLASSES:
        raise UsageError(f"labels of {path} reach {highest}; number the classes from 0, below {_MAX_CLASSES}")
    return tuple(str(number) for number in range(highest + 1))


def _check_exists(path: Path, kind: str) -> None:
    if not path.exists():
        raise EnvironmentFault(f"{kind} {path} does not exist; give the path of a file")
    check_file(path)


def _reason(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 160).rstrip(".")
