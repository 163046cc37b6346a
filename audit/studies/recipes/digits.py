"""Recipes of the bundled models: four families on handwritten digits, each standard, robust at eps/4 and robust at eps.

Source: the model set of Zhu, Zhang & Evans 2020, Figure 1, scaled to 8 x 8 images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audit.adversary.threat import Linf
from audit.studies.recipes.model_cards import build_seeded, describe_model, published_accuracies, write_model
from audit.training.classifiers import ClassifierTraining, train_classifier
from model_zoo.architectures import build
from model_zoo.images.datasets import ImageRequest, load_images

EPS = 0.2
"""The l-inf radius at which the bundled models are audited, in pixel units."""

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class DigitsRecipe:
    """One bundled model: its family, and the l-inf radius of adversarial training (0: standard training)."""

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


def _make_recipes() -> dict[str, DigitsRecipe]:
    levels = {"standard": (0.0, 60), "robust-quarter": (EPS / 4, 60), "robust": (EPS, 80)}
    recipes = [
        DigitsRecipe(f"digits-{family}-{level}", family, eps, epochs, seed=100 * row + column)
        for row, family in enumerate(("baseline-h", "vgg", "resnet", "densenet"), start=1)
        for column, (level, (eps, epochs)) in enumerate(levels.items(), start=1)
    ]
    return {recipe.id: recipe for recipe in recipes}


DIGITS_RECIPES = _make_recipes()


def train_digits(recipe: DigitsRecipe, folder: Path, progress: Progress = lambda _epoch, _loss: None) -> dict[str, Any]:
    """Train the network of a recipe, write `<id>.safetensors` and its card `<id>.json`, and return the card.

    Training uses training images only; the accuracies on the card are measured on the held-out test images.
    """
    train, test = (load_images("digits", ImageRequest(split=split)) for split in ("train", "test"))
    shape = tuple(train.images.shape[1:])
    arguments: dict[str, Any] = {"image_shape": shape, "num_classes": len(train.classes)}
    network = build_seeded(lambda: build(recipe.family, arguments), recipe.seed)
    train_classifier(network, train.images, train.labels, recipe.training, progress)
    sources = f"measured on {len(test.images)} held-out test images", f"{EPS}"
    card = {
        "id": recipe.id,
        **describe_model(recipe.family, arguments, recipe.family, "digits", recipe.trained_eps),
        "reference": "rvaudit bundled zoo; training data: the digits of scikit-learn (UCI, Alpaydin & Kaynak 1998)",
        "recipe": f"rvaudit train {recipe.id}: {recipe.epochs} epochs, seed {recipe.seed}, "
        f"{len(train.images)} training images",
        "published": published_accuracies(network, test.images, test.labels, EPS, sources),
    }
    return write_model(network, folder / f"{recipe.id}.safetensors", card)
