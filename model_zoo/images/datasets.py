"""Load images by reference: `load_images("digits", ImageRequest(count=500))`.

Images are float32 in [0, 1] and in a fixed order. A subset is the first `count` images in that order, so a smaller
request is a prefix of a larger one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from audit.errors import MismatchError, UnknownNameError, UsageError
from model_zoo.images.files import read_folder, read_npz, read_parquet
from model_zoo.images.named import RawImages, read_digits, read_torchvision
from model_zoo.lookup import DATASET_FORMS, NAMED_DATASETS
from model_zoo.model_types import LoadedModel, check_outputs

_READERS: dict[str, Callable[[Path, int | None], RawImages]] = {
    "folder": read_folder,
    "npz": read_npz,
    "parquet": read_parquet,
}
SPLITS = ("train", "test")
_UNSCALED_ABOVE = 1.5
_NORMALISED_BELOW = -0.1


@dataclass(frozen=True)
class ImageRequest:
    """Which images of a data set to load: how many (None: all), the split, and the folder of named data sets.

    `balanced` takes equally many images of each class instead of the first `count`.
    """

    count: int | None = None
    split: str = "test"
    data_dir: Path = Path("data")
    offline: bool = False
    balanced: bool = False


@dataclass(frozen=True, eq=False)  # tensors have no single truth value: compare `sha256` instead
class ImageSet:
    """Images float32 (M, C, H, W) in [0, 1] with labels int64 (M,).

    `indices` are the positions of the images in the data set's order; `sha256` covers pixels, labels and indices.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    ref: str
    split: str
    indices: tuple[int, ...]
    sha256: str


def load_images(ref: str, request: ImageRequest | None = None) -> ImageSet:
    """Return the first images of a data set.

    Raises UnknownNameError for an unknown data set or split, UsageError for an invalid count or invalid images,
    EnvironmentFault for a data set that is missing and cannot be fetched.
    """
    request = request or ImageRequest()
    if request.split not in SPLITS:
        raise UnknownNameError("split", request.split, SPLITS)
    if request.count is not None and request.count < 1:
        raise UsageError(f"{request.count} images were asked for; ask for at least 1")
    raw = _read(ref, replace(request, count=None) if request.balanced else request)
    if request.count is not None and request.count > raw.available:
        raise UsageError(f"{request.count} images were asked for; {ref} ({request.split}) has {raw.available}")
    if request.balanced and request.count is not None:
        raw = raw.balanced(request.count)
    images = _unit_floats(raw.pixels, ref)
    labels = raw.labels.to(torch.int64)
    _check_labels(labels, len(raw.classes), ref)
    return ImageSet(
        images=images,
        labels=labels,
        classes=raw.classes,
        ref=ref,
        split=request.split,
        indices=raw.indices,
        sha256=_digest(images, labels, raw.indices),
    )


def load_at_most(ref: str, request: ImageRequest) -> ImageSet:
    """Return `load_images(ref, request)`, or all images of a data set with fewer than `count`; raises its errors."""
    try:
        return load_images(ref, request)
    except UsageError:
        return load_images(ref, replace(request, count=None))


def check_fit(model: LoadedModel, images: ImageSet) -> None:
    """Check that a model accepts images.

    Raises MismatchError where channels, image size or number of classes differ, UsageError for pixels outside [0, 1].
    """
    _check_range(images.images, images.ref)
    shape = tuple(images.images.shape[1:])
    name, classes = model.entry.name, len(images.classes)
    if model.image_shape is not None and shape != model.image_shape:
        wanted, found = ("x".join(map(str, size)) for size in (model.image_shape, shape))
        unequal = "channels" if shape[0] != model.image_shape[0] else "size"
        raise MismatchError(f"{name} takes images of {wanted}, {images.ref} has {found}: the {unequal} differ")
    if model.num_classes == 0:
        message = f"{name} has no classifier, so its accuracy on {images.ref} is not defined"
        raise MismatchError(f"{message}; audit it with a head, or bound the accuracy of every head: rvaudit certify")
    if classes != model.num_classes:
        raise MismatchError(f"{name} has {model.num_classes} outputs, data set {images.ref} has {classes} classes")
    if model.image_shape is None:
        check_outputs(model.network, model.num_classes, (shape[0], shape[1], shape[2]), name)


def _read(ref: str, request: ImageRequest) -> RawImages:
    prefix, colon, path = ref.partition(":")
    if colon and prefix in _READERS:
        if not path:
            raise UsageError(f"data set {ref!r} names no path; write {prefix}:<path>")
        if request.split != "test":
            message = f"{ref} has no splits, so {request.split!r} cannot be taken from it"
            raise UsageError(f"{message}; store each split in its own {prefix} and name that")
        return _READERS[prefix](Path(path), request.count)
    if ref not in NAMED_DATASETS:
        raise UnknownNameError("data set", ref, DATASET_FORMS)
    if ref == "digits":
        return read_digits(request.split).first(request.count)
    whole = read_torchvision(ref, request.split, request.data_dir, offline=request.offline)
    return whole.first(request.count)


def _unit_floats(pixels: Tensor, ref: str) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32) / 255
    if not pixels.is_floating_point():
        kind = str(pixels.dtype).removeprefix("torch.")
        raise UsageError(f"the images of {ref} are {kind}; store uint8, or floats in [0, 1]")
    images = pixels.to(torch.float32)
    _check_range(images, ref)
    return images


def _check_range(images: Tensor, ref: str) -> None:
    """Raise UsageError for pixels outside [0, 1], naming the likely cause."""
    if not torch.isfinite(images).all():
        raise UsageError(f"the images of {ref} hold values that are not finite; store uint8, or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high <= 1:
        return
    if low < _NORMALISED_BELOW:
        advice = "they seem to be normalised: undo that, because normalisation belongs inside the network"
    elif high > _UNSCALED_ABOVE:
        advice = "float images with max > 1.5: divide by 255"
    else:
        advice = "clip them"
    raise UsageError(f"the images of {ref} range from {low:.3g} to {high:.3g} instead of [0, 1]; {advice}")


def _check_labels(labels: Tensor, classes: int, ref: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        message = f"the labels of {ref} range from {low} to {high}, its classes are 0 to {classes - 1}"
        raise UsageError(f"{message}; number the classes from 0")


def _digest(images: Tensor, labels: Tensor, indices: tuple[int, ...]) -> str:
    digest = sha256(str(tuple(images.shape)).encode())
    for tensor in (images, labels, torch.tensor(indices, dtype=torch.int64)):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
