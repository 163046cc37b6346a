"""Images by reference: `load_images("digits", ImageRequest(count=500))`.

They are always float32 in [0, 1] and in the same order. A subset is the first `count` images of the set's own
order, so a smaller request is a part of a larger one.
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
from model_zoo.prepared import LoadedModel, check_outputs

NAMED = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "svhn")
PREFIXED: dict[str, Callable[[Path, int | None], RawImages]] = {
    "folder": read_folder,
    "npz": read_npz,
    "parquet": read_parquet,
}
DATASETS = (*NAMED, *(f"{prefix}:<path>" for prefix in PREFIXED))
SPLITS = ("train", "test")
_FAR_ABOVE = 1.5
_FAR_BELOW = -0.1


@dataclass(frozen=True)
class ImageRequest:
    """Which images of a set: how many (None for all), of which split, from or to which folder.

    `balanced` takes as many of each class instead of the first ones.
    """

    count: int | None = None
    split: str = "test"
    data_dir: Path = Path("data")
    offline: bool = False
    balanced: bool = False


@dataclass(frozen=True, eq=False)  # tensors have no single truth value; compare `sha256`
class ImageSet:
    """Images float32 (M, C, H, W) in [0, 1] with labels int64 (M,).

    `indices` says where each image stands in the set's own order; `sha256` is of pixels, labels and indices.
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

    Raises UnknownNameError for a set or split that does not exist, UsageError for a count or images that are not
    legal, EnvironmentFault for a set that is not there and cannot be fetched.
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
    """Return what `load_images` does, or all images of a set that has fewer than asked for; raises what it raises."""
    try:
        return load_images(ref, request)
    except UsageError:
        return load_images(ref, replace(request, count=None))


def check_fit(model: LoadedModel, images: ImageSet) -> None:
    """Check that images can be given to a model.

    Raises MismatchError where channels, size or classes differ, UsageError for pixels outside [0, 1].
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
        raise MismatchError(f"{message}; audit it saved with a head, or bound every head on it: rvaudit certify")
    if classes != model.num_classes:
        raise MismatchError(f"{name} has {model.num_classes} outputs, data set {images.ref} has {classes} classes")
    if model.image_shape is None:
        check_outputs(model.network, model.num_classes, (shape[0], shape[1], shape[2]), name)


def _read(ref: str, request: ImageRequest) -> RawImages:
    prefix, colon, path = ref.partition(":")
    if colon and prefix in PREFIXED:
        if not path:
            raise UsageError(f"data set {ref!r} names no path; write {prefix}:<path>")
        if request.split != "test":
            message = f"{ref} has no splits, so {request.split!r} cannot be taken from it"
            raise UsageError(f"{message}; keep each split in a {prefix} of its own and name that")
        return PREFIXED[prefix](Path(path), request.count)
    if ref not in NAMED:
        raise UnknownNameError("data set", ref, DATASETS)
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
    """Raise UsageError for pixels outside [0, 1], and say which mistake they look like."""
    if not torch.isfinite(images).all():
        raise UsageError(f"the images of {ref} hold values that are not finite; store uint8, or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high <= 1:
        return
    if low < _FAR_BELOW:
        advice = "they look normalised already: undo that, for the normalisation belongs inside the network"
    elif high > _FAR_ABOVE:
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
