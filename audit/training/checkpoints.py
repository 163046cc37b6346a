"""Training checkpoints: the complete state of a run in one file.

A run that is killed and resumed gives the weights of an uninterrupted one, bit for bit on the CPU.
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
    """A module, an optimiser or a learning rate schedule."""

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore a state."""


@dataclass(frozen=True)
class Checkpoint:
    """The stateful parts of a training run, and the file that stores them; nothing is stored if `path` is None.

    `identity` holds everything that determines the result, as plain values; a file with another identity is refused.
    `tensors` is further state, such as remembered perturbations, which is restored in place.
    """

    path: Path | None
    identity: Mapping[str, Any]
    parts: Mapping[str, Stateful]
    generators: Mapping[str, torch.Generator] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def restore(self) -> int:
        """Restore the state and return the number of epochs or steps done; 0 if there is no file.

        Raises UsageError for a file of another run, IntegrityError for a file that cannot be read.
        """
        if self.path is None or not self.path.exists():
            return 0
        state = _read(self.path)
        if state.get("identity") != digest(dict(self.identity)):
            raise UsageError(f"{self.path} is a checkpoint of another run: choose another file, or delete this one")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][name])
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        return int(state["done"])

    def save(self, done: int) -> None:
        """Write the state after `done` epochs or steps, replacing the file atomically.

        Raises EnvironmentFault if the file cannot be written.
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
        """Delete the file of a finished run."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated files raise many kinds of errors
        raise IntegrityError(f"{path} is not a complete checkpoint ({error}): delete it to start again") from error
    return state
