"""Recipes of the model set of Figures 1 and 2 on CIFAR-10: standard, and against PGD at 2/255 and 8/255.

`PAPER` is the paper's set; `SMALL` the bundled zoo's four families on 32 x 32 images, for two cores.

Source: Zhu, Zhang & Evans 2020, section 4 and Figure 1.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.errors import UsageError
from audit.storage import digest, write_atomically
from audit.training.classifiers import ClassifierTraining, StepSchedule, train_classifier
from model_zoo.architectures import build
from model_zoo.images.load import ImageSet
from model_zoo.weights.checkpoints import write_safetensors

EPS = 8 / 255
"""The radius of the accuracies on the cards, l-inf, in pixel units."""
LEVELS = {"standard": 0.0, "robust-2": 2 / 255, "robust-8": EPS}
"""The radius that each level of the set is trained against."""
_SHOWN = 500  # held-out images that a card's accuracies are measured on

PAPER_TRAINING = ClassifierTraining(
    epochs=150, batch_size=128, learning_rate=0.1, weight_decay=5e-4, shift=4, flip=True, steps=StepSchedule(50),
    precision="bf16",
)  # fmt: skip
"""SGD at 0.1 with momentum 0.9, a tenth of it every 50 epochs; mixed precision, for one GPU."""
SMALL_TRAINING = ClassifierTraining(epochs=8, shift=2, flip=True)
"""AdamW in one cycle: so few epochs are too short for steps."""


@dataclass(frozen=True)
class CifarRecipe:
    """One network of the set; `weight` is what a pass costs beside Baseline-H's, for the time that is left."""

    id: str
    family: str
    architecture: str
    training: ClassifierTraining
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def trained_eps(self) -> float:
        """The l-inf radius it is trained against; 0 for standard training."""
        return self.training.threat.eps if self.training.threat else 0.0

    @property
    def passes(self) -> float:
        """What one training image costs, in forward and backward passes of Baseline-H."""
        searched = self.training.pgd.steps if self.training.threat else 0
        return self.weight * self.training.epochs * (1 + searched)


def recipes(prefix: str, families: Mapping[str, CifarRecipe], training: ClassifierTraining) -> tuple[CifarRecipe, ...]:
    """Return a set: each family at each level, ids `<prefix>-<family>-<level>`, every network with its own seed."""
    return tuple(
        replace(
            base,
            id=f"{prefix}-{family}-{level}",
            family=family,
            training=replace(training, threat=Linf(eps) if eps else None, seed=100 * row + column),
        )
        for row, (family, base) in enumerate(families.items(), start=1)
        for column, (level, eps) in enumerate(LEVELS.items(), start=1)
    )


def _family(architecture: str, weight: float, **arguments: int) -> CifarRecipe:
    return CifarRecipe("", "", architecture, PAPER_TRAINING, arguments, weight)


_PAPER_FAMILIES = {
    "baseline-h": _family("baseline-h", 1, width=64),
    "resnet-18": _family("cifar-resnet", 28, depth=18),
    "vgg-16": _family("cifar-vgg", 16),
    "resnet-50": _family("cifar-resnet", 65, depth=50),
    "densenet-121": _family("cifar-densenet", 45, depth=121),
}
_SMALL_FAMILIES = {
    "baseline-h": _family("baseline-h", 1),
    "vgg": _family("vgg", 4),
    "resnet": _family("resnet", 6),
    "densenet": _family("densenet", 13),
}
PAPER = recipes("cifar10", _PAPER_FAMILIES, PAPER_TRAINING)
"""Baseline-H, ResNet-18, VGG-16, ResNet-50 and DenseNet-121, each standard, at 2/255 and at 8/255."""
SMALL = recipes("cifar10-small", _SMALL_FAMILIES, SMALL_TRAINING)
"""Four families of a few thousand weights, each standard, at 2/255 and at 8/255."""


def is_trained(recipe: CifarRecipe, train: ImageSet, folder: Path) -> bool:
    """Return whether a folder holds a recipe's network, trained on these images.

    Raises UsageError where it holds one of other settings or images: it is not overwritten.
    """
    card = folder / f"{recipe.id}.json"
    if not card.exists():
        return False
    if json.loads(card.read_text(encoding="utf-8")).get("settings") != _settings(recipe, train):
        raise UsageError(f"{card} is of other settings or training images: name another folder, or delete it")
    return True


def train_cifar(
    recipe: CifarRecipe,
    train: ImageSet,
    held_out: ImageSet,
    folder: Path,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train a recipe's network, write `<id>.safetensors` and its card `<id>.json`, and return the card.

    A run that was stopped is taken up at its last whole epoch, from `<id>.partial.pt` in the same folder. Load the
    result as `file:<folder>/<id>.safetensors`.
    """
    arguments = {"image_shape": tuple(train.images.shape[1:]), "num_classes": len(train.classes), **recipe.arguments}
    # initial weights are drawn globally by torch: fix the draw, leave the caller's stream alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        network = build(recipe.architecture, arguments)
    network.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{recipe.id}.partial.pt"
    train_classifier(network, train.images.to(device), train.labels.to(device), recipe.training, progress, partial)
    sha256 = write_safetensors(network.state_dict(), folder / f"{recipe.id}.safetensors")
    card = _card(recipe, arguments, train) | {"published": _published(network, held_out, device), "sha256": sha256}
    write_atomically(folder / f"{recipe.id}.json", json.dumps(card, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    return card


def _settings(recipe: CifarRecipe, train: ImageSet) -> str:
    settings = recipe.training.identity()
    del settings["pgd"]["batch_size"]  # bounds memory only
    known = {"architecture": recipe.architecture, "arguments": dict(recipe.arguments), "training": settings}
    return digest(known | {"images": train.sha256})[:16]


def _published(network: nn.Module, held_out: ImageSet, device: torch.device | None) -> list[dict[str, Any]]:
    """Return natural and adversarial accuracy at `EPS` on the first held-out images."""
    images, labels = (each[:_SHOWN].to(device) for each in (held_out.images, held_out.labels))
    attack = TIERS["smoke"]
    measured = measure_accuracy(network.requires_grad_(False), images, labels, Linf(EPS), attack, seed=0)
    source = f"measured on the first {len(images)} held-out images"
    adversarial = {"value": measured.adversarial.value, "source": f"{source}, {attack.name} at l-inf {EPS:.4f}"}
    return [
        {"metric": "natural_accuracy", "value": measured.natural.value, "source": source},
        {"metric": "adversarial_accuracy", **adversarial},
    ]


def _card(recipe: CifarRecipe, arguments: dict[str, Any], train: ImageSet) -> dict[str, Any]:
    robust, training = bool(recipe.trained_eps), recipe.training
    return {
        "id": recipe.id,
        "architecture": recipe.architecture,
        "arguments": arguments,
        "num_classes": arguments["num_classes"],
        "image_shape": list(arguments["image_shape"]),
        "family": recipe.family,
        "dataset": "cifar10",
        "training": "robust" if robust else "standard",
        "trained_norm": "linf" if robust else "",
        "trained_eps": recipe.trained_eps,
        "licence": "MIT",
        "reference": "the model set of Zhu, Zhang & Evans 2020, Figure 1; training data: CIFAR-10 (Krizhevsky 2009)",
        "recipe": f"rvaudit reproduce figure1: {training.epochs} epochs, seed {training.seed}, "
        f"{len(train.images)} training images",
        "settings": _settings(recipe, train),
    }
