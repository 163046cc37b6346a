"""Recipes of the model set of Figures 1 and 2 on CIFAR-10: standard, and adversarial training at 2/255 and 8/255.

`PAPER_RECIPES` is the set of the paper; `SMALL_RECIPES` has the four families of the bundled models and a deeper
ResNet, for two CPU cores.

Source: Zhu, Zhang & Evans 2020, section 4 and Figure 1.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from audit.adversary.threat import Linf
from audit.errors import UsageError
from audit.storage import digest
from audit.studies.recipes.model_cards import build_seeded, describe_model, published_accuracies, write_model
from audit.training.classifiers import ClassifierTraining, StepSchedule, train_classifier
from model_zoo.architectures import build
from model_zoo.images.datasets import ImageSet

EPS = 8 / 255
"""The l-inf radius of the accuracies on the cards, in pixel units."""
LEVELS = {"standard": 0.0, "robust-2": 2 / 255, "robust-8": EPS}
"""The l-inf radius of adversarial training of every level."""
_CARD_IMAGES = 500  # held-out images for the accuracies on the cards

PAPER_TRAINING = ClassifierTraining(
    epochs=150,
    batch_size=128,
    learning_rate=0.1,
    weight_decay=5e-4,
    shift=4,
    flip=True,
    steps=StepSchedule(50),
    precision="bf16",
)
"""SGD with momentum 0.9 and learning rate 0.1, divided by 10 every 50 epochs; mixed precision, for one GPU."""
SMALL_TRAINING = ClassifierTraining(epochs=8, shift=2, flip=True)
"""AdamW with a one-cycle schedule, because few epochs are too short for a step schedule."""


@dataclass(frozen=True)
class CifarRecipe:
    """One network of the set; `relative_cost` is the time of a pass relative to Baseline-H, for progress estimates."""

    id: str
    family: str
    architecture: str
    training: ClassifierTraining
    arguments: Mapping[str, Any] = field(default_factory=dict)
    relative_cost: float = 1.0

    @property
    def trained_eps(self) -> float:
        """The l-inf radius of adversarial training; 0 for standard training."""
        return self.training.threat.eps if self.training.threat else 0.0

    @property
    def passes(self) -> float:
        """The cost of training per image, in forward-backward passes of Baseline-H."""
        search_steps = self.training.pgd.steps if self.training.threat else 0
        return self.relative_cost * self.training.epochs * (1 + search_steps)


def model_set(
    prefix: str, families: Mapping[str, CifarRecipe], training: ClassifierTraining
) -> tuple[CifarRecipe, ...]:
    """Return recipes of all families at all levels, with ids `<prefix>-<family>-<level>` and distinct seeds."""
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


def _family(architecture: str, relative_cost: float, **arguments: int) -> CifarRecipe:
    return CifarRecipe("", "", architecture, PAPER_TRAINING, arguments, relative_cost)


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
    "resnet-deep": _family("resnet", 10, depth=2),
}
PAPER_RECIPES = model_set("cifar10", _PAPER_FAMILIES, PAPER_TRAINING)
"""Baseline-H, ResNet-18, VGG-16, ResNet-50 and DenseNet-121, each standard, at 2/255 and at 8/255."""
SMALL_RECIPES = model_set("cifar10-small", _SMALL_FAMILIES, SMALL_TRAINING)
"""Five families of at most 182,000 weights, each standard, at 2/255 and at 8/255."""


def is_trained(recipe: CifarRecipe, train: ImageSet, folder: Path) -> bool:
    """Return whether a folder holds the network of a recipe, trained on these images.

    Raises UsageError for a network of other settings or images, which is not overwritten.
    """
    card = folder / f"{recipe.id}.json"
    if not card.exists():
        return False
    if json.loads(card.read_text(encoding="utf-8")).get("settings") != _settings_digest(recipe, train):
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
    """Train the network of a recipe, write `<id>.safetensors` and its card `<id>.json`, and return the card.

    Training resumes after its last complete epoch, from `<id>.partial.pt` in the same folder. Load the result as
    `file:<folder>/<id>.safetensors`.
    """
    arguments = {"image_shape": tuple(train.images.shape[1:]), "num_classes": len(train.classes), **recipe.arguments}
    network = build_seeded(lambda: build(recipe.architecture, arguments), recipe.training.seed).to(device)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{recipe.id}.partial.pt"
    train_classifier(network, train.images.to(device), train.labels.to(device), recipe.training, progress, partial)
    images, labels = (each[:_CARD_IMAGES].to(device) for each in (held_out.images, held_out.labels))
    sources = f"measured on the first {len(images)} held-out images", f"{EPS:.4f}"
    published = published_accuracies(network, images, labels, EPS, sources)
    card = write_model(network, folder / f"{recipe.id}.safetensors", _card(recipe, arguments, train, published))
    partial.unlink(missing_ok=True)
    return card


def _settings_digest(recipe: CifarRecipe, train: ImageSet) -> str:
    settings = recipe.training.identity()
    del settings["pgd"]["batch_size"]  # limits memory only
    identity = {"architecture": recipe.architecture, "arguments": dict(recipe.arguments), "training": settings}
    return digest(identity | {"images": train.sha256})[:16]


def _card(
    recipe: CifarRecipe, arguments: dict[str, Any], train: ImageSet, published: list[dict[str, Any]]
) -> dict[str, Any]:
    training = recipe.training
    return {
        "id": recipe.id,
        **describe_model(recipe.architecture, arguments, recipe.family, "cifar10", recipe.trained_eps),
        "reference": "the model set of Zhu, Zhang & Evans 2020, Figure 1; training data: CIFAR-10 (Krizhevsky 2009)",
        "recipe": f"rvaudit reproduce figure1: {training.epochs} epochs, seed {training.seed}, "
        f"{len(train.images)} training images",
        "settings": _settings_digest(recipe, train),
        "published": published,
    }
