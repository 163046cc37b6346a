"""Work in batches that shrink where there is not enough memory, and say so."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from audit.errors import EnvironmentFault

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


class MemoryWarning(UserWarning):
    """A batch did not fit into memory, and smaller ones are used."""


class Batches:
    """How many entries go through a function at once: halved, for good and with a warning, where memory runs out."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return a function's results (N, ...) on tensors of one length N > 0.

        Raises EnvironmentFault where a single entry is already too many.
        """
        results, done = [], 0
        while done < len(tensors[0]):
            try:
                results.append(function(*(tensor[done : done + self.size] for tensor in tensors)))
            except RuntimeError as error:
                if not any(sign in str(error) for sign in _SIGNS):
                    raise
                self._halve(len(tensors[0]) - done)
            else:
                done += self.size
        return torch.cat(results)

    def _halve(self, most: int) -> None:
        tried = min(self.size, most)
        if tried == 1:
            raise EnvironmentFault("there is not enough memory for a single image through this network")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = (tried + 1) // 2
        message = f"not enough memory for {tried} images at once: going on with {self.size}"
        warnings.warn(message, MemoryWarning, stacklevel=4)
