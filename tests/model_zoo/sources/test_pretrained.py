"""Every source of pretrained models, offline, with random weights in the expected place."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit.errors import (
    EnvironmentFault,
    IntegrityError,
    InvalidModelError,
    MismatchError,
    UnknownNameError,
    UnsafeError,
    UsageError,
)
from model_zoo import catalogue, libraries
from model_zoo.architectures import build
from model_zoo.entries import PretrainedFacts
from model_zoo.load import LoadedModel, SourceSettings, identify, load_model
from model_zoo.model_types import check_outputs
from model_zoo.untrusted import file_sha256
from model_zoo.weights import key_rules
from model_zoo.weights.checkpoints import Weights, write_safetensors

Check = Callable[[LoadedModel], None]


def test_timm_model_with_local_weights(check_contract: Check, offline: SourceSettings) -> None:
    network = libraries.timm_build("resnet18", {"num_classes": 1000})
    path = offline.cache / "timm" / "resnet18.a1_in1k.safetensors"
    write_safetensors(network.state_dict(), path)
    random_state = torch.get_rng_state()
    model = load_model("timm:resnet18", offline)
    assert torch.equal(random_state, torch.get_rng_state())
    check_contract(model)
    assert model.image_shape == (3, 224, 224)
    assert model.entry.weights_sha256 == file_sha256(path)
    assert (model.entry.family, model.entry.dataset, model.entry.pinned) == ("resnet", "imagenet", False)
    wrapped: Any = model.network
    assert isinstance(wrapped.network, nn.Module)
    assert wrapped.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    entry = identify("timm:resnet18", offline)
    assert entry == model.entry


def test_timm_names_and_missing_weights(offline: SourceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown timm model 'resnet81'; did you mean"):
        load_model("timm:resnet81", offline)
    with pytest.raises(EnvironmentFault, match=r"put the file at .*resnet18\.a1_in1k\.safetensors"):
        load_model("timm:resnet18", offline)
    facts = PretrainedFacts(name="x", family="x", num_classes=2, image_shape=(3, 8, 8), mean=(0.5,), std=(0.5,))
    monkeypatch.setattr(libraries, "timm_facts", lambda _: facts)
    with pytest.raises(EnvironmentFault, match="has no safetensors on the hub"):
        load_model("timm:x", offline)


def test_invalid_arguments_of_timm_architectures_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown timm model 'resnet81'"):
        libraries.timm_build("resnet81", {})
    with pytest.raises(MismatchError, match="timm cannot build 'resnet18' with"):
        libraries.timm_build("resnet18", {"img_size": 32})


def test_names_of_safe_hub_files() -> None:
    assert libraries._safetensors_name("") == "model.safetensors"
    assert libraries._safetensors_name("pytorch_model.bin") == "model.safetensors"
    assert libraries._safetensors_name("open_clip_pytorch_model.bin") == "open_clip_model.safetensors"


def test_torchvision_model_from_a_file_named_by_its_hash(
    check_contract: Check, offline: SourceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = libraries.torchvision_build("squeezenet1_1", 1000, 224, pretrained=True)
    name, facts = libraries.torchvision_facts("squeezenet1_1")
    path = offline.cache / "torchvision" / facts.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    with pytest.raises(IntegrityError, match=rf"not the published {path.stem[-8:]}"):
        load_model("torchvision:squeezenet1_1", offline)
    honest = path.with_name(f"net-{file_sha256(path)[:8]}.pth")
    path.rename(honest)
    changed = replace(facts, url=f"https://example.org/{honest.name}")
    monkeypatch.setattr(libraries, "torchvision_facts", lambda *_: (name, changed))
    model = load_model("torchvision:squeezenet1_1/IMAGENET1K_V1", offline)
    check_contract(model)
    assert model.entry.pinned
    assert [number.metric for number in model.entry.published] == ["natural_accuracy"]
    assert 0.5 < model.entry.published[0].value < 0.7


def test_torchvision_names(offline: SourceSettings) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown torchvision model 'resnet81'; did you mean"):
        load_model("torchvision:resnet81", offline)
    with pytest.raises(UnknownNameError, match=r"unknown weights of torchvision's resnet18 'V1'"):
        load_model("torchvision:resnet18/V1", offline)
    with pytest.raises(UnknownNameError, match=r"unknown torchvision model 'resnet81'"):
        libraries.torchvision_build("resnet81", 10, None)
    with pytest.raises(MismatchError, match="torchvision cannot build 'vit_b_16'"):
        libraries.torchvision_build("vit_b_16", 10, 33)
    with pytest.raises(EnvironmentFault, match=r"resnet18-f37072fd.pth does not exist and offline"):
        load_model("torchvision:resnet18", offline)


def test_old_densenet_names_are_joined(tmp_path: Path) -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denselayer1 = nn.ModuleDict({"norm1": nn.LayerNorm(2)})

    torch.save({"denselayer1.norm.1.weight": torch.ones(2), "denselayer1.norm.1.bias": torch.ones(2)}, tmp_path / "w")
    assert key_rules.copy_torchvision_weights(Old(), tmp_path / "w")[0].startswith(
        "joined the layer numbers of 2 DenseNet names"
    )


def _hub_repo(settings: SourceSettings, config: object) -> Path:
    folder = settings.cache / "hf-hub" / "someone" / "net"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_hub_repository_in_timms_layout(check_contract: Check, offline: SourceSettings) -> None:
    size = {"num_classes": 7, "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}}
    folder = _hub_repo(offline, {"architecture": "test_vit", "model_args": {"img_size": 32}, **size})
    network = libraries.timm_build("test_vit", {"num_classes": 7, "img_size": 32})
    write_safetensors(network.state_dict(), folder / "model.safetensors")
    model = load_model("hf-hub:someone/net", offline)
    check_contract(model)
    assert (model.num_classes, model.image_shape, model.entry.training) == (7, (3, 32, 32), "unknown")


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        ("not json", UsageError, "is not in timm's layout"),
        ({"model_type": "bert"}, UsageError, "is not in timm's layout"),
        ({"architecture": 3}, UnsafeError, "an architecture that is not a name"),
        ({"architecture": "resnet18", "model_args": {"checkpoint_path": "x"}}, UnsafeError, "checkpoint_path"),
        ({"architecture": "local-dir:/tmp"}, UnknownNameError, "unknown timm model"),
        ({"architecture": "resnet18", "num_classes": "many"}, UsageError, "value of the wrong kind"),
    ],
)
def test_hub_configurations_that_are_refused(
    offline: SourceSettings, config: object, error: type[Exception], sentence: str
) -> None:
    _hub_repo(offline, config)
    with pytest.raises(error, match=sentence):
        load_model("hf-hub:someone/net", offline)


CARD = {
    "id": "tiny",
    "architecture": "vgg",
    "arguments": {"image_shape": [1, 8, 8], "num_classes": 10, "width": 4},
    "num_classes": 10,
    "image_shape": [1, 8, 8],
    "family": "vgg",
    "dataset": "digits",
    "training": "robust",
    "trained_norm": "linf",
    "trained_eps": 0.2,
    "licence": "MIT",
    "reference": "",
    "recipe": "digits-vgg",
    "published": [{"metric": "natural_accuracy", "value": 0.9, "source": "the recipe"}],
}


@pytest.fixture
def bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundled"
    monkeypatch.setattr(catalogue, "BUNDLED", folder)
    arguments: Any = CARD["arguments"]
    digest = write_safetensors(build("vgg", arguments).state_dict(), folder / "tiny.safetensors")
    (folder / "tiny.json").write_text(json.dumps({**CARD, "sha256": digest}))
    return folder


def test_bundled_model(check_contract: Check, bundled: Path) -> None:
    model = load_model("bundled:tiny")
    check_contract(model)
    assert model.image_shape == (1, 8, 8)
    assert (model.entry.trained_eps, model.entry.training, model.entry.pinned) == (0.2, "robust", True)
    assert [entry.ref for entry in catalogue.list_models("bundled")] == ["bundled:tiny"]
    with pytest.raises(UnknownNameError, match="unknown bundled model 'tinny'; did you mean 'tiny'"):
        load_model("bundled:tinny")


def test_bundled_architecture_for_other_weights(bundled: Path, tmp_path: Path) -> None:
    other = build("vgg", {"image_shape": (3, 16, 16), "num_classes": 4, "width": 4})
    torch.save(other.state_dict(), tmp_path / "w.pth")
    model = load_model(f"file:{tmp_path / 'w.pth'}?arch=bundled:tiny&num_classes=4&shape=3x16x16")
    assert (model.num_classes, model.image_shape, model.entry.family) == (4, (3, 16, 16), "vgg")


def test_damaged_bundled_models_are_refused(bundled: Path) -> None:
    path = bundled / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(IntegrityError, match="not the published"):
        load_model("bundled:tiny")
    (bundled / "tiny.json").write_text("{}")
    with pytest.raises(IntegrityError, match="lacks id, architecture"):
        load_model("bundled:tiny")
    (bundled / "tiny.json").write_text(json.dumps({**CARD, "sha256": "", "training": "strong"}))
    with pytest.raises(IntegrityError, match="has training 'strong'"):
        load_model("bundled:tiny")
    (bundled / "tiny.json").write_text("no json")
    with pytest.raises(IntegrityError, match="is not a JSON object"):
        load_model("bundled:tiny")


def test_outputs_are_checked_on_a_blank_image() -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return (images,)

    class Nan(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.full((len(images), 10), torch.nan)

    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    check_outputs(flat, 10, (3, 2, 2), "net")
    with pytest.raises(MismatchError, match="net does not take images of shape 3x4x4"):
        check_outputs(flat, 10, (3, 4, 4), "net")
    with pytest.raises(MismatchError, match="net has 10 outputs for one image, but 9 classes were expected"):
        check_outputs(flat, 9, (3, 2, 2), "net")
    with pytest.raises(MismatchError, match="net has an output tuple"):
        check_outputs(Odd(), 10, (3, 2, 2), "net")
    with pytest.raises(InvalidModelError, match="scores that are not finite"):
        check_outputs(Nan(), 10, (3, 2, 2), "net")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RVAUDIT_CACHE", os.sep + "somewhere")
    assert SourceSettings().cache == Path(os.sep + "somewhere")
    monkeypatch.delenv("RVAUDIT_CACHE")
    assert SourceSettings().cache.name == "rvaudit"


def test_the_filter_of_timm_is_used_only_where_names_do_not_match() -> None:
    network = libraries.timm_build("test_vit", {"num_classes": 3})
    torch.manual_seed(1)
    state = libraries.timm_build("test_vit", {"num_classes": 3}).state_dict()
    assert key_rules.copy_timm_weights(network, Weights(dict(state), "0")) == ()
    with pytest.raises(MismatchError, match="missing"):
        key_rules.copy_timm_weights(nn.Linear(2, 2), Weights(dict(state), "0"))
    larger = {**state, "pos_embed": torch.zeros(1, 26, state["pos_embed"].shape[2])}
    with pytest.raises(MismatchError):
        key_rules.copy_timm_weights(nn.Linear(2, 2), Weights(larger, "0"))
    notes = key_rules.copy_timm_weights(network, Weights(larger, "0"))
    assert notes == ("renamed or resized by timm's filter for VisionTransformer checkpoints",)
