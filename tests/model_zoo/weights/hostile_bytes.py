"""Weights files that exhaust resources, and invalid ones: bombs, truncated files, wrong tensors."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile_code import (
    BROKEN,
    GOOD,
    INVALID,
    UNSAFE,
    USAGE,
    Hostile,
    Runs,
    good,
    malicious,
    npz,
    put,
    saved,
    with_pickle,
)


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
    """Return two concatenated archives: readers from the end and readers by offset see different members."""
    return saved({"a": torch.zeros(2)}) + with_pickle(pickle.dumps({}, protocol=2))


def two_locations() -> bytes:
    """Return an archive whose 64-bit record is not where its locator points."""
    data = bytearray(saved({"a": torch.zeros(2)}))
    struct.pack_into("<Q", data, len(data) - 22 - 20 + 8, 100)
    return bytes(data)


def long_comment() -> bytes:
    data = bytearray(with_pickle(pickle.dumps({}, protocol=2)))
    data[-2:] = struct.pack("<H", 30)
    return bytes(data) + bytes(30)


def legacy_claim() -> bytes:
    """Return a legacy file whose pickle claims a storage of 4 * 10^9 elements."""
    data = saved({"a": torch.zeros(70_000)}, new=False)
    return data.replace(b"J" + struct.pack("<i", 70_000), b"J" + struct.pack("<i", 2**31 - 1))


def doubling(times: int) -> bytes:
    """Return a dictionary whose key nests pairs of equal tuples `times` deep: hashing it takes 2^times steps."""
    return b"\x80\x02})" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(times)) + b"K\x01s."


def bombs() -> list[Hostile]:
    """Return small files that exhaust memory, stack or time."""
    stride = torch.zeros(1).as_strided((1_000_000_000,), (0,))
    deep_json = b'{"a":' * 100_000
    return [
        Hostile("deflated", lambda p, _: deflated(p), UNSAFE, "compressed zip"),
        Hostile("stride", lambda p, _: torch.save({"w": stride}, p), UNSAFE, "claims 4000000000 bytes"),
        Hostile("stride-legacy", put(saved({"w": stride}, new=False)), UNSAFE, "claims"),
        Hostile("members", put(many_members()), UNSAFE, "zip of 150000 members"),
        Hostile("two-directories", put(two_directories()), UNSAFE, "directory is not where"),
        Hostile("locator", put(two_locations()), UNSAFE, "directory is not where"),
        Hostile("comment", put(long_comment()), UNSAFE, "after its directory"),
        Hostile("bytearray", lambda p, _: torch.save(Runs(bytearray, 10**9), p), UNSAFE, "bytearray"),
        Hostile("empty-lists", put(with_pickle(b"\x80\x02" + b"]" * 1_500_000)), UNSAFE, "steps"),
        Hostile("deep-list", put(with_pickle(b"\x80\x02" + b"]" * 9999 + b"a" * 9998 + b".")), BROKEN, "levels deep"),
        Hostile("deep-tuple", put(with_pickle(b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.")), UNSAFE, "nests tuples"),
        Hostile("doubling", put(with_pickle(doubling(60))), UNSAFE, "nests tuples"),
        Hostile("cycle", put(with_pickle(b"\x80\x02]q\x00h\x00a.")), BROKEN, "levels deep"),
        Hostile("huge-tensor", lambda p, _: torch.save(Runs(torch.Tensor, 10**15), p), BROKEN, "restricted reader"),
        Hostile("legacy-claim", put(legacy_claim()), BROKEN, "truncated"),
        Hostile("sparse", lambda p, _: sparse(p, 1 << 29), UNSAFE, "more than the"),
        Hostile("sparse-huge", lambda p, _: sparse(p, 1 << 40), UNSAFE, "more than the"),
        Hostile("sparse-safetensors", lambda p, _: sparse(p, 1 << 29, safe_header({})), UNSAFE, "more than the"),
        Hostile("header-length", put(safe_header({}, b"\0" * 40, 1 << 63)), BROKEN, "truncated"),
        Hostile("header-long", put(safe_header({"a": "b" * 9_000_000})), UNSAFE, "header of"),
        Hostile("header-deep", put(safe_header(deep_json)), BROKEN, "does not parse"),
        Hostile("header-infinite", put(safe_header(b'{"a":{"data_offsets":[0,1e999]}}')), BROKEN, "does not parse"),
        Hostile("offsets-outside", put(safe_header({"a": entry(0, 4000)}, bytes(4))), BROKEN, "truncated"),
        Hostile("offsets-negative", put(safe_header({"a": entry(-4, 0)}, bytes(4))), BROKEN, "valid"),
        Hostile("offsets-overlap", put(safe_header({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4))), BROKEN, "valid"),
        Hostile("offsets-hole", put(safe_header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12))), BROKEN, "valid"),
        Hostile(
            "shape-overflow", put(safe_header({"a": entry(0, 4, shape=(2**40, 2**40))}, bytes(4))), BROKEN, "valid"
        ),
    ]


def truncated() -> list[Hostile]:
    """Return the same weights in three formats, each truncated at five places."""
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
    """Write a tar with one member outside its folder and one behind a link."""
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
    """Return files without weights or with wrong weights."""
    name, tensor = last_layer()
    bias = name.removesuffix("weight") + "bias"
    nan, inf = tensor.clone(), tensor.clone()
    nan[0, 0], inf[0, 0] = torch.nan, torch.inf
    more = {name: torch.cat([tensor, tensor]), bias: torch.zeros(2 * len(tensor))}
    hostile_name = "a\x1b[2J\n\ud800" + "b" * 10_000
    page = b"<!DOCTYPE html><html><body>Sign in</body></html>"
    return [
        Hostile("page", put(page), BROKEN, "web page"),
        Hostile("pointer", put(b"version https://git-lfs.github.com/spec/v1\noid"), BROKEN, "LFS"),
        Hostile("table", put(b"epoch,loss\n1,2.0\n2,1.0\n3,0.5\n"), BROKEN, "neither"),
        Hostile("hdf5", put(b"\x89HDF\r\n\x1a\n" + bytes(4000)), BROKEN, "neither"),
        Hostile("noise", put(np.random.default_rng(0).bytes(5000)), BROKEN, "neither"),
        Hostile("npz", put(npz(w=np.zeros(3))), BROKEN, "data.pkl"),
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
        Hostile("wrong-keys", lambda p, _: torch.save({f"{k}.other": v for k, v in good().items()}, p), USAGE, "fit"),
        Hostile("extra-key", _changed(stranger=torch.zeros(3)), USAGE, "stranger"),
        Hostile("hostile-key", _changed(**{hostile_name: torch.zeros(3)}), USAGE, "a?[2J??bbb"),
        Hostile("classes", _changed(**more), USAGE, "the checkpoint has 20 outputs, the network 10"),
        Hostile("shapes", _changed(**{name: tensor[:, :-1].clone()}), USAGE, "the network needs"),
        Hostile("dtype", _changed(**{name: tensor.to(torch.int32)}), USAGE, "holds int32"),
    ]


def weights() -> list[Hostile]:
    """Return all files passed as weights."""
    return [*malicious(), *bombs(), *truncated(), *broken()]
