"""MNASNet and vision transformers of torchvision load from the files that torchvision publishes."""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from audit.errors import MismatchError
from model_zoo import libraries
from model_zoo.load import SourceSettings, load_model
from model_zoo.untrusted import file_sha256
from model_zoo.weights.checkpoints import copy_weights, read_weights, write_safetensors
from model_zoo.weights.contents import Renamed
from model_zoo.weights.rehearsal import rehearse

OFFLINE = SourceSettings(offline=True)
MNASNETS = ["mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"]
VITS = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"]


def _with_old_stem(network: Any) -> nn.Module:
    """Give a MNASNet the stem of its first version, 32 and 16 channels wide whatever the width of the rest."""
    block = libraries._torchvision_models().mnasnet
    norm = {"momentum": 1 - 0.9997}
    stem = [
        nn.Conv2d(3, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32, **norm),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1, stride=1, groups=32, bias=False),
        nn.BatchNorm2d(32, **norm),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 16, 1, padding=0, stride=1, bias=False),
        nn.BatchNorm2d(16, **norm),
        block._stack(16, block._get_depths(network.alpha)[2], 3, 2, 3, 3, 1 - 0.9997),
    ]
    for place, layer in enumerate(stem):
        network.layers[place] = layer
    network._version = 1
    return network


def _published_vit(network: nn.Module) -> "OrderedDict[str, torch.Tensor]":
    """Return a state dict with the names and versions of vision transformers before torchvision 0.14."""
    state: Any = network.state_dict()
    old = OrderedDict(
        (n.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."), t) for n, t in state.items()
    )
    versions = {
        path: {**value, "version": 1} if path.endswith(".mlp") else value for path, value in state._metadata.items()
    }
    old._metadata = versions  # type: ignore[attr-defined]
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    return old


def _place(contents: object, name: str, settings: SourceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put weights where torchvision's file of a model is looked for, under a name with their own hash."""
    weights_name, facts = libraries.torchvision_facts(name)
    folder = settings.cache / "torchvision"
    folder.mkdir(parents=True)
    torch.save(contents, folder / "w")
    honest = folder / f"{name}-{file_sha256(folder / 'w')[:8]}.pth"
    (folder / "w").rename(honest)
    changed = replace(facts, url=f"https://example.org/{honest.name}")
    monkeypatch.setattr(libraries, "torchvision_facts", lambda *_: (weights_name, changed))


def _check(model: nn.Module, reference: nn.Module, side: int) -> None:
    images = torch.rand(1, 3, side, side)
    inner: Any = model
    with torch.no_grad():
        assert torch.allclose(inner.network(images), reference.eval()(images), atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", MNASNETS)
def test_mnasnet_of_both_versions(
    name: str, version: int, offline: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = libraries.torchvision_build(name, 1000, None)
    if version == 1:
        reference = _with_old_stem(reference)
    state: Any = reference.state_dict()
    assert state._metadata[""] == {"version": version}
    _place(state, name, offline, monkeypatch)
    _check(load_model(f"torchvision:{name}", offline).network, reference, 224)


@pytest.mark.parametrize("name", MNASNETS)
def test_mnasnet_without_versions_is_taken_for_the_present_one(name: str, tmp_path: Path) -> None:
    state = libraries.torchvision_build(name, 10, None).state_dict()
    write_safetensors(state, tmp_path / "w.safetensors")
    network = libraries.torchvision_build(name, 10, None)
    copy_weights(network, read_weights(tmp_path / "w.safetensors"))
    assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def test_a_vision_transformer_with_its_published_names(
    offline: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = libraries.torchvision_build("vit_b_32", 1000, 224)
    _place(_published_vit(reference), "vit_b_32", offline, monkeypatch)
    _check(load_model("torchvision:vit_b_32", offline).network, reference, 224)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "as published": lambda state: state,
    "without versions": dict,
    "in an entry": lambda state: {"model": state, "epoch": 3},
    "distributed": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "an encoder": lambda state: {f"backbone.{name}": tensor for name, tensor in state.items()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_published_names_of_a_small_transformer(change: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        transformer = libraries._torchvision_models().VisionTransformer
        network: nn.Module = transformer(32, 8, 2, 2, 16, 32, num_classes=5)
        return network

    reference, network = build(), build()
    torch.save(CHANGES[change](_published_vit(reference)), tmp_path / "w.pth")
    copy_weights(network, read_weights(tmp_path / "w.pth"))
    assert all(torch.equal(tensor, reference.state_dict()[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", VITS)
def test_every_transformer_takes_its_published_names(name: str) -> None:
    """Without memory for their values: the largest has 630 million parameters."""
    _, facts = libraries.torchvision_facts(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = libraries.torchvision_build(name, 1000, facts.image_shape[1], pretrained=True)
    state: Any = _published_vit(network)
    found = rehearse(network, Renamed(dict(state), state._metadata))
    assert (found.missing, found.unexpected, found.error) == ((), (), "")
    assert found.filled.keys() == network.state_dict().keys()


def _first_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict of MobileNetV2 with the flat layer numbers of torchvision's first version."""
    expanded = {name.split(".")[1] for name in state if ".conv.3." in name}
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 3 and parts[2] == "conv":
            *path, _ = parts
            place = ".".join(path[3:])
            flat = {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4}.get(place)
            flat = flat if flat is not None else int(place) + (4 if parts[1] in expanded else 2)
            name = ".".join([*parts[:3], str(flat), parts[-1]])
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("first_layout", [True, False])
def test_a_mobilenet_loads_in_both_layouts_with_and_without_its_classifier(tmp_path: Path, first_layout: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = libraries.torchvision_build("mobilenet_v2", 10, None).eval()
    state = network.state_dict()
    torch.save(_first_layout(state) if first_layout else state, tmp_path / "net.pt")
    images = torch.rand(2, 3, 64, 64)
    ref = f"file:{tmp_path / 'net.pt'}?arch=torchvision:mobilenet_v2"
    with torch.no_grad():
        features = network.features(images).mean((2, 3))
        assert torch.allclose(load_model(f"{ref}&num_classes=10", OFFLINE).network(images), network(images), atol=1e-5)
        headless = {k: v for k, v in state.items() if "classifier" not in k}
        torch.save(_first_layout(headless) if first_layout else headless, tmp_path / "net.pt")
        encoder = load_model(f"{ref}&num_classes=0", OFFLINE)
        assert torch.allclose(encoder.network(images), features, atol=1e-5)
    assert encoder.num_classes == 0


def test_a_network_whose_classifier_is_no_last_linear_layer_keeps_it(tmp_path: Path) -> None:
    network = libraries.torchvision_build("squeezenet1_1", 10, None)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    with pytest.raises(MismatchError, match="squeezenet1_1 has no classifier that can be left out"):
        load_model(f"file:{tmp_path / 'net.pt'}?arch=torchvision:squeezenet1_1&num_classes=0", OFFLINE)
