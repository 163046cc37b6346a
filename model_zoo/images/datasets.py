"""Load images by reference: `load_images("digits", ImageRequest(count=500))`.

Images are float32 in [0, 1] and in a fixed order. A subset is the first `count` images in that order, so a smaller
request is a prefix of a larger one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audit.errors import MismatchError, UnknownNameError, UsageError
from audit.types import image_slices, standard_torch_state
from model_zoo.images.arrays import read_npy, read_npz
from model_zoo.images.classes import ClassMap, Outputs, map_classes, read_class_map
from model_zoo.images.files import read_folder
from model_zoo.images.imagenet import read_imagenet
from model_zoo.images.named import UNKNOWN_PREPROCESSING, RawImages, read_digits, read_torchvision
from model_zoo.images.pixels import check_range, preprocess_arrays, unit_floats
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.images.tables import read_parquet
from model_zoo.lookup import DATASET_FORMS, NAMED_DATASETS, split_dataset
from model_zoo.model_types import LoadedModel, check_outputs

# Readers of image files preprocess while they decode; arrays are read as they are, and preprocessed afterwards.
_DECODERS: dict[str, Callable[[Path, int | None, Preprocessing | None], RawImages]] = {
    "folder": read_folder,
    "parquet": read_parquet,
}
_ARRAYS: dict[str, Callable[[Path, int | None], RawImages]] = {"npz": read_npz, "npy": read_npy}
SPLITS = ("train", "test")


@dataclass(frozen=True)
class ImageRequest:
    """Which images of a data set to load: how many (None: all), the split, and the folder of named data sets.

    `balanced` takes equally many images of each class instead of the first `count`. With `preprocessing`, images of
    any size are resized and cropped; without, all must have one size.
    """

    count: int | None = None
    split: str = "test"
    data_dir: Path = Path("data")
    offline: bool = False
    balanced: bool = False
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True, eq=False)  # tensors have no single truth value: compare `sha256` instead
class ImageSet:
    """Images float32 (M, C, H, W) in [0, 1] with labels int64 (M,).

    `indices` are the positions of the images in the data set's order; `sha256` covers pixels, labels and indices.
    `preprocessing` is what was applied to the stored images, None for nothing. Labels number the classes of the data
    set, until `with_outputs` maps them to a network's outputs; `numbered` classes have no names.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    ref: str
    split: str
    indices: tuple[int, ...]
    sha256: str
    preprocessing: Preprocessing | None = None
    class_map: ClassMap | None = None
    numbered: bool = False

    @property
    def label_count(self) -> int:
        """The number of values that a label can have: classes, or the outputs of the network that they are mapped to.

        It is the highest such output plus one where fewer would do.
        """
        if self.class_map is None or self.class_map.restricted:
            return len(self.classes)
        return max(self.class_map.outputs) + 1

    def described(self) -> dict[str, Any]:
        """Return what was done to images and labels as JSON data; {} for nothing."""
        found: dict[str, Any] = {"preprocessing": self.preprocessing.described()} if self.preprocessing else {}
        if self.class_map and (self.class_map.by != "order" or self.class_map.restricted):
            chosen = self.class_map
            competing = "the data set's classes" if chosen.restricted else "all outputs"
            found["classes"] = {"mapped_by": chosen.by, "count": len(chosen.outputs), "competing": competing}
        return found


@standard_torch_state()
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
    raw, applied = _read(ref, replace(request, count=None) if request.balanced else request)
    if request.count is not None and request.count > raw.available:
        raise UsageError(f"{request.count} images were asked for; {ref} ({request.split}) has {raw.available}")
    if request.balanced and request.count is not None:
        raw = raw.balanced(request.count)
    images = unit_floats(raw.pixels, ref)
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
        preprocessing=applied,
        numbered=raw.numbered,
    )


def load_at_most(ref: str, request: ImageRequest) -> ImageSet:
    """Return `load_images(ref, request)`, or all images of a data set with fewer than `count`; raises its errors."""
    try:
        return load_images(ref, request)
    except UsageError:
        return load_images(ref, replace(request, count=None))


