"""Rehearse how a network loads a state dict by its own code, before anything is copied into it."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from model_zoo.untrusted import printable
from model_zoo.weights.contents import Renamed


class StateDict(dict[str, Any]):
    """A state dict with the versions of modules that torch looks for in its attribute `_metadata`."""

    _metadata: dict[str, dict[str, object]]


@dataclass(frozen=True)
class Rehearsal:
    """What loading a state dict would do: the tensor that each parameter and buffer gets, names without a tensor,
    names without a place, and the error of the network's own loading code ('' where there is none).
    """

    filled: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    error: str


class _Recorder(TorchFunctionMode):
    """Record what is copied into the tensors of a network instead of copying it."""

    def __init__(self, tensors: Mapping[int, str]) -> None:
        super().__init__()
        self.tensors = tensors
        self.filled: dict[str, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and id(args[0]) in self.tensors:
            self.filled[self.tensors[id(args[0])]] = args[1]
            return args[0]
        return func(*args, **(kwargs or {}))


def named_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a network's state dict that have a shape, by name; extra state of modules is left out."""
    state = network.state_dict().items()
    return {name: value for name, value in state if isinstance(value, Tensor) and not is_lazy(value)}


def rehearse(network: nn.Module, renamed: Renamed) -> Rehearsal:
    """Let a network load a state dict by its own code and hooks, without copying a value.

    Modules that change themselves to fit a state dict are changed.
    """
    own = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    with _Recorder(own) as recorder:
        missing, unexpected, error = _load(network, state_dict_of(renamed))
    tied = {id(tensor) for name, tensor in _all_parameters(network) if name in recorder.filled}
    doubles = {name for name, tensor in _all_parameters(network) if id(tensor) in tied}
    missing = tuple(name for name in missing if name not in doubles)
    return Rehearsal(recorder.filled, missing, unexpected, error)


def load(network: nn.Module, renamed: Renamed) -> str:
    """Let a network load a state dict by its own code; return the error of that code, '' where there is none."""
    return _load(network, state_dict_of(renamed))[2]


def state_dict_of(renamed: Renamed) -> StateDict:
    """Return the tensors, extra state and versions of a checkpoint as a state dict of torch."""
    state = StateDict({**renamed.tensors, **renamed.extra})
    if renamed.metadata is not None:
        # a copy, because torch writes into it
        state._metadata = {path: dict(value) for path, value in renamed.metadata.items()}
    return state


def _load(network: nn.Module, state: StateDict) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Load a state dict without strictness; return names that are missing and unexpected, and the error raised."""
    missing: list[str] = []
    unexpected: list[str] = []

    def note(_: nn.Module, keys: Any) -> None:
        missing.extend(keys.missing_keys)
        unexpected.extend(keys.unexpected_keys)

    handle = network.register_load_state_dict_post_hook(note)
    error = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the age of a file, which the user cannot act on
            network.load_state_dict(state, strict=False)
    except Exception as raised:  # modules of users load themselves and may raise anything
        lines = [line.strip() for line in str(raised).strip().splitlines()] or [type(raised).__name__]
        error = printable(lines[1] if lines[0].startswith("Error(s) in loading") and lines[1:] else lines[0], 200)
    finally:
        handle.remove()
    return tuple(missing), tuple(unexpected), error


def _all_parameters(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Yield every name of every parameter and buffer, tied ones under each of their names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)
