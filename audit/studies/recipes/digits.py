"""Recipes of the bundled zoo: four families on handwritten digits, trained standard, at a quarter of eps, and at eps.

Source: the model set of Zhu, Zhang & Evans 2020, Figure 1, scaled to 8x8 images.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.errors import UnknownNameError
from audit.storage import write_atomically
from audit.training.classifiers import ClassifierTraining, train_classifier
from model_zoo.architectures import build
from model_zoo.images.load import ImageRequest, ImageSet, load_images
from model_zoo.weights.checkpoints import write_safetensors

EPS = 0.2
"""The radius the zoo is audited at, l-inf, in pixel units."""

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """One bundled checkpoint: its family, and the l-inf radius it is trained against (0 for standard training)."""

    id: str
    family: str
    trained_eps: float
    epochs: int
    seed: int

    @property
    def training(self) -> ClassifierTraining:
        """Return the settings of the training run."""
        threat = Linf(self.trained_eps) if self.trained_eps else None
        return ClassifierTraining(epochs=self.epochs, threat=threat, seed=self.seed)


def _recipes() -> dict[str, Recipe]:
    levels = {"standard": (0.0, 60), "robust-quarter": (EPS / 4, 60), "robust": (EPS, 80)}
    named = [
        Recipe(f"digits-{family}-{level}", family, eps, epochs, seed=100 * row + column)
        for row, family in enumerate(("baseline-h", "vgg", "resnet", "densenet"), start=1)
        for column, (level, (eps, epochs)) in enumerate(levels.items(), start=1)
    ]
    return {recipe.id: recipe for recipe in named}


RECIPES = _recipes()


def find_recipe(name: str) -> Recipe:
    """Return a recipe by name; raises UnknownNameError with the nearest names."""
    if name not in RECIPES:
        raise UnknownNameError("recipe", name, RECIPES)
    return RECIPES[name]


def train_recipe(recipe: Recipe, folder: Path, progress: Progress = lambda _epoch, _loss: None) -> dict[str, Any]:
    """Train a recipe's network, write `<id>.safetensors` and its card `<id>.json`, and return the card.

    Only training images are learned from; the card's accuracies are measured on the held-out test images.
    """
    train, test = (load_images("digits", ImageRequest(split=split)) for split in ("train", "test"))
    shape = tuple(train.images.shape[1:])
    arguments: dict[str, Any] = {"image_shape": shape, "num_classes": len(train.classes)}
    # initial weights are drawn globally by torch: fix the draw, leave the caller's stream alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        network = build(recipe.family, arguments)
    train_classifier(network, train.images, train.labels, recipe.training, progress)
    folder.mkdir(parents=True, exist_ok=True)
    sha256 = write_safetensors(network.state_dict(), folder / f"{recipe.id}.safetensors")
    card = _card(recipe, arguments, network, test) | {"sha256": sha256}
    write_atomically(folder / f"{recipe.id}.json", json.dumps(card, indent=1) + "\n")
    return card


def _card(recipe: Recipe, arguments: dict[str, Any], network: nn.Module, test: ImageSet) -> dict[str, Any]:
    network.requires_grad_(False)
    attack = TIERS["smoke"]
    measured = measure_accuracy(network, test.images, test.labels, Linf(EPS), attack, seed=0)
    source = f"measured on {len(test.images)} held-out test images"
    return {
        "id": recipe.id,
        "architecture": recipe.family,
        "arguments": arguments,
        "num_classes": arguments["num_classes"],
        "image_shape": list(arguments["image_shape"]),
        "family": recipe.family,
        "dataset": "digits",
        "training": "robust" if recipe.trained_eps else "standard",
        "trained_norm": "linf" if recipe.trained_eps else "",
        "trained_eps": recipe.trained_eps,
        "licence": "MIT",
        "reference": "rvaudit bundled zoo; training data: the digits of scikit-learn (UCI, Alpaydin & Kaynak 1998)",
        "recipe": f"rvaudit train {recipe.id}: {recipe.epochs} epochs, seed {recipe.seed}, "
        f"{len(load_images('digits', ImageRequest(split='train')).images)} training images",
        "published": [
            {"metric": "natural_accuracy", "value": measured.natural.value, "source": source},
            {
                "metric": "adversarial_accuracy",
                "value": measured.adversarial.value,
                "source": f"{source}, {attack.name} at l-inf {EPS}",
            },
        ],
    }
