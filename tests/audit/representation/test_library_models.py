"""Networks of timm, torchvision and robustbench, with weights from local files, audited at an inner layer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.information.critic_search import merging
from audit.information.mine import Mine
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.records import RecordStore
from audit.run.cell import Cell
from audit.run.loading import RunOptions
from audit.run.run_loop import run
from model_zoo import libraries
from model_zoo.load import SourceSettings
from model_zoo.untrusted import file_sha256
from model_zoo.weights.checkpoints import write_safetensors

SETTINGS = AuditSettings(
    Mine(
        CriticTraining(steps=6, every=3, shape=CriticShape(width=16, embedding=8, channels=4, view=8)),
        WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1),
    ),
    two_losses(PGD(steps=1)),
    seeds=(0,),
)
NUMBERS = [
    "normal_nats",
    "normal_nats_se",
    "worst_nats",
    "worst_nats_se",
    "rv",
    "rv_se",
    "ceiling_nats",
    "adversarial_accuracy_bound",
    "fano_accuracy_bound",
    "natural_accuracy",
    "adversarial_accuracy",
    "adversarial_gap",
]
AUGMIX = "Hendrycks2020AugMix_WRN"


def _images(folder: Path, classes: int, side: int, count: int = 50) -> str:
    generator = np.random.default_rng(0)
    labels = np.arange(count) % classes
    pixels = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=labels)
    return f"npz:{folder / 'images.npz'}"


def _audit(folder: Path, ref: str, layer: str, sources: SourceSettings, classes: int, side: int) -> None:
    cell = Cell(ref, None, _images(folder, classes, side), 50, layer, Linf(8 / 255), SETTINGS)
    (record,) = run([cell], folder / "run", RunOptions(sources, device="cpu"))
    assert record.valid, record.reason
    assert record.dimension is not None
    assert record.dimension > 10
    values = {name: getattr(record, name) for name in NUMBERS}
    assert all(isinstance(value, float) and np.isfinite(value) for value in values.values()), values
    assert 0 <= values["adversarial_accuracy"] <= values["natural_accuracy"] <= 1
    assert (record.layer, record.num_classes, record.images) == (layer, classes, 50)
    assert RecordStore(folder / "run").read(record.cell_id) == record


@pytest.fixture(autouse=True)
def _short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the trial of target classes, because the networks are large."""
    for name in ("_TRIAL_CLASSES", "_TRIAL_IMAGES"):
        monkeypatch.setattr(merging, name, 2)
    monkeypatch.setattr(merging, "_TRIAL_ROUNDS", ((1, 1),))


def _random_state(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Random weights without all-zero tensors; initialising the network itself takes seconds."""
    with torch.device("meta"):
        empty = build().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in empty.items()}
    scales = {name: tensor + 1 for name, tensor in state.items() if tensor.dim() == 1 and name.endswith("weight")}
    spreads = {name: torch.ones(tensor.shape) for name, tensor in empty.items() if name.endswith("running_var")}
    counts = {name: torch.zeros(()).long() for name in empty if name.endswith("num_batches_tracked")}
    return {**state, **scales, **spreads, **counts}


@pytest.mark.parametrize(
    ("arch", "layer", "side", "build"),
    [
        ("timm:resnet18", "layer2", 32, lambda: libraries.timm_build("resnet18", {"num_classes": 2})),
        ("torchvision:resnet18", "layer2.1.bn2", 32, lambda: libraries.torchvision_build("resnet18", 2, None)),
        (
            "torchvision:vit_b_16",
            "encoder.layers.encoder_layer_0",
            16,
            lambda: libraries.torchvision_build("vit_b_16", 2, 16),
        ),
    ],
)
def test_weights_in_a_file(arch: str, layer: str, side: int, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    write_safetensors(_random_state(build), weights)
    ref = f"file:{weights}?arch={arch}&num_classes=2&shape=3x{side}x{side}&mean=.5,.5,.5&std=.25,.25,.25"
    _audit(tmp_path, ref, layer, SourceSettings(offline=True), 2, side)
    weights.unlink()  # pytest keeps the folders of three runs


def test_robustbench_weights_in_its_own_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "models" / "cifar10" / "corruptions" / f"{AUGMIX}.pt"
    path.parent.mkdir(parents=True)
    state = libraries.robustbench_build("cifar10", "corruptions", AUGMIX).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    sources = SourceSettings(offline=True, cache_dir=tmp_path / "cache", model_dir=tmp_path / "models")
    _audit(tmp_path, f"robustbench:cifar10/corruptions/{AUGMIX}", "block2", sources, 10, 32)
    (record,) = RecordStore(tmp_path / "run")
    assert record.weights_sha256 == file_sha256(path)
    assert any("stripped 'module.'" in note for note in record.details["renames"])
