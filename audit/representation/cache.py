"""Content-addressed cache of clean activations, in memory-mapped safetensors files.

A file holds the features (N, D) and log-probabilities (N, K) of one layer, 4 (D + K) bytes an image in float32: 50,000
images of a layer with 16,384 features take 3.3 GB. There is no size limit and no eviction; the owner of the folder
deletes it.
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

_HEADER = 512  # bytes reserved for the header, which is written last; a multiple of the alignment of tensors
_CPU = torch.device("cpu")
_FEATURES, _LOG_PROBS = Encoded._fields
_Batch = Mapping[str, Encoded]


class ActivationCache:
    """Cache of encoded clean images, one file for each layer, named by the hash of its key and the kind of device.

    On the CPU, tensors are memory-mapped and loaded on access. Truncated or foreign files are computed again; flipped
    bits inside a file are not detected. Without a folder, or where it is not writable, values are kept in memory.
    """

    def __init__(self, folder: Path | None, device: torch.device = _CPU) -> None:
        self.folder, self.device = folder, device
        self._in_memory: dict[str, Encoded] = {}

    def get(self, key: Mapping[str, Any], compute: Callable[[], Encoded]) -> Encoded:
        """Return the value cached under `key` (JSON data: network, images, layer, reduction), computed on a miss."""
        return self.get_all({"": key}, lambda missing: ({layer: compute()} for layer in missing))[""]

    def get_all(
        self, keys: Mapping[str, Mapping[str, Any]], compute: Callable[[Sequence[str]], Iterable[_Batch]]
    ) -> dict[str, Encoded]:
        """Return the values cached under each layer's key; `compute` yields those of the missing layers in batches.

        Each batch is written before the next one is computed, as by `encode_layers`. If writing fails, `compute` is
        called a second time and its values are kept in memory.
        """
        names = {layer: digest({**key, "device": self.device.type}) for layer, key in keys.items()}
        found = self._found(names)
        missing = {layer: name for layer, name in names.items() if layer not in found}
        if missing and self.folder is not None:
            with suppress(OSError):  # disk full or read-only: kept in memory instead
                _write(self.folder, missing, compute(list(missing)))
            found |= self._found(missing)
        unwritten = [layer for layer in names if layer not in found]
        batches = list(compute(unwritten)) if unwritten else []
        for layer in unwritten:
            tensors = zip(*(batch[layer] for batch in batches), strict=True)
            value = Encoded(*(torch.cat(each).to(self.device) for each in tensors))
            found[layer] = self._in_memory[names[layer]] = value
        return {layer: found[layer] for layer in names}

    def _found(self, names: Mapping[str, str]) -> dict[str, Encoded]:
        return {layer: value for layer, name in names.items() if (value := self._read(name)) is not None}

    def _read(self, name: str) -> Encoded | None:
        if name in self._in_memory or self.folder is None:
            return self._in_memory.get(name)
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                mapped = [file.get_tensor(field) for field in Encoded._fields]
        except Exception:  # missing, truncated or foreign: computed again
            with suppress(OSError):
                path.unlink()
            return None
        return Encoded(*(each.to(self.device) for each in mapped))


def _write(folder: Path, names: Mapping[str, str], batches: Iterable[_Batch]) -> None:
    with ExitStack() as stack:
        writers = {layer: _BatchWriter(folder / f"{name}.safetensors", stack) for layer, name in names.items()}
        for batch in batches:
            for layer, writer in writers.items():
                writer.add(batch[layer])
        for writer in writers.values():
            writer.finish()


class _BatchWriter:
    """Writes one safetensors file batch by batch, under a temporary name until it is complete.

    Features are written at once; log-probabilities are collected in memory and written last.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.")
        stack.callback(Path(self._temporary).unlink, missing_ok=True)
        self._path, self._file = path, stack.enter_context(os.fdopen(handle, "wb"))
        self._file.write(bytes(_HEADER))
        self._entries: dict[str, dict[str, Any]] = {}
        self._log_probs: list[Tensor] = []

    def add(self, batch: Encoded) -> None:
        features, log_probs = batch
        self._append(_FEATURES, features)
        self._log_probs.append(log_probs.cpu())

    def finish(self) -> None:
        self._append(_LOG_PROBS, torch.cat(self._log_probs))
        self._file.seek(0)
        self._file.write((_HEADER - 8).to_bytes(8, "little") + json.dumps(self._entries).encode().ljust(_HEADER - 8))
        self._file.flush()
        os.fsync(self._file.fileno())
        Path(self._temporary).chmod(0o644)
        os.replace(self._temporary, self._path)

    def _append(self, name: str, rows: Tensor) -> None:
        # safetensors supplies the bytes and the name of their type; its header is discarded
        saved = safetensors.torch.save({name: rows.detach().cpu().contiguous()})
        start, begin = 8 + int.from_bytes(saved[:8], "little"), self._file.tell() - _HEADER
        self._file.write(memoryview(saved)[start:])
        empty = {"dtype": json.loads(saved[8:start])[name]["dtype"], "shape": [0, rows.shape[1]]}
        entry = self._entries.setdefault(name, {**empty, "data_offsets": [begin, begin]})
        entry["shape"][0] += len(rows)
        entry["data_offsets"][1] = self._file.tell() - _HEADER