def with_outputs(images: ImageSet, outputs: Outputs, *, restrict: bool = False) -> ImageSet:
    """Return images whose labels are outputs of a network, mapped by names or by the map of the data set's reference.

    With `restrict` labels stay as they are: the network is to be reduced to the outputs of the map. Raises
    MismatchError where classes cannot be mapped.
    """
    path = split_dataset(images.ref)[1]
    if path:
        found = read_class_map(Path(path), images.classes, outputs, images.ref.partition("?")[0])
    else:
        found = map_classes(images.classes, outputs, images.ref, numbered=images.numbered)
    found = replace(found, restricted=restrict and found.outputs != tuple(range(outputs.count)))
    if found.restricted or found.outputs == tuple(range(len(images.classes))):
        return replace(images, class_map=found)
    labels = found.renumbered(images.labels)
    digest = _digest(images.images, labels, images.indices)
    return replace(images, labels=labels, sha256=digest, class_map=found)


def check_fit(model: LoadedModel, images: ImageSet) -> None:
    """Check that a model accepts images.

    Raises MismatchError where channels, image size or number of classes differ, UsageError for pixels outside [0, 1].
    """
    check_range(images.images, images.ref)
    shape = tuple(images.images.shape[1:])
    name, classes = model.entry.name, len(images.classes)
    check_shape(model, images)
    if model.num_classes == 0:
        message = f"{name} has no classifier, so its accuracy on {images.ref} is not defined"
        raise MismatchError(f"{message}; audit trains heads on it (--layer output), certify bounds every head")
    if classes != model.num_classes and images.class_map is None:
        raise MismatchError(f"{name} has {model.num_classes} outputs, data set {images.ref} has {classes} classes")
    if model.image_shape is None:
        check_outputs(model.network, model.num_classes, (shape[0], shape[1], shape[2]), name)


def check_shape(model: LoadedModel, images: ImageSet) -> None:
    """Raise MismatchError where a model takes images of another shape, if it states one."""
    shape = tuple(images.images.shape[1:])
    if model.image_shape is None or shape == model.image_shape:
        return
    wanted, found = ("x".join(map(str, size)) for size in (model.image_shape, shape))
    unequal = "channels" if shape[0] != model.image_shape[0] else "size"
    message = f"{model.entry.name} takes images of {wanted}, {images.ref} has {found}: the {unequal} differ"
    raise MismatchError(f"{message}; {UNKNOWN_PREPROCESSING}" if unequal == "size" else message)


def _read(ref: str, request: ImageRequest) -> tuple[RawImages, Preprocessing | None]:
    """Return the images of a request, and the preprocessing that changed them."""
    name, chosen = split_dataset(ref)[0], request.preprocessing
    prefix, colon, path = name.partition(":")
    if prefix == "imagenet":
        return read_imagenet(request.data_dir, path, request.split, request.count, chosen), chosen
    if colon and prefix in (*_DECODERS, *_ARRAYS):
        if not path:
            raise UsageError(f"data set {ref!r} names no path; write {prefix}:<path>")
        if request.split != "test":
            message = f"{ref} has no splits, so {request.split!r} cannot be taken from it"
            raise UsageError(f"{message}; store each split in its own {prefix} and name that")
        if prefix in _DECODERS:
            return _DECODERS[prefix](Path(path), request.count, chosen), chosen
        return _preprocessed(_ARRAYS[prefix](Path(path), request.count), chosen)
    if name not in NAMED_DATASETS:
        raise UnknownNameError("data set", name, DATASET_FORMS)
    if name == "digits":
        return _preprocessed(read_digits(request.split).first(request.count), chosen)
    whole = read_torchvision(name, request.split, request.data_dir, offline=request.offline)
    return _preprocessed(whole.first(request.count), chosen)


def _preprocessed(raw: RawImages, chosen: Preprocessing | None) -> tuple[RawImages, Preprocessing | None]:
    if chosen is None:
        return raw, None
    pixels = preprocess_arrays(raw.pixels, chosen)
    return (raw, None) if pixels is raw.pixels else (replace(raw, pixels=pixels), chosen)


def _check_labels(labels: Tensor, classes: int, ref: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        message = f"the labels of {ref} range from {low} to {high}, its classes are 0 to {classes - 1}"
        raise UsageError(f"{message}; number the classes from 0")


def _digest(images: Tensor, labels: Tensor, indices: tuple[int, ...]) -> str:
    digest = sha256(str(tuple(images.shape)).encode())
    for tensor in (images, labels, torch.tensor(indices, dtype=torch.int64)):
        for part in image_slices(tensor):
            digest.update(tensor[part].contiguous().numpy().tobytes())
    return digest.hexdigest()
