"""Labels of user files as integers: read exactly, or refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audit.errors import UsageError
from model_zoo.untrusted import printable

_MAX_CLASSES = 1_000_000


def integer_labels(values: "Sequence[Any] | np.ndarray[Any, Any]", origin: str) -> Tensor:
    """Return labels as int64 (N,); whole numbers stored as floats and lists of one label are accepted.

    Raises UsageError, naming the first label that is not one whole number.
    """
    found = []
    for row, value in enumerate(values.tolist() if isinstance(values, np.ndarray) else values):
        alone = value
        while isinstance(alone, list | tuple) and len(alone) == 1:
            alone = alone[0]
        whole = isinstance(alone, int | np.integer) or (isinstance(alone, float) and alone.is_integer())
        if not whole or abs(int(alone)) >= 1 << 63:
            shown = printable(repr(value), 40)
            raise UsageError(f"label {shown} of row {row} of {origin} is not a whole number; store one class an image")
        found.append(int(alone))
    return torch.tensor(found, dtype=torch.int64)


def numbered_classes(labels: Tensor, origin: str) -> tuple[str, ...]:
    """Return the class names `0`, `1`, ... for labels (N,) without names, of a whole data set.

    Raises UsageError for labels that count from 1, and for implausibly many classes.
    """
    if not len(labels):
        return ()
    low, high = int(labels.min()), int(labels.max())
    if high >= _MAX_CLASSES:
        raise UsageError(f"labels of {origin} reach {high}; number the classes from 0, below {_MAX_CLASSES}")
    if low == 1 and high > 1 and len(labels.unique()) == high:
        message = f"the labels of {origin} range from 1 to {high}, which counts the classes from 1"
        raise UsageError(f"{message}; number the classes from 0, or store the names of all classes, class 0 included")
    return tuple(str(number) for number in range(high + 1))
