import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from audit.errors import EnvironmentFault, IntegrityError
from audit.records import AuditRecord, RecordStore, read_records
from audit.storage import canonical_json, digest, write_atomically


@pytest.fixture
def record():
    return AuditRecord(
        cell_id="cell",
        model="bundled:vgg",
        source="bundled",
        family="vgg",
        training="standard",
        trained_eps=0.0,
        dataset="digits",
        layer="logits",
        norm="linf",
        eps=0.2,
        weights_sha256="0" * 64,
        estimator="mine",
        attack="pgd-20",
        seeds=2,
        images=100,
        rv=0.1 + 0.2,
        flags=("saturated",),
        details={"per_seed": [{"seed": 0}], "name": "\u202e\x1b模型"},
    )


def test_round_trip_is_exact(record, tmp_path):
    store = RecordStore(tmp_path)
    assert store.read("cell") is None
    assert store.write(record) == tmp_path / "cells" / "cell.json"
    assert store.read("cell") == record
    assert list(store) == read_records(tmp_path) == [record]


def test_records_are_read_in_the_order_of_their_names(record, tmp_path):
    for name in "cab":
        RecordStore(tmp_path).write(replace(record, cell_id=name))
    assert [r.cell_id for r in RecordStore(tmp_path)] == ["a", "b", "c"]


def test_status_and_flags(record):
    assert record.valid
    assert not record.contradicted
    assert not replace(record, status="failed").valid
    assert replace(record, flags=("contradicted: under its floor",)).contradicted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "rvaudit.record/99"}, "record schema 'rvaudit.record/99' is not"),
        ({"schema": None}, "record schema None is not"),
        ({"surprise": 1, "another": 2}, "fields unknown to this version: another, surprise"),
        ({"model": ...}, "record has a missing field: .*'model'"),
    ],
)
def test_another_schema_is_refused(record, change, message):
    data = {name: value for name, value in {**record.to_dict(), **change}.items() if value is not ...}
    with pytest.raises(IntegrityError, match=message):
        AuditRecord.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_file_that_is_not_a_record_is_reported(content, tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"x\.json is not a record"):
        read_records(tmp_path)


def test_a_folder_without_records_is_reported(tmp_path):
    with pytest.raises(EnvironmentFault, match="holds no records"):
        read_records(tmp_path / "nowhere")


def test_nan_is_never_written(record, tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        RecordStore(tmp_path).write(replace(record, rv=float("nan")))
    assert not list(tmp_path.rglob("*.json"))


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"cannot write .*file\.txt: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_no_temporary_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_atomically(tmp_path / "taken", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_atomically(tmp_path / "file" / "inner", "x")


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from audit.storage import write_atomically\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), 'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_files_are_readable_by_all_users(tmp_path):
    write_atomically(tmp_path / "deep" / "file.bin", b"\x00")
    assert (tmp_path / "deep" / "file.bin").stat().st_mode & 0o777 == 0o644


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [0.1]}) == digest(json.loads('{"b": [0.1], "a": 1}'))
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("inf"))


def test_records_import_no_torch():
    code = "import sys, audit.records; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
