"""Files that nobody should open: malicious and broken ones, made on the spot, each with the exit code it must get.

Loaded from its file, as `test_hostile.py` does: test folders are no packages. Nothing here is committed as a file.
Run as a program on a folder, it opens the whole corpus in one process and prints how much memory that took.
"""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

REF = "bundled:digits-vgg-standard"
GOOD = Path(__file__).parents[2] / "model_zoo" / "bundled" / "digits-vgg-standard.safetensors"
INVALID, USAGE, BROKEN, UNSAFE, INTEGRITY = range(1, 6)
CANARY = "canary"


class Hostile(NamedTuple):
    """A file: its name, how to write it (path, canary), the exit code it must get, and a part of what is said."""

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


def _put(data: bytes) -> Callable[[Path, Path], Any]:
    return lambda path, _: path.write_bytes(data)


def saved(contents: object, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def repacked(change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None], contents: object = None) -> bytes:
    """Return a torch.save archive whose members were copied by `change` into a new one."""
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
    """Values whose unpickling would make the canary, by many functions."""
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
    """Pickles written by hand: the routes that Python's own pickler does not take."""
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
        + bytes([len(command)]) + command.encode() + b"\x85R.",
        "build-setstate": b"\x80\x02cfunctools\npartial\n" + system + b"\x85R(" + system + argument + b"\x85}Ntb)R.",
        "extension": b"\x80\x02\x82\x01" + argument + b"\x85R.",
        "persistent-id": b"\x80\x02(" + text("storage") + system + argument + b"\x85R" + text("0") + text("cpu")
        + b"K\x01tQ.",
        "hostile-name": b"\x80\x04" + b"\x8c\x0aos\x1b[2J\nx\r\x07" + b"\x8c\x03sys\x93.",
    }  # fmt: skip


def second_legacy_pickle(canary: Path) -> bytes:
    """A legacy file whose last pickle, after the harmless ones, is the one that calls."""
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
    """Files that would run code."""
    some = Path("x")
    zipped = [Hostile(f"zip-{name}", _dump(name), UNSAFE, "would import") for name in calling(some)]
    legacy = [Hostile(f"legacy-{name}", _dump(name, new=False), UNSAFE, "would import") for name in calling(some)]
    by_hand = [Hostile(f"raw-{name}", _raw(name), UNSAFE, "would import") for name in opcodes(some)]
    inside = [Hostile(f"member-{name}", _raw(name, zipped=True), UNSAFE, "would import") for name in opcodes(some)]
    return [
        *zipped, *legacy, *by_hand, *inside,
        Hostile("second-legacy-pickle", lambda p, c: p.write_bytes(second_legacy_pickle(c)), UNSAFE, "would import"),
        Hostile("two-pickles", lambda p, c: p.write_bytes(two_pickles(c)), UNSAFE, "would import"),
        Hostile("joblib", joblib_dump, UNSAFE, "would import"),
        Hostile("whole-module", lambda p, _: torch.save(nn.Linear(2, 2), p), UNSAFE, "linear.Linear"),
        Hostile("torch-package", lambda p, _: torch_package(p), UNSAFE, "torch package"),
        Hostile("torchscript", lambda p, _: torchscript(p), UNSAFE, "TorchScript"),
        Hostile("numpy-array", lambda p, _: torch.save({"w": np.zeros(3)}, p), UNSAFE, "_reconstruct"),
    ]  # fmt: skip


def _dump(name: str, new: bool = True) -> Callable[[Path, Path], Any]:
    return lambda path, canary: path.write_bytes(saved({"state_dict": good(), "x": calling(canary)[name]}, new))


def _raw(name: str, zipped: bool = False) -> Callable[[Path, Path], Any]:
    def write(path: Path, canary: Path) -> None:
        data = opcodes(canary)[name]
        path.write_bytes(with_pickle(data) if zipped else data)

    return write


def safe_header(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(packed) if length is None else length) + packed + body


