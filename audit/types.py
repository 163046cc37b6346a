"""Named tensor types with their shapes, the interfaces of encoders and objectives, and what they assume of torch."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from audit.errors import MismatchError

Images = Tensor
"""(N, C, H, W), float32 in [0, 1]."""

Features = Tensor
"""(N, D), float32."""

Scores = Tensor
"""(N, N), entry [i, j] = T(x_i, z_j): joint pairs on the diagonal, product pairs elsewhere."""

Labels = Tensor
"""(N,), int64."""


class ObjectiveValue(NamedTuple):
    """Value of an objective for each of N images: `value` (N,) to minimise, and `done` (N,) bool.

    An image that is done needs no further steps.
    """

    value: Tensor
    done: Tensor


class Encoded(NamedTuple):
    """Output of an encoder: features (N, D), and log-probabilities (N, K) of the network, K = 0 if not available."""

    features: Tensor
    log_probs: Tensor


FeatureMap = Callable[[Images], Features]
"""Maps images (N, C, H, W) to features (N, D)."""

Encoder = Callable[[Images], Encoded]

Objective = Callable[[Images, Tensor], ObjectiveValue]
"""Maps images (N, C, H, W) and their indices (N,) in the data set to an `ObjectiveValue`."""

_DEVICES_OF_AUTOCAST = ("cpu", "cuda", "mps")
_default_type = threading.RLock()
_callers_types: list[torch.dtype] = []  # one entry for each call in progress, the caller's own type first


@contextmanager
def standard_torch_state() -> Iterator[None]:
    """Run with gradients, without inference mode and autocast, and with float32 as default type, whatever is set.

    Modes belong to the thread. The default type belongs to the process: it is float32 until the last of several calls
    at a time ends, which restores the caller's. Also a decorator, `@standard_torch_state()`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _DEVICES_OF_AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_float32_as_default())
        yield


@contextmanager
def _float32_as_default() -> Iterator[None]:
    with _default_type:
        _callers_types.append(torch.get_default_dtype())
        if _callers_types[-1] != torch.float32:
            torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        with _default_type:
            if len(_callers_types) == 1 and _callers_types[0] != torch.float32:
                torch.set_default_dtype(_callers_types[0])
            del _callers_types[-1]


def as_images(values: object) -> Images:
    """Return images (N, C, H, W) as a tensor outside any graph, from a tensor, a NumPy array or nested lists.

    Floats of arrays and lists become float32; other types are unchanged. Raises MismatchError for values that are no
    array of numbers.
    """
    if isinstance(values, Tensor):
        return _outside_graphs(values)
    array = _as_array(values, "images")
    return torch.from_numpy(array.astype(np.float32) if array.dtype.kind == "f" else array)


def as_labels(values: object) -> Labels:
    """Return labels (N,) as a tensor, from a tensor, a NumPy array or a list; integers become int64.

    Raises MismatchError for values that are no array of numbers.
    """
    labels = values if isinstance(values, Tensor) else torch.from_numpy(_as_array(values, "labels"))
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return _outside_graphs(labels.to(torch.int64) if whole else labels)


def _outside_graphs(values: Tensor) -> Tensor:
    values = values.detach() if values.requires_grad else values
    return values.clone() if values.is_inference() else values  # an inference tensor cannot enter a graph later


def _as_array(values: object, what: str) -> np.ndarray:
    try:
        array = np.array(values)  # a copy: torch cannot read arrays that are read-only or of another byte order
    except (ValueError, RuntimeError, TypeError):
        array = np.array(None)
    if array.dtype.kind not in "fiub":
        found = f"a {type(values).__name__} that is no array of numbers"
        raise MismatchError(f"{what} are {found}; legal: a tensor, a NumPy array, or nested lists of one shape")
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))


LARGE = 64 << 20
"""Bytes from which pixels lie in scratch files: 111 images of 224 pixels in float32."""


def empty_pixels(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the type and device of another; a large one on the CPU lies in a scratch file.

    There, the system may write it to the disk, so that memory does not grow with the number of images.
    """
    from audit.storage import scratch_memory

    size = prod(shape) * like.element_size()
    memory = scratch_memory(size) if like.device.type == "cpu" and size >= LARGE else None
    return like.new_empty(*shape) if memory is None else torch.frombuffer(memory, dtype=like.dtype).view(*shape)


def is_large(images: Tensor) -> bool:
    """Return whether images (N, C, H, W) take so much memory that copies of them lie in scratch files."""
    return images.element_size() * images.numel() >= LARGE


def copied_pixels(images: Tensor) -> Tensor:
    """Return a copy of images (N, C, H, W), as `empty_pixels`."""
    if not is_large(images):
        return images.clone()
    copy = empty_pixels(images.shape, images)
    for part in image_slices(images):
        copy[part] = images[part]
    return copy


def selected_pixels(images: Tensor, index: Tensor) -> Tensor:
    """Return images (N, C, H, W) of an index (M,) or a mask (N,), as `empty_pixels`."""
    places = index.nonzero().flatten() if index.dtype == torch.bool else index
    if not is_large(images):
        return images[places]
    found = empty_pixels((len(places), *images.shape[1:]), images)
    for part in image_slices(found):
        found[part] = images[places[part]]
    return found


def image_slices(images: Tensor, count: int = 0) -> Iterator[slice]:
    """Yield the slices of at most `count` consecutive images (N, C, H, W), or of equal parts of at most 64 MiB.

    What is done with all images then needs no more memory at a time: pages of scratch files are let go after every
    64 MiB.
    """
    passed = 0
    if not count:
        count = -(-len(images) // max(1, -(-len(images) // _in_a_part(images)))) or 1
    for first in range(0, len(images), count):
        yield slice(first, first + count)
        passed = relieved(passed + count, images)


def _in_a_part(images: Tensor) -> int:
    return max(1, LARGE // max(1, images[:1].numel() * images.element_size()))


def relieved(passed: int, images: Tensor) -> int:
    """Return how many images like these have `passed` since pages of scratch files were let go: after every 64 MiB."""
    if passed < _in_a_part(images):
        return passed
    from audit.storage import release_scratch

    release_scratch()
    return 0


def equal_pixels(images: Images, others: Images) -> bool:
    """Return whether two sets of images (N, C, H, W) have the same size and pixels."""
    if images is others or images.shape != others.shape:
        return images is others
    return all(torch.equal(images[part], others[part]) for part in image_slices(images))


def pixel_extremes(images: Tensor) -> tuple[float, float]:
    """Return the lowest and the highest value of images (N, C, H, W), N > 0; both are NaN where one is."""
    found = [(float(images[part].min()), float(images[part].max())) for part in image_slices(images)]
    lows, highs = torch.tensor(found, dtype=torch.float64).unbind(1)
    return float(lows.min()), float(highs.max())
