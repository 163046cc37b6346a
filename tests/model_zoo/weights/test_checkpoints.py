"""Malicious and damaged weights files are refused with one line, and no code runs."""

import argparse
import io
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from audit.errors import CheckpointError, EnvironmentFault, UnsafeError
from model_zoo.untrusted import file_sha256
from model_zoo.weights.checkpoints import read_weights, write_safetensors


class _Runs:
    """A value whose unpickling calls a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


def _payloads(canary: Path) -> dict[str, _Runs]:
    return {
        "os.system": _Runs(os.system, f"touch {canary}"),
        "eval": _Runs(eval, f"open({str(canary)!r}, 'w')"),
        "exec": _Runs(exec, f"open({str(canary)!r}, 'w')"),
        "hub": _Runs(torch.hub.load, "nobody/nothing", "model"),
        "nested": _Runs(torch.storage._load_from_bytes, b"not a storage"),
    }


@pytest.mark.parametrize("layout", ["zip", "legacy", "plain", "protocol4"])
@pytest.mark.parametrize("payload", ["os.system", "eval", "exec", "hub", "nested"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, layout: str, payload: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    contents = {"state_dict": {"weight": torch.zeros(3)}, "extra": _payloads(canary)[payload]}
    if layout in ("zip", "legacy"):
        torch.save(contents, path, _use_new_zipfile_serialization=layout == "zip")
    else:
        path.write_bytes(pickle.dumps({"extra": contents["extra"]}, protocol=2 if layout == "plain" else 4))
    with pytest.raises(UnsafeError, match=r"would import .*(system|eval|exec|load|_load_from_bytes).*save_file"):
        read_weights(path)
    assert not canary.exists()


def test_a_pickled_module_is_refused_with_export_advice(tmp_path: Path) -> None:
    for name, new in (("new", True), ("old", False)):
        torch.save(nn.Linear(2, 2), tmp_path / name, _use_new_zipfile_serialization=new)
        with pytest.raises(UnsafeError, match=r"torch\.nn\.modules\.linear\.Linear.*model\.state_dict\(\)"):
            read_weights(tmp_path / name)


def _saved(kind: str) -> bytes:
    state = {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(50, 40)}
    if kind == "safetensors":
        return safetensors.torch.save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("percent", [0, 0.1, 30, 90, 99.9])
def test_truncated_files_are_recognised(tmp_path: Path, kind: str, percent: float) -> None:
    data = _saved(kind)
    path = tmp_path / "weights.bin"
    path.write_bytes(data[: int(len(data) * percent / 100)])
    with pytest.raises(CheckpointError, match=r"empty \(0 bytes\)|is truncated") as caught:
        read_weights(path)
    assert caught.value.kind == ("empty" if percent == 0 else "truncated")
    assert "\n" not in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_complete_files_load_with_their_hash(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(_saved(kind))
    weights = read_weights(path)
    assert sorted(weights.tensors) == ["a.weight", "b.weight"]
    assert weights.sha256 == file_sha256(path)
    assert weights.notes == ()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\n<!DOCTYPE html><html><head><title>Sign in</title>", "html"),
        (b"<HTML>\n<body>Quota exceeded</body></HTML>", "html"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not_a_checkpoint"),
        (b"epoch,loss\n1,2.0\n2,1.0\n3,0.5\n", "not_a_checkpoint"),
        (struct.pack("<Q", 20) + b"{not json at all.. }" + b"\0" * 50, "not_a_checkpoint"),
        (
            struct.pack("<Q", 60) + b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}       ' + b"\0" * 4,
            "not_a_checkpoint",
        ),
        (b"\x80\x02}q\x00.", "truncated"),
        (pickle.dumps(list(range(20)), protocol=2), "not_a_checkpoint"),
    ],
)
def test_files_of_other_kinds_are_identified(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert caught.value.kind == kind
    if kind == "html":
        assert "web page (HTML) was saved in place of weights" in str(caught.value)


@pytest.mark.parametrize(("kind", "size"), [("legacy", 60), ("legacy", 200), ("safetensors", 40)])
def test_files_truncated_inside_their_header_are_refused(tmp_path: Path, kind: str, size: int) -> None:
    (tmp_path / "w").write_bytes(_saved(kind)[:size])
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        read_weights(tmp_path / "w")
    assert caught.value.kind == "truncated"


def test_an_archive_without_its_other_records(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("a/b/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(CheckpointError, match=r"is truncated \("):
        read_weights(tmp_path / "w.pth")


def test_torchscript_is_not_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UnsafeError, match="TorchScript"):
        read_weights(tmp_path / "script.pt")


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 50_000_000)
    with pytest.raises(UnsafeError, match="compressed zip"):
        read_weights(path)


def test_an_archive_that_claims_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "overlap.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\0" * 600_000)
        archive.filelist.extend(archive.filelist[:1] * 4)
    with pytest.raises(UnsafeError, match="claims 3000000 in 5 members"):
        read_weights(path)


def test_a_zip_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "notes.pth", "w") as archive:
        archive.writestr("notes.txt", "hello, this is a text")
    with pytest.raises(CheckpointError, match=r"zip without data\.pkl"):
        read_weights(tmp_path / "notes.pth")


def test_a_tensor_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stride.pth"
    torch.save({"weight": torch.zeros(1).as_strided((1_000_000_000,), (0,))}, path)
    assert path.stat().st_size < 10_000
    with pytest.raises(UnsafeError, match="shape 1000000000 in it claims 4000000000 bytes"):
        read_weights(path)


def test_namespaces_and_numpy_scalars_beside_the_weights_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    extra = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.9), "n": np.int64(3)}
    torch.save({"state_dict": {"weight": torch.ones(2)}, **extra}, path)
    weights = read_weights(path)
    assert list(weights.tensors) == ["weight"]
    assert weights.notes == ("unwrapped 'state_dict', ignored args, best, n",)


def test_numpy_arrays_beside_the_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": np.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(UnsafeError, match=r"numpy.*_reconstruct"):
        read_weights(tmp_path / "w.pth")


def test_a_missing_file_lists_files_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"x")
    with pytest.raises(EnvironmentFault, match=r"does not exist; .* holds other\.pth"):
        read_weights(tmp_path / "weights.pth")


def test_an_unreadable_file_is_an_environment_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "w.pth").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot read weights file .*Permission denied"):
        read_weights(tmp_path / "w.pth")


def test_safetensors_are_written_with_their_hash(tmp_path: Path) -> None:
    path = tmp_path / "new" / "w.safetensors"
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(2)}
    assert write_safetensors(tensors, path) == file_sha256(path)
    read = read_weights(path).tensors
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    with pytest.raises(EnvironmentFault, match="cannot write"):
        write_safetensors(tensors, path / "below-a-file" / "w.safetensors")


def test_files_that_torch_cannot_read_are_refused(tmp_path: Path) -> None:
    """Check short storages, and a pickle with harmless globals that torch refuses."""
    path = tmp_path / "w.pth"
    source = io.BytesIO(_saved("zip"))
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data[:100] if "/data/0" in member.filename else data)
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert caught.value.kind in ("truncated", "not_a_checkpoint")
