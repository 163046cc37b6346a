"""Training that may be stopped at any moment: all that decides what comes next, in one file.

A run that is killed and started again ends in the weights of one that was left alone, bit for bit on the CPU.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from audit.errors import IntegrityError, UsageError
from audit.storage import digest, write_atomically


class Stateful(Protocol):
    """A module, an optimiser or a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides what it does next."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take up where a state left off."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training run is made of, and the file it is kept in; no file where `path` is None.

    `identity` is everything that decides the run's result, as plain values: a file of another run is refused.
    `tensors` are state beside weights, such as remembered perturbations; they are restored in place.
    """

    path: Path | None
    identity: Mapping[str, Any]
    parts: Mapping[str, Stateful]
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def restore(self) -> int:
        """Take up the state of the file and return how far it got; 0 where there is no file.

        Raises UsageError for the file of another run, IntegrityError for one that cannot be read.
        """
        if self.path is None or not self.path.exists():
            return 0
        state = _read(self.path)
        if state.get("identity") != digest(dict(self.identity)):
            raise UsageError(f"{self.path} is the checkpoint of another run: name another file, or delete this one")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        return int(state["done"])

    def save(self, done: int) -> None:
        """Write the state after `done` epochs or steps: the old file is whole until the new one is.

        Raises EnvironmentFault where the file cannot be written.
        """
        if self.path is None:
            return
        state = {
            "identity": digest(dict(self.identity)),
            "done": done,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "tensors": dict(self.tensors),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.path, buffer.getvalue())

    def clear(self) -> None:
        """Delete the file: the run is finished and its result is elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file fails in half a dozen ways
        raise IntegrityError(f"{path} is not a whole checkpoint ({error}): delete it to start again") from error
    return state
