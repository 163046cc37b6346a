"""The `Hostile` file type, and weights files that would run code: pickles, packages, scripts.

Loaded by `hostile.py`, from its folder: test folders are no packages.
"""

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

REF = "bundled:digits-vgg-standard"
GOOD = Path(__file__).parents[3] / "model_zoo" / "bundled" / "digits-vgg-standard.safetensors"
INVALID, USAGE, BROKEN, UNSAFE, INTEGRITY = range(1, 6)
CANARY = "canary"


class Hostile(NamedTuple):
    """A file: name, writer (path, canary), expected exit code, and a part of the expected message."""

    name: str
    write: Callable[[Path, Path], Any]
    code: int
    says: str = ""


class Runs:
    """A value whose unpickling calls a function."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def good() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(GOOD)


def put(data: bytes) -> Callable[[Path, Path], Any]:
    return lambda path, _: path.write_bytes(data)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def saved(contents: object, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def repacked(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None], contents: object = None) -> bytes:
    """Return a torch.save archive whose members `change` copied into a new archive."""
    buffer = io.BytesIO()
    source = io.BytesIO(saved(good() if contents is None else contents))
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(buffer, "w") as new:
        change(old, new)
    return buffer.getvalue()


def with_pickle(pickled: bytes) -> bytes:
    """Return an archive whose data.pkl is the given one."""

    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        for member in old.infolist():
            new.writestr(member.filename, pickled if member.filename.endswith("data.pkl") else old.read(member))

    return repacked(change, {})


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def calling(canary: Path) -> dict[str, Runs]:
    """Return values whose unpickling would create the canary file, by various functions."""
    code = f"open({str(canary)!r}, 'w')"
    import operator
    import runpy
    import subprocess

    return {
        "system": Runs(os.system, f"touch {canary}"),
        "popen": Runs(subprocess.Popen, ["touch", str(canary)]),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "import": Runs(__import__, "antigravity"),
        "open": Runs(open, str(canary), "w"),
        "runpy": Runs(runpy.run_path, str(canary) + ".py"),
        "attrgetter": Runs(operator.attrgetter, "system"),
        "hub": Runs(torch.hub.load, "nobody/nothing", "model"),
        "torch-load": Runs(torch.load, str(canary) + ".pth"),
        "numpy-load": Runs(np.load, str(canary) + ".npy"),
        "nested-storage": Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(os.system, f"touch {canary}"))),
        "nested-pickle": Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {canary}"))),
    }


def opcodes(canary: Path) -> dict[str, bytes]:
    """Return hand-written pickles with opcodes that Python's pickler does not emit."""
    command = f"touch {canary}"
    system, argument = b"cposix\nsystem\n", text(command)
    return {
        "protocol-0": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "global-reduce": b"\x80\x02" + system + argument + b"\x85R.",
        "inst": b"\x80\x02(" + argument + b"iposix\nsystem\n.",
        "obj": b"\x80\x02(" + system + argument + b"o.",
        "newobj": b"\x80\x02" + system + argument + b"\x85\x81.",
        "stack-global": pickle.dumps(Runs(os.system, command), protocol=4),
        "stack-global-memo": b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "build-setstate": b"\x80\x02cfunctools\npartial\n" + system + b"\x85R(" + system + argument + b"\x85}Ntb)R.",
        "extension": b"\x80\x02\x82\x01" + argument + b"\x85R.",
        "persistent-id": b"\x80\x02("
        + text("storage")
        + system
        + argument
        + b"\x85R"
        + text("0")
        + text("cpu")
        + b"K\x01tQ.",
        "hostile-name": b"\x80\x04" + b"\x8c\x0aos\x1b[2J\nx\r\x07" + b"\x8c\x03sys\x93.",
    }


def second_legacy_pickle(canary: Path) -> bytes:
    """Return a legacy file whose last pickle, after harmless ones, calls a function."""
    data = saved({"a": torch.zeros(3)}, new=False)
    start = data.rindex(b"\x80\x02]q\x00")
    return data[:start] + pickle.dumps([Runs(os.system, f"touch {canary}")], protocol=2) + data[start:]


def two_pickles(canary: Path) -> bytes:
    def change(old: zipfile.ZipFile, new: zipfile.ZipFile) -> None:
        evil = pickle.dumps(Runs(os.system, f"touch {canary}"), protocol=2)
        for member in old.infolist():
            if member.filename.endswith("data.pkl"):
                new.writestr("hidden/data.pkl", evil)
            new.writestr(member.filename, old.read(member))

    return repacked(change)


def joblib_dump(path: Path, canary: Path) -> None:
    import joblib

    joblib.dump({"w": np.zeros(3), "x": Runs(os.system, f"touch {canary}")}, path)


def torch_package(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/.data/extern_modules", "os\n")
        archive.writestr("p/nets.py", "import os\n")
        archive.writestr("p/model/data.pkl", pickle.dumps({}, protocol=2))


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(path))


def malicious() -> list[Hostile]:
    """Return files that would run code."""
    some = Path("x")
    zipped = [Hostile(f"zip-{name}", _dump(name), UNSAFE, "would import") for name in calling(some)]
    legacy = [Hostile(f"legacy-{name}", _dump(name, new=False), UNSAFE, "would import") for name in calling(some)]
    by_hand = [Hostile(f"raw-{name}", _raw(name), UNSAFE, "would import") for name in opcodes(some)]
    inside = [Hostile(f"member-{name}", _raw(name, zipped=True), UNSAFE, "would import") for name in opcodes(some)]
    return [
        *zipped,
        *legacy,
        *by_hand,
        *inside,
        Hostile("second-legacy-pickle", lambda p, c: p.write_bytes(second_legacy_pickle(c)), UNSAFE, "would import"),
        Hostile("two-pickles", lambda p, c: p.write_bytes(two_pickles(c)), UNSAFE, "would import"),
        Hostile("joblib", joblib_dump, UNSAFE, "would import"),
        Hostile("whole-module", lambda p, _: torch.save(nn.Linear(2, 2), p), UNSAFE, "linear.Linear"),
        Hostile("torch-package", lambda p, _: torch_package(p), UNSAFE, "torch package"),
        Hostile("torchscript", lambda p, _: torchscript(p), UNSAFE, "TorchScript"),
        Hostile("numpy-array", lambda p, _: torch.save({"w": np.zeros(3)}, p), UNSAFE, "_reconstruct"),
    ]


def _dump(name: str, new: bool = True) -> Callable[[Path, Path], Any]:
    return lambda path, canary: path.write_bytes(saved({"state_dict": good(), "x": calling(canary)[name]}, new))


def _raw(name: str, zipped: bool = False) -> Callable[[Path, Path], Any]:
    def write(path: Path, canary: Path) -> None:
        data = opcodes(canary)[name]
        path.write_bytes(with_pickle(data) if zipped else data)

    return write
