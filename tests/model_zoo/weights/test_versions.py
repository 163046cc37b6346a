"""Versions of modules survive `rvaudit convert`: an older layout loads from safetensors as from torch's own file."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.weights.checkpoints import copy_weights, read_contents, read_weights
from model_zoo.weights.versions import versions_header
from reports.cli import main

State = dict[str, Tensor]


class _Signed(nn.Module):
    """A network whose version 2 stored the bias with the opposite sign."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def _load_from_state_dict(self, state_dict: State, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") == 2:
            state_dict[f"{prefix}body.bias"] = -state_dict[f"{prefix}body.bias"]
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.body(images)
        return scores


def _mnasnet() -> nn.Module:
    network: nn.Module = libraries.torchvision_build("mnasnet0_5", 3, None)
    return network


def _old_mnasnet() -> Any:
    """Return the state of a MNASNet with the stem of its first version, 32 and 16 channels wide at any width."""
    network: Any = _mnasnet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network._load_from_state_dict({}, "", {"version": 1}, False, [], [], [])
    state = network.state_dict()
    assert state._metadata[""] == {"version": 1}
    return state


def _old_signed() -> Any:
    state: Any = _Signed().state_dict()
    state._metadata[""]["version"] = 2
    return state


def _spectral() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 3))


def _convert(contents: object, folder: Path, *options: str) -> Path:
    torch.save(contents, folder / "old.pth")
    assert main(["convert", str(folder / "old.pth"), str(folder / "new.safetensors"), *options]) == 0
    return folder / "new.safetensors"


def _without_versions(path: Path) -> Path:
    bare = path.with_name("bare.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), bare)
    return bare


def _loaded(build: Callable[[], nn.Module], path: Path) -> State:
    network = build()
    copy_weights(network, read_weights(path))
    return network.state_dict()


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _below(state: Any, path: str) -> Any:
    """Return a state dict with its names and versions below a path, as those of a larger network."""
    moved = type(state)((f"{path}.{name}", tensor) for name, tensor in state.items())
    moved._metadata = {f"{path}.{module}".rstrip("."): value for module, value in state._metadata.items()}
    return moved


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("build", "old"), [(_mnasnet, _old_mnasnet), (_Signed, _old_signed)])
def test_an_older_layout_loads_from_the_converted_file(
    build: Callable[[], nn.Module], old: Callable[[], Any], nested: bool, tmp_path: Path
) -> None:
    state, reference = old(), build()
    contents = {"model": _below(state, "net"), "epoch": 3} if nested else state
    new = _convert(contents, tmp_path, *(["--key", "model.net"] if nested else []))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.load_state_dict(state)
    wanted = reference.state_dict()
    assert _same(_loaded(build, new), wanted)
    try:
        without = _loaded(build, _without_versions(new))
    except MismatchError:
        without = {}
    assert not _same(without, wanted)


@pytest.mark.parametrize("version", [1, 2])
def test_batch_norm_reads_a_missing_counter_by_its_version(version: int, tmp_path: Path) -> None:
    state: Any = nn.BatchNorm2d(3).state_dict()
    state._metadata[""]["version"] = version
    del state["num_batches_tracked"]
    contents: Any = read_contents(_convert(state, tmp_path))[0]
    incompatible = nn.BatchNorm2d(3).load_state_dict(contents, strict=False)  # torch's own reading
    assert incompatible.missing_keys == (["num_batches_tracked"] if version == 2 else [])
    bare: Any = read_contents(_without_versions(tmp_path / "new.safetensors"))[0]
    assert nn.BatchNorm2d(3).load_state_dict(bare, strict=False).missing_keys == []


@pytest.mark.parametrize("build", [_spectral, _mnasnet, lambda: nn.MultiheadAttention(4, 2)])
def test_every_version_is_read_as_it_was_stored(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    state: Any = build().state_dict()
    versions = {path: dict(value) for path, value in state._metadata.items()}
    weights = read_weights(_convert(state, tmp_path))
    assert weights.metadata == versions
    assert any(versions.values())


def test_a_file_without_versions_gets_none(tmp_path: Path) -> None:
    new = _convert({"w": torch.ones(2)}, tmp_path)
    assert new.read_bytes() == safetensors.torch.save({"w": torch.ones(2)})
    assert read_weights(new).metadata is None


@pytest.mark.parametrize("text", ["", "[]", '{"": 3}', "[" * 100_000, "NaN", "{"])
def test_entries_of_another_form_are_ignored(text: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors", {"module_versions": text})
    weights = read_weights(tmp_path / "w.safetensors")
    assert weights.metadata is None
    assert weights.tensors["w"].tolist() == [1, 1]


def test_values_that_json_does_not_hold_are_left_out() -> None:
    header = versions_header({"": {"version": 2, "kind": object, "wrong": float("nan"), "pair": (1, 2)}})
    assert header is not None
    assert json.loads(header["module_versions"]) == {"": {"version": 2}}


@pytest.mark.parametrize("convert", [False, True])
def test_how_a_state_dict_was_loaded_before_is_no_version(convert: bool, tmp_path: Path) -> None:
    state: Any = nn.Linear(4, 4).half().state_dict()
    state._metadata[""]["assign_to_params_buffers"] = True  # left by load_state_dict(assign=True)
    path = _convert(state, tmp_path) if convert else tmp_path / "old.pth"
    torch.save(state, tmp_path / "old.pth")
    network = nn.Linear(4, 4)
    copy_weights(network, read_weights(path))
    assert network.weight.dtype == torch.float32
    assert torch.equal(network.weight, state["weight"].float())
