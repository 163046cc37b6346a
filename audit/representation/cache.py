"""Features that are computed once: kept on disk, and read back without being loaded.

A file is safetensors: `features` (N, D) and `answers` (N, K). So it takes 4 (D + K) bytes an image in float32: 50,000
images of a layer with 16,384 features take 3.3 GB. Nothing is refused or deleted here; whose folder it is deletes it.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from audit.storage import digest
from audit.types import Encoded

_HEADER = 512  # bytes kept free for the header, which is known last: also aligns what follows
_CPU = torch.device("cpu")
_Batch = Mapping[str, Encoded]


class FeatureStore:
    """What layers say of clean images, one file each under a folder, named by the hash of what decides it.

    Features on the CPU are mapped from their file: memory holds what is looked at, and a file may be larger than it;
    another kind of device has files of its own, and gets copies. What is cut short or foreign is computed again, bytes
    that changed inside a file are not noticed. Without a folder, or where it cannot be written to, the store keeps all.
    """

    def __init__(self, folder: Path | None, device: torch.device = _CPU) -> None:
        self.folder, self.device = folder, device
        self._held: dict[str, Encoded] = {}

    def get(self, key: Mapping[str, Any], compute: Callable[[], Encoded]) -> Encoded:
        """Return what is kept under `key` (JSON data: network, images, layer, reduction), else computed and kept."""
        return self.get_all({"": key}, lambda missing: ({layer: compute()} for layer in missing))[""]

    def get_all(
        self, keys: Mapping[str, Mapping[str, Any]], compute: Callable[[Sequence[str]], Iterable[_Batch]]
    ) -> dict[str, Encoded]:
        """Return what is kept under each layer's key; `compute` is told the layers that are missing, if any are.

        It gives them in batches, as `encode_layers` does: the features of each batch go to the disk before the next
        one is asked for. It is called again where the disk fails.
        """
        names = {layer: digest({**key, "device": self.device.type}) for layer, key in keys.items()}
        found = self._found(names)
        missing = {layer: name for layer, name in names.items() if layer not in found}
        if missing and self.folder is not None:
            with suppress(OSError):  # a full disk costs time, and memory
                _write(self.folder, missing, compute(list(missing)))
            found |= self._found(missing)
        unwritten = [layer for layer in names if layer not in found]
        batches = list(compute(unwritten)) if unwritten else []
        for layer in unwritten:
            parts = zip(*(batch[layer] for batch in batches), strict=True)
            found[layer] = self._held[names[layer]] = Encoded(*(torch.cat(each).to(self.device) for each in parts))
        return {layer: found[layer] for layer in names}

    def _found(self, names: Mapping[str, str]) -> dict[str, Encoded]:
        return {layer: kept for layer, name in names.items() if (kept := self._read(name)) is not None}

    def _read(self, name: str) -> Encoded | None:
        if name in self._held or self.folder is None:
            return self._held.get(name)
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                mapped = [file.get_tensor(part) for part in Encoded._fields]
        except Exception:  # not there, torn or foreign: computing it again is always right
            with suppress(OSError):
                path.unlink()
            return None
        return Encoded(*(each.to(self.device) for each in mapped))


def _write(folder: Path, names: Mapping[str, str], batches: Iterable[_Batch]) -> None:
    with ExitStack() as opened:
        files = {layer: _Growing(folder / f"{name}.safetensors", opened) for layer, name in names.items()}
        for batch in batches:
            for layer, file in files.items():
                file.add(batch[layer])
        for file in files.values():
            file.finish()


class _Growing:
    """A file that takes features batch by batch and has its name once it is whole; the answers wait in memory."""

    def __init__(self, path: Path, opened: ExitStack) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
        opened.callback(Path(self._temporary).unlink, missing_ok=True)
        self._path, self._file = path, opened.enter_context(os.fdopen(handle, "wb"))
        self._file.write(bytes(_HEADER))
        self._parts: dict[str, dict[str, Any]] = {}
        self._answers: list[Tensor] = []

    def add(self, batch: Encoded) -> None:
        self._append("features", batch.features)
        self._answers.append(batch.answers.cpu())

    def finish(self) -> None:
        self._append("answers", torch.cat(self._answers))
        self._file.seek(0)
        self._file.write((_HEADER - 8).to_bytes(8, "little") + json.dumps(self._parts).encode().ljust(_HEADER - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        Path(self._temporary).chmod(0o644)
        os.replace(self._temporary, self._path)

    def _append(self, name: str, rows: Tensor) -> None:
        # safetensors has the bytes and the name of their type; its own header goes
        saved = safetensors.torch.save({name: rows.detach().cpu().contiguous()})
        start, begin = 8 + int.from_bytes(saved[:8], "little"), self._file.tell() - _HEADER
        self._file.write(memoryview(saved)[start:])
        fresh = {"dtype": json.loads(saved[8:start])[name]["dtype"], "shape": [0, rows.shape[1]]}
        part = self._parts.setdefault(name, {**fresh, "data_offsets": [begin, begin]})
        part["shape"][0] += len(rows)
        part["data_offsets"][1] = self._file.tell() - _HEADER
