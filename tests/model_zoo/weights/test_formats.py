"""Weights in several files, in small floats, and files of other formats."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from audit.errors import CheckpointError, EnvironmentFault, IntegrityError, MismatchError, UnsafeError
from model_zoo.load import SourceSettings, identify, load_model
from model_zoo.weights.checkpoints import Weights, copy_weights, read_weights, write_safetensors
from model_zoo.weights.shards import weights_sha256

State = dict[str, Tensor]


def _sharded(state: State, folder: Path, files: int, end: str = "safetensors", prefix: str = "") -> Path:
    """Write a state dict as Hugging Face's libraries do, in several files and an index; return the index."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{files:05d}.{end}" for i in range(files)]
    weight_map = {f"{prefix}{name}": names[i % files] for i, name in enumerate(state)}
    for name in names:
        held = {key: state[key.removeprefix(prefix)] for key, file in weight_map.items() if file == name}
        if end == "safetensors":
            write_safetensors(held, folder / name)
        else:
            torch.save(held, folder / name)
    index = folder / f"model.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize(
    ("files", "end", "prefix"),
    [(1, "safetensors", ""), (3, "safetensors", ""), (5, "safetensors", "module."), (2, "bin", "backbone.")],
)
def test_weights_in_several_files(
    files: int, end: str, prefix: str, state: State, factories: Path, trusted: SourceSettings, tmp_path: Path
) -> None:
    index = _sharded(state, tmp_path / "net", files, end, prefix)
    ref = f"file:{index}?arch={factories}:small&num_classes=10"
    model = load_model(ref, trusted)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.network.state_dict().items())
    parts = [index, *sorted((tmp_path / "net").glob(f"*.{end}"))]
    digest = sha256("".join(sha256(part.read_bytes()).hexdigest() for part in parts).encode()).hexdigest()
    assert model.entry.weights_sha256 == digest == identify(ref, trusted).weights_sha256
    assert identify(f"{ref}&sha256={digest}", trusted).pinned
    changed = parts[-1]
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    assert weights_sha256(index) != digest
    with pytest.raises(IntegrityError, match="and its files have sha256"):
        identify(f"{ref}&sha256={digest}", trusted)


def test_damaged_sets_of_files_are_refused(state: State, tmp_path: Path) -> None:
    index = _sharded(state, tmp_path / "net", 3)
    contents = json.loads(index.read_text())
    last = index.parent / "model-00003-of-00003.safetensors"
    tensors = safetensors.torch.load(last.read_bytes())
    write_safetensors(dict(list(tensors.items())[1:]), last)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors that model\.safetensors\.index\.json places there"):
        read_weights(index)
    last.unlink()
    with pytest.raises(EnvironmentFault, match=r"lists 3 files, of which 1 do not exist: model-00003-of-00003"):
        read_weights(index)
    for outside in ("../secret.safetensors", "/etc/passwd", "a\\b", ".."):
        weight_map = {**contents["weight_map"], "0.weight": outside}
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UnsafeError, match="is no file in its own folder"):
            read_weights(index)
    index.write_text(json.dumps({"weight_map": {f"w{i}": f"{i}.safetensors" for i in range(2000)}}))
    with pytest.raises(UnsafeError, match="lists 2000 files"):
        read_weights(index)
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 9000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is not an index of weights"):
            read_weights(index)
    with pytest.raises(EnvironmentFault, match="does not exist"):
        read_weights(tmp_path / "other.safetensors.index.json")


def test_the_limit_of_bytes_holds_for_all_files_together(state: State, tmp_path: Path) -> None:
    index = _sharded(state, tmp_path / "net", 3)
    total = sum(file.stat().st_size for file in index.parent.glob("*.safetensors"))
    assert read_weights(index, max_bytes=total).tensors.keys() == state.keys()
    with pytest.raises(UnsafeError, match="more than the limit"):
        read_weights(index, max_bytes=total - 1)


def test_a_folder_names_the_file_to_give(
    state: State, factories: Path, trusted: SourceSettings, tmp_path: Path
) -> None:
    for files, wanted in ((2, r"model\.safetensors\.index\.json"), (0, "net-7.pth")):
        folder = tmp_path / str(files)
        folder.mkdir()
        if files:
            _sharded(state, folder, files)
        else:
            torch.save(state, folder / "net-7.pth")
        with pytest.raises(EnvironmentFault, match=f"a folder.*; name a file in it, such as {wanted}$"):
            load_model(f"file:{folder}?arch={factories}:small&num_classes=10", trusted)


def test_one_of_several_files_names_the_index(
    state: State, factories: Path, trusted: SourceSettings, tmp_path: Path
) -> None:
    index = _sharded(state, tmp_path / "net", 2)
    shard = index.parent / "model-00001-of-00002.safetensors"
    with pytest.raises(MismatchError, match=r"is one of several files of weights; give the index beside it"):
        load_model(f"file:{shard}?arch={factories}:small&num_classes=10", trusted)


FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_floats_are_converted(
    dtype: torch.dtype, kind: str, state: State, small: Callable[..., nn.Module], tmp_path: Path
) -> None:
    stored = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = tmp_path / "w"
    path.write_bytes(safetensors.torch.save(stored)) if kind == "safetensors" else torch.save(stored, path)
    network = small()
    notes = copy_weights(network, read_weights(path))
    assert all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in network.state_dict().items())
    assert notes == (f"converted {str(dtype).removeprefix('torch.')} to float32",)


def test_scaled_floats_are_not_taken_for_weights(state: State, small: Callable[..., nn.Module]) -> None:
    stored = {**state, "4.weight": state["4.weight"].to(torch.float8_e4m3fn), "4.weight_scale": torch.ones(10)}
    with pytest.raises(MismatchError, match=r"unknown to the network: 4\.weight_scale"):
        copy_weights(small(), Weights(stored, "0"))


def test_floats_without_a_reader_are_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(
        CheckpointError, match="tensors of the kind F4, which its reader does not know; save them as F16"
    ):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("length", [128, 384, 640, 896, 1152, 1408, 64, 136])
def test_headers_of_every_length(length: int, tmp_path: Path) -> None:
    """A header of 128 + 256 k bytes starts with the bytes of a pickle: 80 00 to 80 05."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    assert len(header) == length
    (tmp_path / "w").write_bytes(struct.pack("<Q", length) + header + np.array([1.0, 2.0], "<f4").tobytes())
    assert read_weights(tmp_path / "w").tensors["w"].tolist() == [1.0, 2.0]


class _Allocates:
    """A pickle that calls the class of float8's storages, which allocates any number of bytes."""

    def __reduce__(self) -> Any:
        return torch.storage.UntypedStorage, (1 << 40,)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_storages_are_never_allocated_by_a_pickle(layout: str, tmp_path: Path) -> None:
    stored = {"w": torch.ones(2).to(torch.float8_e5m2), "x": _Allocates()}
    torch.save(stored, tmp_path / "w.pth", _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(UnsafeError, match=r"would import and call torch\.storage\.UntypedStorage, so it is not opened"):
        read_weights(tmp_path / "w.pth")


UNTYPED = b"ctorch.storage\nUntypedStorage\n"
CALLS = {
    "reduce": b"\x80\x02" + UNTYPED + b"\x8a\x06\0\0\0\0\0\1\x85R.",
    "memo": b"\x80\x02" + UNTYPED + b"q\x010h\x01\x8a\x06\0\0\0\0\0\1\x85R.",
    "duplicate": b"\x80\x02" + UNTYPED + b"2\x8a\x06\0\0\0\0\0\1\x85R.",
    "new": b"\x80\x02" + UNTYPED + b"\x8a\x06\0\0\0\0\0\1\x85\x81.",
    "stack global": b"\x80\x04\x8c\x0dtorch.storage\x8c\x0eUntypedStorage\x93\x8a\x06\0\0\0\0\0\1\x85R.",
    "instance": b"\x80\x02(\x8a\x06\0\0\0\0\0\1itorch.storage\nUntypedStorage\n.",
}


@pytest.mark.parametrize("call", CALLS)
def test_every_way_of_calling_a_storage_is_refused(call: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(CALLS[call])
    with pytest.raises(UnsafeError, match=r"and call torch\.storage\.UntypedStorage"):
        read_weights(tmp_path / "w.pth")


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


OLD = {"sys_info": pickle.dumps({"protocol_version": 1000}), "pickle": b"x", "tensors": b"x", "storages": b"x"}
ZIPPED = pickle.dumps({"w": [1.0] * 100})
OTHERS = {
    "tar of old torch": (_tar(OLD), r"tar file of torch before 0\.1\.10.*weights_only=False.*save_file"),
    "tar of old torch, other order": (_tar({"./storages": b"x", **OLD}), r"tar file of torch before 0\.1\.10"),
    "tar archive": (_tar({"run/model_best.pth": ZIPPED}), r"tar archive \(its first member is 'run/model_best\.pth'\)"),
    "gzip": (gzip.compress(ZIPPED), "but compressed with gzip; decompress it"),
    "bzip2": (bz2.compress(ZIPPED), "but compressed with bzip2; decompress it"),
    "xz": (lzma.compress(ZIPPED), "but compressed with xz; decompress it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "but an HDF5 file of Keras"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_formats_say_what_to_do(kind: str, tmp_path: Path) -> None:
    data, sentence = OTHERS[kind]
    (tmp_path / "w.pth.tar").write_bytes(data)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_weights(tmp_path / "w.pth.tar")
    assert caught.value.kind == "not_a_checkpoint"
    assert "\n" not in str(caught.value)


def test_a_numpy_array_is_no_weights_file(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.zeros(30))
    with pytest.raises(CheckpointError, match=r"nor a file written by torch\.save but a NumPy array; save only"):
        read_weights(tmp_path / "w.npy")


def test_a_file_called_tar_that_torch_saved_is_read(state: State, tmp_path: Path) -> None:
    for new in (True, False):
        torch.save({"state_dict": state}, tmp_path / "w.pth.tar", _use_new_zipfile_serialization=new)
        assert read_weights(tmp_path / "w.pth.tar").tensors.keys() == state.keys()