def entry(*offsets: float, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sparse(path: Path, size: int, head: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)


def deflated(path: Path, names: tuple[str, ...] = ("a/data.pkl",), size: int = 400_000_000) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in names:
            with archive.open(name, "w") as member:
                for _ in range(size // 10_000_000):
                    member.write(bytes(10_000_000))


def many_members() -> bytes:
    one = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = one * 150_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


def two_directories() -> bytes:
    """An archive before another one: readers that search from the end and readers of offsets see different members."""
    return saved({"a": torch.zeros(2)}) + with_pickle(pickle.dumps({}, protocol=2))


def two_locations() -> bytes:
    """An archive whose 64-bit record lies in one place, while its locator names another."""
    data = bytearray(saved({"a": torch.zeros(2)}))
    struct.pack_into("<Q", data, len(data) - 22 - 20 + 8, 100)
    return bytes(data)


def long_comment() -> bytes:
    data = bytearray(with_pickle(pickle.dumps({}, protocol=2)))
    data[-2:] = struct.pack("<H", 30)
    return bytes(data) + bytes(30)


def legacy_claim() -> bytes:
    """A legacy file whose storage claims 4 * 10^9 elements: the number stands in its pickle."""
    data = saved({"a": torch.zeros(70_000)}, new=False)
    return data.replace(b"J" + struct.pack("<i", 70_000), b"J" + struct.pack("<i", 2**31 - 1))


def doubling(times: int) -> bytes:
    """A dictionary whose key is a tuple of two equal tuples of two equal tuples...: hashing it takes 2^times steps."""
    return b"\x80\x02})" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(times)) + b"K\x01s."


def bombs() -> list[Hostile]:
    """Small files that would fill the memory, the stack or the day."""
    stride = torch.zeros(1).as_strided((1_000_000_000,), (0,))
    deep_json = b'{"a":' * 100_000
    return [
        Hostile("deflated", lambda p, _: deflated(p), UNSAFE, "compressed zip"),
        Hostile("stride", lambda p, _: torch.save({"w": stride}, p), UNSAFE, "claims 4000000000 bytes"),
        Hostile("stride-legacy", _put(saved({"w": stride}, new=False)), UNSAFE, "claims"),
        Hostile("members", _put(many_members()), UNSAFE, "zip of 150000 members"),
        Hostile("two-directories", _put(two_directories()), UNSAFE, "directory is not where"),
        Hostile("locator", _put(two_locations()), UNSAFE, "directory is not where"),
        Hostile("comment", _put(long_comment()), UNSAFE, "after its directory"),
        Hostile("bytearray", lambda p, _: torch.save(Runs(bytearray, 10**9), p), UNSAFE, "bytearray"),
        Hostile("empty-lists", _put(with_pickle(b"\x80\x02" + b"]" * 1_500_000)), UNSAFE, "steps"),
        Hostile("deep-list", _put(with_pickle(b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b".")),
                BROKEN, "levels deep"),
        Hostile("deep-tuple", _put(with_pickle(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")),
                UNSAFE, "nests tuples"),
        Hostile("doubling", _put(with_pickle(doubling(60))), UNSAFE, "nests tuples"),
        Hostile("cycle", _put(with_pickle(b"\x80\x02]q\x00h\x00a.")), BROKEN, "levels deep"),
        Hostile("huge-tensor", lambda p, _: torch.save(Runs(torch.Tensor, 10**15), p), BROKEN, "restricted reader"),
        Hostile("legacy-claim", _put(legacy_claim()), BROKEN, "truncated"),
        Hostile("sparse", lambda p, _: sparse(p, 1 << 29), UNSAFE, "more than the"),
        Hostile("sparse-huge", lambda p, _: sparse(p, 1 << 40), UNSAFE, "more than the"),
        Hostile("sparse-safetensors", lambda p, _: sparse(p, 1 << 29, safe_header({})), UNSAFE, "more than the"),
        Hostile("header-length", _put(safe_header({}, b"\0" * 40, 1 << 63)), BROKEN, "truncated"),
        Hostile("header-long", _put(safe_header({"a": "b" * 9_000_000})), UNSAFE, "header of"),
        Hostile("header-deep", _put(safe_header(deep_json)), BROKEN, "does not parse"),
        Hostile("header-infinite", _put(safe_header(b'{"a":{"data_offsets":[0,1e999]}}')),
                BROKEN, "does not parse"),
        Hostile("offsets-outside", _put(safe_header({"a": entry(0, 4000)}, bytes(4))), BROKEN, "truncated"),
        Hostile("offsets-negative", _put(safe_header({"a": entry(-4, 0)}, bytes(4))), BROKEN, "valid"),
        Hostile("offsets-overlap", _put(safe_header({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4))),
                BROKEN, "valid"),
        Hostile("offsets-hole", _put(safe_header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))),
                BROKEN, "valid"),
        Hostile("shape-overflow", _put(safe_header({"a": entry(0, 4, shape=(2**40, 2**40))}, bytes(4))),
                BROKEN, "valid"),
    ]  # fmt: skip


def truncated() -> list[Hostile]:
    """The same weights in three layouts, each cut at five places."""
    whole = {"zip": lambda: saved(good()), "legacy": lambda: saved(good(), new=False), "safetensors": GOOD.read_bytes}

    def cut(layout: str, percent: float) -> Callable[[Path, Path], Any]:
        def write(path: Path, _: Path) -> None:
            data = whole[layout]()
            path.write_bytes(data[: int(len(data) * percent / 100)])

        return write

    return [
        Hostile(f"cut-{layout}-{percent}", cut(layout, percent), BROKEN, "empty" if percent == 0 else "truncated")
        for layout in whole
        for percent in (0, 0.1, 30, 90, 99.9)
    ]


def _changed(**tensors: torch.Tensor) -> Callable[[Path, Path], Any]:
    return lambda path, _: torch.save({**good(), **tensors}, path)


def last_layer() -> tuple[str, torch.Tensor]:
    return "classifier.weight", good()["classifier.weight"]


def tarred(path: Path, mode: str = "w") -> None:
    """A tar with a member outside its folder and one behind a link."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        member = tarfile.TarInfo("../escaped")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
        archive.addfile(link)


def zip_slip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("/escaped", b"abc")


def linked(target: str) -> Callable[[Path, Path], Any]:
    return lambda path, _: path.symlink_to(target)


def broken() -> list[Hostile]:
    """Files that hold no weights, or not the right ones."""
    name, tensor = last_layer()
    bias = name.removesuffix("weight") + "bias"
    nan, inf = tensor.clone(), tensor.clone()
    nan[0, 0], inf[0, 0] = torch.nan, torch.inf
    more = {name: torch.cat([tensor, tensor]), bias: torch.zeros(2 * len(tensor))}
    hostile_name = "a\x1b[2J\n\ud800" + "b" * 10_000
    page = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    return [
        Hostile("page", _put(page), BROKEN, "web page"),
        Hostile("pointer", _put(b"version https://git-lfs.github.com/spec/v1\noid"), BROKEN, "LFS"),
        Hostile("table", _put(b"epoch,loss\n1,2.0\n2,1.0\n3,0.5\n"), BROKEN, "neither"),
        Hostile("hdf5", _put(b"\x89HDF\r\n\x1a\n" + bytes(4000)), BROKEN, "neither"),
        Hostile("noise", _put(np.random.default_rng(0).bytes(5000)), BROKEN, "neither"),
        Hostile("npz", _put(_npz(w=np.zeros(3))), BROKEN, "data.pkl"),
        Hostile("tar", lambda p, _: tarred(p), BROKEN, "neither"),
        Hostile("tar-gz", lambda p, _: tarred(p, "w:gz"), BROKEN, "neither"),
        Hostile("zip-slip", lambda p, _: zip_slip(p), BROKEN, ""),
        Hostile("folder", lambda p, _: p.mkdir(), BROKEN, "folder"),
        Hostile("pipe", lambda p, _: os.mkfifo(p), BROKEN, "pipe"),
        Hostile("device", linked("/dev/zero"), BROKEN, "device"),
        Hostile("nowhere", linked("/nowhere/at/all"), BROKEN, ""),
        Hostile("no-tensors", lambda p, _: torch.save({"epoch": 3}, p), BROKEN, "no state dict"),
        Hostile("number", lambda p, _: torch.save(3, p), BROKEN, "no state dict"),
        Hostile("meta", lambda p, _: torch.save({"w": torch.zeros(3, device="meta")}, p), BROKEN, "no data"),
        Hostile("sparse-layout", lambda p, _: torch.save({"w": torch.eye(3).to_sparse()}, p), BROKEN, "sparse"),
        Hostile("nan", _changed(**{name: nan}), INVALID, "not finite"),
        Hostile("infinite", _changed(**{name: inf}), INVALID, "not finite"),
        Hostile("overflow", _changed(**{name: tensor.double() * 1e300}), INVALID, "not finite"),
        Hostile("wrong-keys", lambda p, _: torch.save({f"other.{k}": v for k, v in good().items()}, p), USAGE, "fit"),
        Hostile("extra-key", _changed(stranger=torch.zeros(3)), USAGE, "stranger"),
        Hostile("hostile-key", _changed(**{hostile_name: torch.zeros(3)}), USAGE, "a?[2J??bbb"),
        Hostile("classes", _changed(**more), USAGE, "the checkpoint has 20 outputs, the network 10"),
        Hostile("shapes", _changed(**{name: tensor[:, :-1].clone()}), USAGE, "the network needs"),
        Hostile("dtype", _changed(**{name: tensor.to(torch.int32)}), USAGE, "holds int32"),
    ]  # fmt: skip


def weights() -> list[Hostile]:
    """Every file given as weights."""
    return [*malicious(), *bombs(), *truncated(), *broken()]


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _array(header: str, body: bytes = b"") -> bytes:
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + body


def _zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _objects(path: Path, canary: Path) -> None:
    evil = np.array([Runs(os.system, f"touch {canary}")], dtype=object)
    path.write_bytes(_npz(images=evil, labels=np.zeros(1, np.int64)))


def _plain_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {canary}")))


def _damaged(path: Path, _: Path) -> None:
    data = bytearray(_zip_of({"images.npy": _npz(x=np.zeros(500))[40:], "labels.npy": b"x"}, zipfile.ZIP_DEFLATED))
    data[60:90] = b"\xff" * 30
    path.write_bytes(bytes(data))


def archives() -> list[Hostile]:
    """Files given as npz data sets."""
    images, labels = np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64)
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1, 8, 8), }"
    return [
        Hostile("objects", _objects, BROKEN, "plain arrays"),
        Hostile("pickle", _plain_pickle, BROKEN, "plain arrays"),
        Hostile("zeros", lambda p, _: deflated(p, ("images.npy", "labels.npy")), UNSAFE, "unpacks to"),
        Hostile("shape", _put(_zip_of({"images.npy": _array(shape), "labels.npy": b""})), BROKEN),
        Hostile("nesting", _put(_zip_of({"images.npy": _array("(" * 9000), "labels.npy": b""})), BROKEN),
        Hostile("damaged", _damaged, BROKEN),
        Hostile("label", _put(_npz(images=images, labels=labels + 10**12)), USAGE, "labels of"),
        Hostile("slip", _put(_zip_of({"../../images.npy": b"x"})), USAGE, "needs the arrays"),
        Hostile("empty", _put(b""), BROKEN),
        Hostile("cut", _put(_npz(images=images, labels=labels)[:300]), BROKEN),
        Hostile("page", _put(b"<html></html>"), BROKEN),
        Hostile("pipe", lambda p, _: os.mkfifo(p), BROKEN, "pipe"),
        Hostile("folder", lambda p, _: p.mkdir(), BROKEN, "folder"),
        Hostile("device", linked("/dev/zero"), BROKEN, "device"),
    ]  # fmt: skip


def _one_image_often(path: Path, _: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = np.random.default_rng(0).bytes(300_000)
    column = [{"bytes": image, "path": None}] * 1000
    pq.write_table(pa.table({"image": column, "label": [0] * 1000}), path, row_group_size=1000)


def _label_of_a_trillion(path: Path, _: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": None}], "label": [10**12]}), path)


def tables() -> list[Hostile]:
    """Files given as parquet data sets."""
    return [
        Hostile("repeated", _one_image_often, UNSAFE, "unpacks to"),
        Hostile("label", _label_of_a_trillion, USAGE, "labels of"),
        Hostile("noise", _put(b"PAR1" + bytes(500) + b"PAR1"), BROKEN),
        Hostile("claim", _put(b"PAR1\xff\xff\xff\x7fPAR1"), BROKEN),
        Hostile("pickle", _plain_pickle, BROKEN),
        Hostile("empty", _put(b""), BROKEN),
        Hostile("pipe", lambda p, _: os.mkfifo(p), BROKEN, "pipe"),
        Hostile("folder", lambda p, _: p.mkdir(), BROKEN, "folder"),
    ]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def large_png(side: int) -> bytes:
    """A black picture of `side` x `side` pixels, a bit each, in a few kilobytes."""
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 1)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _picture(name: str, write: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    def into(path: Path, canary: Path) -> None:
        (path / "cat").mkdir(parents=True)
        write(path / "cat" / name, canary)

    return into


def folders() -> list[Hostile]:
    """Folders given as data sets."""
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({}) (w) file closefile\nshowpage\n%%EOF\n"
    return [
        Hostile("pixels", _picture("a.png", _put(large_png(16_000))), UNSAFE, "pixels"),
        Hostile("more-pixels", _picture("a.png", _put(large_png(8_000))), UNSAFE, "pixels"),
        Hostile("script", _picture("a.png", lambda p, c: p.write_text(script.format(c))), BROKEN, "decoded"),
        Hostile("pipe", _picture("a.png", lambda p, _: os.mkfifo(p)), BROKEN, "pipe"),
        Hostile("device", _picture("a.png", linked("/dev/zero")), BROKEN, "device"),
        Hostile("page", _picture("a.png", lambda p, _: p.write_text("<html></html>")), BROKEN, "decoded"),
        Hostile("cut", _picture("a.png", _put(large_png(800)[:60])), BROKEN, "decoded"),
        Hostile("no-folder", _put(b"x"), BROKEN, "does not exist"),
    ]


DATA: dict[str, Callable[[], list[Hostile]]] = {"npz": archives, "parquet": tables, "folder": folders}


def write_all(folder: Path, canary: Path) -> dict[str, list[tuple[Hostile, Path]]]:
    """Write the whole corpus below a folder and return it by kind: weights, npz, parquet, folder."""
    made: dict[str, list[tuple[Hostile, Path]]] = {}
    for kind, files in {"weights": weights, **DATA}.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        made[kind] = [(one, folder / kind / one.name) for one in files()]
        for one, path in made[kind]:
            one.write(path, canary)
    return made


def peak() -> int:
    """Return the most memory this process ever held, in bytes (`getrusage` counts that of its parent, too)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def open_all(folder: Path) -> dict[str, Any]:
    """Open every file of a written corpus; return the memory it took, and the exit code each got (-1: none)."""
    from audit.errors import AuditError
    from model_zoo.datasets import load_images
    from model_zoo.load import SourceSettings, load_model

    def attempt(function: Callable[..., Any], *arguments: Any) -> int:
        try:
            function(*arguments)
        except AuditError as error:
            return error.exit_code
        return -1

    sources = SourceSettings(offline=True)
    load_model(f"file:{GOOD}?arch={REF}&num_classes=10", sources)
    for kind in DATA:  # imports what reads them
        attempt(load_images, f"{kind}:{folder}/{kind}/pipe")
    before, codes, grown, slow = peak(), {}, {}, {}
    for kind in ("weights", *DATA):
        for path in sorted((folder / kind).iterdir()):
            now, started = peak(), time.monotonic()
            weighed = f"file:{path}?arch={REF}&num_classes=10"
            loaded = (load_model, weighed, sources) if kind == "weights" else (load_images, f"{kind}:{path}")
            codes[f"{kind}/{path.name}"] = attempt(*loaded)
            grown[f"{kind}/{path.name}"] = peak() - now
            slow[f"{kind}/{path.name}"] = time.monotonic() - started
    return {"before": before, "after": peak(), "codes": codes, "grown": grown, "seconds": slow}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    sys.stdout.write(json.dumps(open_all(parser.parse_args().folder)))
