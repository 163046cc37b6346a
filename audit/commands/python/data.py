"""Read labelled images from what Python code holds: tensors, arrays, data sets, data loaders."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.errors import MismatchError, UsageError
from audit.types import Images, Labels, as_images, as_labels

_IMAGES = ("images", "image", "pixel_values", "img", "x")
_LABELS = ("labels", "label", "fine_label", "y")
_CHANNELS = (1, 3, 4)
_LEGAL = "images and labels, a pair of them, a Dataset, a DataLoader, or a data set of model_zoo.load_images"


def read_data(data: object, labels: object = None, count: int | None = None) -> tuple[Images, Labels]:
    """Return images (N, C, H, W) float32 in [0, 1] and labels (N,) int64, the first `count` where it is given.

    Bytes are divided by 255, and pictures of PIL become (C, H, W). A Dataset is read from its start; of a DataLoader,
    as many batches as are needed. Raises UsageError for data of another kind, MismatchError for images of several
    sizes, with channels last, or of no numbers.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise UsageError(f"count {count!r} is not a number of images: write a whole number from 1")
    given = _images_of(data, count) if labels is None else (data, labels)
    found = _unit(as_images(given[0])), as_labels(given[1])
    if count is not None and len(found[0]) < count:
        raise UsageError(f"{count} images were asked for, the data has {len(found[0])}")
    return (found[0], found[1]) if count is None else (found[0][:count], found[1][:count])


def _images_of(data: object, count: int | None) -> tuple[object, object]:
    """Return images and labels of data that holds both; raises UsageError."""
    if isinstance(data, Tensor | np.ndarray):
        raise UsageError("labels are missing: audit_model(model, images, labels, ...)")
    if isinstance(data, Mapping):
        return _named(data)
    if hasattr(data, "images") and hasattr(data, "labels"):
        return data.images, data.labels
    if isinstance(data, list | tuple):
        if len(data) != 2:
            raise UsageError(f"data is a {type(data).__name__} of {len(data)} values: write a pair (images, labels)")
        return data[0], data[1]
    items = _items(data)
    batched = hasattr(data, "batch_size") and data.batch_size is not None
    return _joined(items, count, batched=batched)


def _items(data: object) -> Iterator[Any]:
    """Yield the items of a Dataset, or the batches of a DataLoader."""
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[number] for number in range(len(data)))
    if isinstance(data, Iterable):
        return iter(data)
    raise UsageError(f"data is a {type(data).__name__}: write {_LEGAL}")


def _joined(items: Iterator[Any], count: int | None, *, batched: bool) -> tuple[object, object]:
    """Return all images and labels of items or batches, at most `count` and what a last batch has beyond it."""
    images, labels, seen = list[Tensor](), list[Tensor](), 0
    for item in items if batched else islice(items, count):
        image, label = _pair(item)
        pixels = _as_tensor(image) if batched else _as_tensor(image)[None]
        images.append(pixels)
        labels.append(as_labels(label if batched else [int(label)]))
        seen += len(pixels)
        if count is not None and seen >= count:
            break
    if not images:
        raise UsageError("the data set holds no images")
    shapes = sorted({tuple(each.shape[1:]) for each in images})
    if len(shapes) > 1:
        raise MismatchError(f"images have several shapes, such as {shapes[0]} and {shapes[1]}: resize them first")
    return torch.cat(images), torch.cat(labels)


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        return _named(item)
    if isinstance(item, list | tuple) and len(item) >= 2:
        return item[0], item[1]
    raise UsageError(f"an item of the data is a {type(item).__name__}, not a pair of image and label")


def _named(item: Mapping[Any, Any]) -> tuple[Any, Any]:
    for names in (_IMAGES, _LABELS):
        if not any(name in item for name in names):
            keys = ", ".join(map(str, item)) or "no key"
            raise UsageError(f"data has {keys}; {names[1]}s are looked for under {', '.join(names)}")
    return next(item[n] for n in _IMAGES if n in item), next(item[n] for n in _LABELS if n in item)


def _as_tensor(image: Any) -> Tensor:
    """Return an image or a batch as float32; a picture of PIL as (C, H, W)."""
    if hasattr(image, "convert") and hasattr(image, "mode"):
        picture = np.array(image)
        image = picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)
    return _unit(as_images(image), check=False)


def _unit(images: Tensor, *, check: bool = True) -> Tensor:
    """Return images as floats, bytes divided by 255; raises MismatchError where the channels come last."""
    if check and images.dim() == 4 and images.shape[3] in _CHANNELS and images.shape[1] not in _CHANNELS:
        shape, how = tuple(images.shape), "transpose(0, 3, 1, 2)"
        raise MismatchError(f"images of the shape {shape} have their channels last: write images.{how}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float() if images.is_floating_point() else images
