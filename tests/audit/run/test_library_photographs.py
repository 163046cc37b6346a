"""Networks of the libraries on photographs of unequal size: the decisions are those of the library's own pipeline."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.information.mine import Mine
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.run.cell import Cell
from audit.run.loading import RunOptions, open_images_for, open_model
from audit.run.run_loop import run
from model_zoo import libraries
from model_zoo.load import SourceSettings
from model_zoo.untrusted import file_sha256
from model_zoo.weights.checkpoints import write_safetensors

WNIDS = ("n01440764", "n01491361", "n15075141")
PLACES = (0, 3, 999)
SIZES = [(60, 90), (200, 120), (160, 160), (90, 40), (256, 256), (300, 200), (70, 71), (161, 159), (40, 40)]


def photographs(folder: Path) -> str:
    for number, size in enumerate(SIZES):
        place = folder / WNIDS[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(place / f"{number:02d}.png")
    return f"folder:{folder}"


def inputs(folder: Path, own: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return the photographs, in the order of their names, after a library's transform."""
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    return torch.stack([own(Image.open(file).convert("RGB")) for file in files])


@torch.no_grad()
def decisive(network: nn.Module, images: Tensor) -> nn.Module:
    """Set batch statistics and last biases of a random network so that its decisions differ between images."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # one pass then sets the statistics of these images
    network.train()(images)
    network.eval()
    *_, bias = (parameter for parameter in network.parameters() if parameter.shape == (1000,))
    bias -= network(images).mean(0)
    return network


def check(ref: str, dataset: str, options: RunOptions, batch: Tensor, network: nn.Module) -> None:
    """Compare decisions on photographs with those of the library's network behind the library's transform."""
    images = open_images_for(ref, dataset, options)
    model = open_model(ref, images, options, min_images=1)
    # photographs of a folder alternate between its classes, as their numbers do
    assert images.labels.tolist() == [PLACES[number % 3] for number in range(len(SIZES))]
    with torch.no_grad():
        expected, found = network(batch), model.network(images.images)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert torch.allclose(found, expected, atol=1e-3 * float(expected.abs().max()))
    assert len(set(found.argmax(1).tolist())) > 1


@pytest.fixture
def options(tmp_path: Path) -> RunOptions:
    torch.manual_seed(0)  # of the weights
    return RunOptions(SourceSettings(offline=True, cache_dir=tmp_path / "cache"), device="cpu")


@pytest.mark.parametrize(
    "name", ["resnet18", "test_vit.r160_in1k", "test_efficientnet.r160_in1k", "test_byobnet.r160_in1k"]
)
def test_timm(tmp_path: Path, options: RunOptions, name: str) -> None:
    dataset = photographs(tmp_path / "photos")
    libraries.timm_facts(name)  # imports timm without its warnings
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    own = create_transform(**resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict()), is_training=False)
    batch = inputs(tmp_path / "photos", own)
    network = decisive(libraries.timm_build(name.partition(".")[0], {"num_classes": 1000}), batch)
    (options.sources.cache / "timm").mkdir(parents=True)
    stored = libraries.timm_facts(name).name  # resnet18 alone means the weights that timm takes for it
    write_safetensors(network.state_dict(), options.sources.cache / "timm" / f"{stored}.safetensors")
    check(f"timm:{name}", dataset, options, batch, network)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_torchvision(tmp_path: Path, options: RunOptions, name: str, monkeypatch: Any) -> None:
    dataset = photographs(tmp_path / "photos")
    weights, facts = libraries.torchvision_facts(name)
    from torchvision.models import get_model_weights

    batch = inputs(tmp_path / "photos", get_model_weights(name)[weights].transforms())
    network = decisive(libraries.torchvision_build(name, 1000, 224, pretrained=True), batch)
    folder = options.sources.cache / "torchvision"
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "w.pth")
    stored = (folder / "w.pth").rename(folder / f"net-{file_sha256(folder / 'w.pth')[:8]}.pth")
    changed = replace(facts, url=f"https://example.org/{stored.name}")
    monkeypatch.setattr(libraries, "torchvision_facts", lambda *_: (weights, changed))
    check(f"torchvision:{name}/{weights}", dataset, options, batch, network)


@pytest.mark.parametrize(
    "transform",
    [
        {"crop_pct": 0.8, "interpolation": "bicubic"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "border", "interpolation": "bicubic"},
    ],
)
def test_repositories_of_the_hub(tmp_path: Path, options: RunOptions, transform: dict[str, Any]) -> None:
    folder = options.sources.cache / "hf-hub" / "someone" / "net"
    folder.mkdir(parents=True)
    facts = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.3, 0.2, 0.25], **transform}
    names = [text for _, text in libraries.imagenet_names(1000)]
    config = {"architecture": "test_efficientnet", "num_classes": 1000, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    dataset = photographs(tmp_path / "photos")
    from timm.data import create_transform, resolve_data_config

    own = create_transform(**resolve_data_config(pretrained_cfg=facts), is_training=False)
    batch = inputs(tmp_path / "photos", own)
    network = decisive(libraries.timm_build("test_efficientnet", {"num_classes": 1000}), batch)
    write_safetensors(network.state_dict(), folder / "model.safetensors")
    check("hf-hub:someone/net", dataset, options, batch, network)
    wrong = {**config, "pretrained_cfg": {**facts, "label_names": names[::-1]}}
    (folder / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(Exception, match="the classes n01440764, n01491361, n15075141 are not among the outputs"):
        open_images_for("hf-hub:someone/net", f"folder:{tmp_path / 'photos'}", options)


def test_a_network_of_timm_is_audited_on_photographs_of_unequal_size(tmp_path: Path, options: RunOptions) -> None:
    """Random weights where timm's are looked for; the classes of the folder are named by wnid."""
    name, wnids = "test_vit.r160_in1k", [wnid for wnid, _ in libraries.imagenet_names(1000)[::400]]
    generator = np.random.default_rng(0)
    for wnid in wnids:
        (tmp_path / "photos" / wnid).mkdir(parents=True)
        for number in range(17):
            pixels = generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)
            size = (150 + 4 * number, 200 - 3 * number)
            Image.fromarray(pixels).resize(size, 2).save(tmp_path / "photos" / wnid / f"{number}.png")
    (options.sources.cache / "timm").mkdir(parents=True)
    network = libraries.timm_build("test_vit", {"num_classes": 1000})
    write_safetensors(network.state_dict(), options.sources.cache / "timm" / f"{name}.safetensors")
    shape = CriticShape(width=16, embedding=8, channels=4, view=8)
    training, search = CriticTraining(steps=6, every=3, shape=shape), WorstCaseSearch(1, rounds=1, critic_steps=1)
    settings = AuditSettings(Mine(training, search), two_losses(PGD(steps=1)), seeds=(0,), reduce="mean")
    cell = Cell(f"timm:{name}", None, f"folder:{tmp_path / 'photos'}", None, "blocks.0", Linf(1 / 255), settings)
    (record,) = run([cell], tmp_path / "run", options)
    assert record.valid, record.reason
    assert record.details["preprocessing"]["crop"] == [160, 160]
    assert record.details["classes"]["mapped_by"] == "wnid"
    assert (record.num_classes, record.dimension, record.images) == (1000, 64, 51)
