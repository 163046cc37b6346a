"""Results kept for later: in memory for the next cells, and in the run folder, so that a run resumes inside a cell.

A stored result is a safetensors file: tensors, and in the header JSON that names the types of the values. Reading it
runs no code.
"""

import json
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Generic, Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from audit.errors import EnvironmentFault
from audit.storage import digest, write_atomically
from audit.types import copied_pixels, image_slices

MIN_SECONDS = 20.0  # results that took less are not kept
FOLDER, _HOUR = "partial", 3600
_TEMPORARY = re.compile(r"\.[0-9a-f]{60}\..{8}")  # as `write_atomically` names them
_Result = TypeVar("_Result")
_Key = TypeVar("_Key", bound=Hashable)
Types = Mapping[str, type]
"""The named tuples and dataclasses that a file may hold, by class name."""


def types_by_name(types: Sequence[type]) -> Types:
    """Return named tuples and dataclasses by their names."""
    return {each.__name__: each for each in types}


class Memo(Generic[_Key, _Result]):
    """Values by key, computed on first use; with `slots`, only so many are kept.

    The oldest value is dropped before a new one is computed, so that both never take memory at once.
    """

    def __init__(self, slots: int | None = None) -> None:
        self._slots = slots
        self._values: dict[_Key, _Result] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[_Result]:
        return iter(list(self._values.values()))

    def get(self, key: _Key, compute: Callable[[], _Result]) -> _Result:
        """Return the value of a key, computed if it is not there."""
        if key not in self._values:
            while self._slots is not None and len(self._values) >= self._slots:
                del self._values[next(iter(self._values))]
            self._values[key] = compute()
        return self._values[key]


class EstimateCache(Protocol):
    """Returns the estimate of a seed: stored earlier, or computed now."""

    def __call__(self, seed: int, compute: Callable[[], _Result], /) -> _Result:
        """Return the estimate of a seed."""
        ...


class IntermediateResults:
    """The intermediate results of one run folder, one file each, named by the digest of what decides it.

    Nothing is kept without a folder, or if the folder is not on this machine.
    """

    def __init__(self, folder: Path | None, device: torch.device, types: Types) -> None:
        self._run, self._device, self._types = folder, device, types

    @property
    def folder(self) -> Path | None:
        """The folder of the results; None where nothing is kept."""
        return self._run / FOLDER if self._run is not None and self._run.is_dir() else None

    def get(self, identity: Mapping[str, Any], compute: Callable[[], _Result], cell_id: str = "") -> _Result:
        """Return the result stored under an identity, else compute it, and store it if that took long.

        `identity` is everything that decides the result, as JSON data; each type of device has results of its own, so
        that a resumed run equals an undisturbed one. A result that only one cell uses carries its `cell_id`, and is
        deleted with `clear(cell_id)`.
        """
        if self.folder is None:
            return compute()
        path = self.folder / cell_id / f"{digest({**identity, 'device': self._device.type})}.safetensors"
        if path.exists():
            try:
                stored: _Result = read_result(path, self._types, self._device)
            except Exception:  # truncated, foreign or of another version: computing it again is always right
                path.unlink(missing_ok=True)
            else:
                return stored
        started = time.monotonic()
        result = compute()
        if time.monotonic() - started > MIN_SECONDS:
            # a full disk, or an estimator with result types of its own, costs time and not the result
            with suppress(EnvironmentFault, TypeError):
                write_atomically(path, file_parts(result, self._types))
        return result

    def clear(self, cell_id: str = "") -> None:
        """Delete the results that only one cell uses, or all of them."""
        if self._run is not None:
            rmtree(self._run / FOLDER / cell_id, ignore_errors=True)


def remove_stale_files(folder: Path) -> None:
    """Delete temporary files that killed writes left in a run folder more than an hour ago; younger may be in use."""
    for part in ("cells", "images", FOLDER):
        for path in (folder / part).rglob(".*"):
            with suppress(OSError):  # another process was faster, or the folder is read-only
                if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _HOUR:
                    path.unlink()


def file_parts(result: object, types: Types) -> Iterator[bytes]:
    """Yield the parts of the file of a value made of the given types, tuples, mappings, tensors and plain JSON data.

    The images of a result may be more than fit into memory a second time. Raises TypeError for a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {"__metadata__": {"part": json.dumps(_to_json(result, tensors, types))}}
    end = 0
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # every type at a multiple of its size
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _type_name(tensor), "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        rows = tensors[name].detach().reshape(1) if tensors[name].dim() == 0 else tensors[name].detach()
        for part in image_slices(rows):
            yield rows[part].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _type_name(tensor: Tensor) -> str:
    """Return the name of a tensor's type in safetensors files."""
    saved = safetensors.torch.save({"": tensor.new_empty(0).cpu()})
    name: str = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])[""]["dtype"]
    return name


def read_result(path: Path, types: Types, device: torch.device) -> Any:
    """Return the value of a file of `file_parts`; tensors that were not on the CPU go to the device.

    Raises exceptions of any kind for a damaged file.
    """
    with safe_open(os.fspath(path), framework="pt") as file:

        def from_json(tree: Any) -> Any:
            if not isinstance(tree, dict):
                return tree
            if "tensor" in tree:
                found = copied_pixels(file.get_tensor(tree["tensor"]))  # independent of the file, which may be deleted
                return found if tree["on"] == "cpu" else found.to(device)
            if "mapping" in tree:
                return {name: from_json(each) for name, each in tree["mapping"]}
            if "tuple" in tree:
                return tuple(from_json(each) for each in tree["tuple"])
            return _instance(types[tree["type"]], [from_json(each) for each in tree["values"]])

        return from_json(json.loads((file.metadata() or {})["part"]))


def _to_json(value: Any, tensors: dict[str, Tensor], types: Types) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "on": value.device.type}
    if isinstance(value, Mapping):
        return {"mapping": [[name, _to_json(each, tensors, types)] for name, each in value.items()]}
    if type(value).__name__ in types:
        names = [known.name for known in fields(value)] if is_dataclass(value) else value._fields
        values = [_to_json(getattr(value, name), tensors, types) for name in names]
        return {"type": type(value).__name__, "values": values}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(each, tensors, types) for each in value]}
    return value


def _instance(made: type, values: list[Any]) -> Any:
    if not is_dataclass(made):
        return made(*values)
    return made(**dict(zip((known.name for known in fields(made)), values, strict=True)))
