"""Parts of cells that are done while their cells are not: kept in the run folder, so that a killed run has them back.

A file is safetensors: tensors, and in the header JSON that names the types it is made of. Reading one runs no code.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from audit.adversary.accuracy import Accuracy, Siege
from audit.adversary.attack_checks import Check
from audit.adversary.robustness import Robustness
from audit.certificate.layers import LayerCertificate
from audit.certificate.near_collisions import CurvePoint
from audit.errors import EnvironmentFault
from audit.information.estimator import MIEstimate, Vulnerability
from audit.proportion import Proportion
from audit.storage import digest, write_atomically

SECONDS = 20.0  # a part that took longer is kept
FOLDER, _HOUR = "partial", 3600
_TEMPORARY = re.compile(r"\.[0-9a-f]{60}\..{8}")  # as `write_atomically` names them
_TYPES: dict[str, type] = {
    made.__name__: made
    for made in (
        Robustness,
        Accuracy,
        Proportion,
        Siege,
        Check,
        Vulnerability,
        MIEstimate,
        LayerCertificate,
        CurvePoint,
    )
}
_Part = TypeVar("_Part")


class Parts:
    """The parts under one run folder, one file each, named by the hash of what decides it.

    Without a folder, or where the folder is not on this machine, nothing is kept and everything is computed.
    """

    def __init__(self, folder: Path | None, device: torch.device) -> None:
        self.run, self.device = folder, device

    def get(self, key: Mapping[str, Any], compute: Callable[[], _Part], cell_id: str = "") -> _Part:
        """Return a part: the one that is kept under `key`, else computed now, and kept if that took long.

        `key` is everything that decides the part, as JSON data. Another kind of device makes another part, so that a
        resumed run equals one that was left alone. A part that only one cell needs goes when that cell is done.
        """
        if self.run is None or not self.run.is_dir():
            return compute()
        path = self.run / FOLDER / cell_id / f"{digest({**key, 'device': self.device.type})}.safetensors"
        if path.exists():
            try:
                return unpacked(path, self.device)
            except Exception:  # torn, foreign or of another version: computing it again is always right
                path.unlink(missing_ok=True)
        started = time.monotonic()
        part = compute()
        if time.monotonic() - started > SECONDS:
            # a full disk, or an estimator of other types than ours, costs time and not the part
            with suppress(EnvironmentFault, TypeError):
                write_atomically(path, packed(part))
        return part

    def forget(self, cell_id: str = "") -> None:
        """Delete the parts that only one cell needs, or all of them."""
        if self.run is not None:
            rmtree(self.run / FOLDER / cell_id, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of writes that were killed in a run folder; those of the last hour may be at work."""
    for part in ("cells", FOLDER):
        for path in (folder / part).rglob(".*"):
            with suppress(OSError):  # another process was faster, or the folder is read-only
                if _TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > _HOUR:
                    path.unlink()


def packed(part: object) -> bytes:
    """Return a value made of our types, tuples, mappings, tensors and plain data as the bytes of a file."""
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_plain(part, tensors))
    return safetensors.torch.save(
        {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}, {"part": tree}
    )


def unpacked(path: Path, device: torch.device) -> Any:
    """Return the value that a file of `packed` holds, what was not on the CPU on a device.

    Raises whatever its damage leads to for other files.
    """
    with safe_open(os.fspath(path), framework="pt") as file:
        return _built(json.loads((file.metadata() or {})["part"]), file, device)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name, "on": value.device.type}
    if isinstance(value, Mapping):
        return {"mapping": [[name, _plain(each, tensors)] for name, each in value.items()]}
    if type(value).__name__ in _TYPES:
        names = [known.name for known in fields(value)] if is_dataclass(value) else value._fields
        return {"type": type(value).__name__, "values": [_plain(getattr(value, name), tensors) for name in names]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(each, tensors) for each in value]}
    return value


def _built(plain: Any, file: Any, device: torch.device) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "tensor" in plain:
        found = file.get_tensor(plain["tensor"]).clone()  # of its own: the file may go
        return found if plain["on"] == "cpu" else found.to(device)
    if "mapping" in plain:
        return {name: _built(each, file, device) for name, each in plain["mapping"]}
    if "tuple" in plain:
        return tuple(_built(each, file, device) for each in plain["tuple"])
    made = _TYPES[plain["type"]]
    values = (_built(each, file, device) for each in plain["values"])
    if not is_dataclass(made):
        return made(*values)
    return made(**dict(zip((known.name for known in fields(made)), values, strict=True)))
