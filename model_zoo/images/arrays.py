"""Read data sets from NumPy files: an npz archive, or an array of images beside an array of labels (CIFAR-10-C)."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audit.errors import AuditError, EnvironmentFault, UsageError
from model_zoo.images.labels import integer_labels, numbered_classes
from model_zoo.images.named import RawImages
from model_zoo.untrusted import check_file, check_unpacked_size, printable, reason

_HARMLESS = 1 << 28  # bytes that an archive may unpack to, however small it is: black images compress a thousandfold
_LABELS = "labels.npy"

_Array = np.ndarray[Any, Any]


def read_npz(path: Path, count: int | None) -> RawImages:
    """Return the arrays `images` (NCHW, NHWC or NHW; uint8 or float) and `labels` (N,) of an npz archive.

    An optional string array `classes` names the classes. Raises EnvironmentFault for an unreadable file, UsageError
    for missing or mismatched arrays.
    """
    arrays = _npz_arrays(path)
    names = tuple(map(str, arrays["classes"])) if "classes" in arrays else None
    return _paired(arrays["images"], arrays["labels"], path, names, count)


def read_npy(path: Path, count: int | None) -> RawImages:
    """Return the images of an npy file (NCHW, NHWC or NHW; uint8 or float), with the labels in labels.npy beside it.

    This is the layout of CIFAR-10-C and CIFAR-100-C (Hendrycks & Dietterich 2019). Raises EnvironmentFault for a
    missing or unreadable file, UsageError for arrays that do not belong together.
    """
    beside = path.with_name(_LABELS)
    if path.name == _LABELS:
        raise UsageError(f"npy:{path} names the labels; name the images beside them, such as npy:{path.parent}/fog.npy")
    if not path.exists():
        raise EnvironmentFault(f"npy file {path} does not exist; give the path of an array of images")
    if not beside.exists():
        message = f"the labels of {path} are not beside it"
        raise EnvironmentFault(f"{message}; put an array of one integer per image at {beside}, as in CIFAR-10-C")
    images, labels = _npy_array(path), _npy_array(beside)
    return _paired(images, labels, path, None, count)


def _npy_array(path: Path) -> _Array:
    check_file(path)
    try:
        # mapped: a subset reads no more than its own pages
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy and its header parser raise different types
        message = f"{path} is not an npy file of a plain array ({reason(error)})"
        raise EnvironmentFault(f"{message}; write it with numpy.save(path, array)") from error


def _paired(images: _Array, labels: _Array, path: Path, names: tuple[str, ...] | None, count: int | None) -> RawImages:
    """Return the first images with their labels; raises UsageError where they do not belong together."""
    images = _channels_first(images, path)
    singles = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if singles.ndim != 1 or len(singles) != len(images) or labels.dtype.kind not in "iu" or not len(labels):
        message = f"labels of {path} are {labels.dtype} {labels.shape} for {len(images)} images"
        raise UsageError(f"{message}; store one integer per image")
    numbers = integer_labels(singles, str(path))
    whole = count is None and images.flags.writeable  # a mapped file is not writable
    return RawImages(
        pixels=torch.from_numpy(np.ascontiguousarray(images) if whole else images[:count].copy()),
        labels=numbers[:count],
        classes=names or numbered_classes(numbers, str(path)),
        indices=tuple(range(len(numbers[:count]))),
        available=len(numbers),
        numbered=not names,
    )


def _npz_arrays(path: Path) -> dict[str, _Array]:
    if not path.exists():
        raise EnvironmentFault(f"npz file {path} does not exist; give the path of a file")
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        check_unpacked_size(unpacked, path, _HARMLESS)
        with np.load(path, allow_pickle=False) as arrays_of:
            arrays = {name: arrays_of[name] for name in ("images", "labels", "classes") if name in arrays_of}
            names = list(arrays_of)
    except AuditError:
        raise
    except Exception as error:  # zip, zlib, numpy and its header parser raise different types
        message = f"{path} is not an npz archive of plain arrays ({reason(error)})"
        raise EnvironmentFault(f"{message}; write it with numpy.savez(path, images=..., labels=...)") from error
    if "images" not in arrays or "labels" not in arrays:
        raise UsageError(
            f"{path} needs the arrays 'images' and 'labels'; it has {', '.join(map(printable, names)) or 'none'}"
        )
    return arrays


def _channels_first(images: _Array, path: Path) -> _Array:
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, 3))
    if first == last:
        message = f"images of {path} have the shape {images.shape}"
        raise UsageError(f"{message}; store (N, C, H, W) or (N, H, W, C) with 1 or 3 channels, or (N, H, W)")
    return images if first else images.transpose(0, 3, 1, 2)
