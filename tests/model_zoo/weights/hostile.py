"""Generate a corpus of malicious and broken files, each with its expected exit code.

Weights are in `hostile_code.py` and `hostile_bytes.py`, data sets here. No file of the corpus is committed. Run as a
program on a folder, it opens the whole corpus in one process and prints the memory used.
"""

import argparse
import io
import json
import os
import pickle
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile_bytes import deflated, linked, sparse, tarred, weights
from hostile_code import (
    BROKEN,
    CANARY,
    GOOD,
    INTEGRITY,
    INVALID,
    REF,
    UNSAFE,
    USAGE,
    Hostile,
    Runs,
    calling,
    npz,
    opcodes,
    put,
)

__all__ = ["CANARY", "INTEGRITY", "INVALID", "Runs", "calling", "opcodes", "sparse", "tarred"]


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
    path.write_bytes(npz(images=evil, labels=np.zeros(1, np.int64)))


def _plain_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(os.system, f"touch {canary}")))


def _damaged(path: Path, _: Path) -> None:
    data = bytearray(_zip_of({"images.npy": npz(x=np.zeros(500))[40:], "labels.npy": b"x"}, zipfile.ZIP_DEFLATED))
    data[60:90] = b"\xff" * 30
    path.write_bytes(bytes(data))


def archives() -> list[Hostile]:
    """Return files passed as npz data sets."""
    images, labels = np.zeros((4, 1, 8, 8), np.uint8), np.zeros(4, np.int64)
    shape = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 1, 8, 8), }"
    return [
        Hostile("objects", _objects, BROKEN, "plain arrays"),
        Hostile("pickle", _plain_pickle, BROKEN, "plain arrays"),
        Hostile("zeros", lambda p, _: deflated(p, ("images.npy", "labels.npy")), UNSAFE, "unpacks to"),
        Hostile("shape", put(_zip_of({"images.npy": _array(shape), "labels.npy": b""})), BROKEN),
        Hostile("nesting", put(_zip_of({"images.npy": _array("(" * 9000), "labels.npy": b""})), BROKEN),
        Hostile("damaged", _damaged, BROKEN),
        Hostile("label", put(npz(images=images, labels=labels + 10**12)), USAGE, "labels of"),
        Hostile("slip", put(_zip_of({"../../images.npy": b"x"})), USAGE, "needs the arrays"),
        Hostile("empty", put(b""), BROKEN),
        Hostile("cut", put(npz(images=images, labels=labels)[:300]), BROKEN),
        Hostile("page", put(b"<html></html>"), BROKEN),
        Hostile("pipe", lambda p, _: os.mkfifo(p), BROKEN, "pipe"),
        Hostile("folder", lambda p, _: p.mkdir(), BROKEN, "folder"),
        Hostile("device", linked("/dev/zero"), BROKEN, "device"),
    ]


def _one_image_often(path: Path, _: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.DictionaryArray.from_arrays(pa.array([0] * 1000), [np.random.default_rng(0).bytes(300_000)])
    column = pa.StructArray.from_arrays([image, pa.nulls(1000, pa.string())], ["bytes", "path"])
    table = pa.table({"image": column, "label": [0] * 1000})
    pq.write_table(table, path, row_group_size=1000, store_schema=False)


def _label_of_a_trillion(path: Path, _: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": None}], "label": [10**12]}), path)


def tables() -> list[Hostile]:
    """Return files passed as parquet data sets."""
    return [
        Hostile("repeated", _one_image_often, UNSAFE, "unpacks to"),
        Hostile("label", _label_of_a_trillion, USAGE, "labels of"),
        Hostile("noise", put(b"PAR1" + bytes(500) + b"PAR1"), BROKEN),
        Hostile("claim", put(b"PAR1\xff\xff\xff\x7fPAR1"), BROKEN),
        Hostile("pickle", _plain_pickle, BROKEN),
        Hostile("empty", put(b""), BROKEN),
        Hostile("pipe", lambda p, _: os.mkfifo(p), BROKEN, "pipe"),
        Hostile("folder", lambda p, _: p.mkdir(), BROKEN, "folder"),
    ]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def large_png(side: int) -> bytes:
    """Return a black 1-bit image of `side` x `side` pixels, in a few kilobytes."""
    rows = zlib.compress(bytes(side * (side // 8 + 1)), 1)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _picture(name: str, write: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Any]:
    def into(path: Path, canary: Path) -> None:
        (path / "cat").mkdir(parents=True)
        write(path / "cat" / name, canary)

    return into


def folders() -> list[Hostile]:
    """Return folders passed as data sets."""
    script = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({}) (w) file closefile\nshowpage\n%%EOF\n"
    return [
        Hostile("pixels", _picture("a.png", put(large_png(16_000))), UNSAFE, "pixels"),
        Hostile("more-pixels", _picture("a.png", put(large_png(8_000))), UNSAFE, "pixels"),
        Hostile("script", _picture("a.png", lambda p, c: p.write_text(script.format(c))), BROKEN, "decoded"),
        Hostile("pipe", _picture("a.png", lambda p, _: os.mkfifo(p)), BROKEN, "pipe"),
        Hostile("device", _picture("a.png", linked("/dev/zero")), BROKEN, "device"),
        Hostile("page", _picture("a.png", lambda p, _: p.write_text("<html></html>")), BROKEN, "decoded"),
        Hostile("cut", _picture("a.png", put(large_png(800)[:60])), BROKEN, "decoded"),
        Hostile("no-folder", put(b"x"), BROKEN, "does not exist"),
    ]


DATA: dict[str, Callable[[], list[Hostile]]] = {"npz": archives, "parquet": tables, "folder": folders}


def write_all(folder: Path, canary: Path) -> dict[str, list[tuple[Hostile, Path]]]:
    """Write the corpus below a folder and return it by kind: weights, npz, parquet, folder."""
    made: dict[str, list[tuple[Hostile, Path]]] = {}
    for kind, files in {"weights": weights, **DATA}.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        made[kind] = [(one, folder / kind / one.name) for one in files()]
        for one, path in made[kind]:
            one.write(path, canary)
    return made


def peak() -> int:
    """Return the peak memory of this process in bytes (`getrusage` includes its parent)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def open_all(folder: Path) -> dict[str, Any]:
    """Open every file of a corpus; return the memory used and the exit code of each file (-1: no error)."""
    from audit.errors import AuditError
    from model_zoo.images.datasets import load_images
    from model_zoo.load import SourceSettings, load_model

    def attempt(function: Callable[..., Any], *arguments: Any) -> int:
        try:
            function(*arguments)
        except AuditError as error:
            return error.exit_code
        return -1

    sources = SourceSettings(offline=True)
    load_model(f"file:{GOOD}?arch={REF}&num_classes=10", sources)
    for kind in DATA:  # imports the readers
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
