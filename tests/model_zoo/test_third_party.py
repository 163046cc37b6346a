"""Ten third-party checkpoints: they load and have their published accuracy."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch

from model_zoo.images.datasets import ImageRequest, ImageSet, check_fit, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
IMAGENET = "&mean=.485,.456,.406&std=.229,.224,.225"
CIFAR = "&mean=.4914,.4822,.4465&std=.2471,.2435,.2616"
CIFAR_A = "&mean=.4914,.4822,.4465&std=.2023,.1994,.2010"
WIDE = "&mean=.485,.456,.406&std=.225,.225,.225"
MODELS = [
    ("resnet20-12fca82f.th", "resnet20", IMAGENET, 0.820),
    ("resnet56-4bfd9763.th", "resnet56", IMAGENET, 0.83),
    ("resnet2b.pth", "resnet2b", CIFAR, 0.680),
    ("cifar_cnn_a_adv.model", "cnn_a", CIFAR_A, 0.678),
    ("cifar_cnn_a_mix4.model", "cnn_a", CIFAR_A, 0.700),
    ("cifar_wide.pth", "cnn_a", WIDE, 0.608),
    ("cifar_marabou_medium.pth", "marabou_medium", "", 0.688),
    ("mnist_cnn_a_adv.model", "mnist_cnn_a", "", 0.956),
    ("mnist.pth", "mnist_cnn_a", "", 0.982),
    ("mnist_conv_small_nat.pth", "mnist_conv_small", "", 0.981),
]

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)"),
]


@cache
def _images(name: str) -> ImageSet:
    if name.startswith("mnist"):
        return load_images(f"parquet:{FOLDER}/data/mnist-test.parquet", ImageRequest(count=1000))
    return load_images(f"parquet:{FOLDER}/data/cifar10-test-a.parquet", ImageRequest(count=500))


@pytest.mark.parametrize(("name", "factory", "normalisation", "accuracy"), MODELS)
def test_accuracy_equals_the_published_accuracy(name: str, factory: str, normalisation: str, accuracy: float) -> None:
    nets = ROOT / "tests" / "third_party_nets.py"
    ref = f"file:{FOLDER}/checkpoints/{name}?arch={nets}:{factory}&num_classes=10{normalisation}"
    model, images = load_model(ref, SourceSettings(trust_code=True)), _images(name)
    check_fit(model, images)
    with torch.no_grad():
        found = (model.network(images.images).argmax(1) == images.labels).float().mean().item()
    assert found == pytest.approx(accuracy, abs=0.02)
    if name.startswith("resnet20"):
        assert any("stripped 'module.' from" in note for note in model.entry.renames)
