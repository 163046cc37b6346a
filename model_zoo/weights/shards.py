"""Weights in several files: an index (`*.safetensors.index.json`) says which tensor lies in which file."""

import json
import re
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError, UnsafeError
from model_zoo.untrusted import check_file, file_sha256, printable, verify_sha256

INDEX = ".index.json"
_MAX_INDEX = 16_000_000
_MAX_SHARDS = 1000


def is_shard(path: Path) -> bool:
    """Return whether a path is named like one of several files of weights (`model-00001-of-00002.safetensors`)."""
    return re.search(r"-\d{5}-of-\d{5}\.\w+$", path.name) is not None


def is_index(path: Path) -> bool:
    """Return whether a path names the index of weights in several files."""
    return path.name.endswith(INDEX)


def weights_sha256(path: Path, expected: str = "") -> str:
    """Return the sha256 of a weights file; of an index, that of the joined hashes of the index and its files.

    Raises the errors of `verify_sha256` and of `read_shards`, IntegrityError where it differs from `expected`.
    """
    if not is_index(path):
        return verify_sha256(path, expected)
    found = _joined([file_sha256(path), *(verify_sha256(shard) for shard in _shards(_read_map(path), path))])
    if not found.startswith(expected.lower()):
        message = f"{path} and its files have sha256 {found}, not the published {expected}"
        raise IntegrityError(f"{message}; delete them and fetch them again")
    return found


def read_shards(
    path: Path, max_bytes: int, read: Callable[[Path, int], tuple[object, str]]
) -> tuple[dict[str, Any], str]:
    """Return the tensors of all files that an index lists, and the hash of `weights_sha256`.

    `read` returns the contents of one file of at most so many bytes, and its hash. Raises CheckpointError for an index
    that does not parse and for tensors that are not in the file it names, EnvironmentFault for a missing file,
    UnsafeError for one outside the folder of the index or for more than `max_bytes` in all.
    """
    weight_map = _read_map(path)
    tensors: dict[str, Any] = {}
    digests, left = [file_sha256(path)], max_bytes
    for shard in _shards(weight_map, path):
        size = check_file(shard, max_bytes)
        contents, digest = read(shard, left)
        left -= size
        names = [name for name, file in weight_map.items() if file == shard.name]
        held = contents if isinstance(contents, dict) else {}
        if missing := [name for name in names if name not in held]:
            message = f"{shard} lacks {len(missing)} tensors that {path.name} places there, such as"
            raise CheckpointError("truncated", f"{message} {printable(missing[0])}; fetch both again")
        tensors |= {name: held[name] for name in names}
        digests.append(digest)
    return tensors, _joined(digests)


def _read_map(path: Path) -> dict[str, str]:
    check_file(path, _MAX_INDEX)
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        legal = bool(weight_map) and all(isinstance(item, str) for pair in weight_map.items() for item in pair)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise _no_index(path) from error
    if not legal:
        raise _no_index(path)
    return dict(weight_map)


def _no_index(path: Path) -> CheckpointError:
    message = f"{path} is not an index of weights: it has no weight_map from tensors to files"
    return CheckpointError("not_a_checkpoint", f"{message}; give the index that lies beside the files")


def _shards(weight_map: dict[str, str], path: Path) -> list[Path]:
    """Return the files of an index in alphabetical order, after checking that they lie beside it."""
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or "\0" in name or name in (".", ".."):
            raise UnsafeError(f"{path} names {printable(name)!r}, which is no file in its own folder; it is not read")
    if len(names) > _MAX_SHARDS:
        raise UnsafeError(f"{path} lists {len(names)} files, more than {_MAX_SHARDS}; it is not read")
    shards = [path.parent / name for name in names]
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent:
        message = f"{path} lists {len(names)} files, of which {len(absent)} do not exist: {', '.join(absent[:3])}"
        raise EnvironmentFault(f"{message}; fetch them into {path.parent}")
    return shards


def _joined(digests: list[str]) -> str:
    return sha256("".join(digests).encode()).hexdigest()
