"""Data sets in the user's own files: a folder of classes, an npz archive, a Hugging Face image parquet."""

import json
import zipfile
from collections.abc import Iterator
from io import BytesIO
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from audit.errors import EnvironmentFault, UsageError
from model_zoo.image_sets import RawImages

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_GREY = ("1", "L")
_COLOUR = ("P", "PA", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
_BATCH = 1024


def read_folder(path: Path, count: int | None) -> RawImages:
    """Return the images of a folder with one subfolder per class, taken from the classes in turn.

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

    An array `classes` of texts names the classes. Raises EnvironmentFault for a file that cannot be read,
    UsageError for arrays that are missing or do not fit.
    """
    arrays = _npz_arrays(path)
    images, labels = _channels_first(arrays["images"], path), arrays["labels"]
    if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu" or not len(labels):
        message = f"labels of {path} are {labels.dtype} {labels.shape} for {len(images)} images"
        raise UsageError(f"{message}; store one integer per image")
    whole = RawImages(
        pixels=torch.from_numpy(np.ascontiguousarray(images)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=tuple(map(str, arrays["classes"])) if "classes" in arrays else _numbered(int(labels.max())),
        indices=tuple(range(len(labels))),
        available=len(labels),
    )
    return whole.first(count)


def _npz_arrays(path: Path) -> dict[str, "np.ndarray[Any, Any]"]:
    _check_exists(path, "npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("images", "labels", "classes") if name in archive}
            names = list(archive)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        message = f"{path} is not an npz archive of plain arrays ({_reason(error)})"
        raise EnvironmentFault(f"{message}; write it with numpy.savez(path, images=..., labels=...)") from error
    if "images" not in arrays or "labels" not in arrays:
        raise UsageError(f"{path} needs the arrays 'images' and 'labels'; it has {', '.join(names) or 'none'}")
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

    Only the rows asked for are read. Raises EnvironmentFault for a file that cannot be read, UsageError for
    columns that are missing or images of unequal size.
    """
    # Imported here because pyarrow takes half a second that other sets do not need.
    import pyarrow
    import pyarrow.parquet

    _check_exists(path, "parquet file")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            image_column, label_column = _columns(file.schema_arrow.names, path)
            rows = list(islice(_rows(file, image_column, label_column), count))
            classes = _class_names(file.schema_arrow.metadata or {}, label_column)
            if not classes:
                labels = file.read(columns=[label_column]).column(0).to_pylist()
                classes = _numbered(max(labels, default=0))
            available = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, TypeError, AttributeError) as error:
        message = f"{path} cannot be read as a Hugging Face image parquet ({_reason(error)})"
        raise EnvironmentFault(f"{message}; fetch it again") from error
    if not rows:
        raise UsageError(f"{path} has no rows; give a file with images")
    decoded = [
        (f"row {index} of {path}", _decode(f"row {index} of {path}", data)) for index, (data, _) in enumerate(rows)
    ]
    numbers = torch.tensor([label for _, label in rows])
    return RawImages(_stack(decoded), numbers, classes, tuple(range(len(rows))), available)


def _columns(names: list[str], path: Path) -> tuple[str, str]:
    image = next((name for name in ("image", "img") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label") if name in names), None)
    if image is None or label is None:
        raise UsageError(f"{path} needs a column 'image' or 'img' and a column 'label'; it has {', '.join(names)}")
    return image, label


def _rows(file: Any, image: str, label: str) -> Iterator[tuple[bytes, int]]:
    for batch in file.iter_batches(batch_size=_BATCH, columns=[image, label]):
        images, labels = batch.column(image).to_pylist(), batch.column(label).to_pylist()
        yield from ((item["bytes"], number) for item, number in zip(images, labels, strict=True))


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the `datasets` library writes into the schema, () where it did not."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()


def _decode(origin: str, source: Path | bytes | None) -> Tensor:
    """Return one image as uint8 (C, H, W): one channel for grey images, three for all others."""
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:  # type: ignore[arg-type]
            mode = image.mode
            pixels = np.array(image.convert("L" if mode in _GREY else "RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, AttributeError, TypeError) as error:
        message = f"{origin} cannot be decoded as an image ({_reason(error)}); remove or replace it"
        raise EnvironmentFault(message) from error
    if mode not in (*_GREY, *_COLOUR):
        raise UsageError(f"{origin} has the pixel format {mode}; store 8-bit grey or colour images")
    return torch.from_numpy(pixels)[None] if pixels.ndim == 2 else torch.from_numpy(pixels).permute(2, 0, 1)


def _stack(decoded: list[tuple[str, Tensor]]) -> Tensor:
    origin, first = decoded[0]
    for other, image in decoded:
        if image.shape != first.shape:
            sizes = " and ".join("x".join(map(str, tensor.shape)) for tensor in (first, image))
            raise UsageError(f"{origin} and {other} are {sizes}; all images must share channels and size")
    return torch.stack([image for _, image in decoded])


def _numbered(highest: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(highest + 1))


def _check_exists(path: Path, kind: str) -> None:
    if not path.is_file():
        raise EnvironmentFault(f"{kind} {path} does not exist; give the path of a file")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
