"""Recipes of "Guess First": hypothesis networks, their baselines, and the substitute network of transfer attacks.

Source: Zhu, An & Niu 2020, section 4.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from audit.errors import UsageError
from audit.studies.recipes.model_cards import build_seeded, describe_model, published_accuracies, write_model
from audit.training.label_hypothesis import HypothesisTraining, train_hypothesis
from model_zoo.architectures import build
from model_zoo.images.datasets import ImageRequest, load_images

EPS = 0.15
"""The l-inf radius of the accuracies on the cards, in pixel units: the smaller radius of the paper."""

ELIMINATION, WARM_UP = 0.1, 0.5
"""The weight of information elimination, and the fraction of the epochs before it starts.

With weight 1, or without warm-up, networks on 8,000 MNIST digits stay at chance; with 0.1 after half of the epochs, one
seed of each variant classifies .97 and .98 of 800 held-out training images. Small digits: benchmarks/elimination.py.
"""

KL_WEIGHT = 1e-2
"""The weight of the KL divergence of the information bottleneck, chosen by the same rule."""

_CARD_IMAGES = 500  # held-out images for the accuracies on the cards


@dataclass(frozen=True)
class GuessFirstRecipe:
    """One column of the paper's table: an architecture and its training."""

    id: str
    architecture: str
    training: HypothesisTraining

    @property
    def variant(self) -> str:
        """The name without its prefix, such as c-js-ie."""
        return self.id.rpartition("/")[2]


@dataclass(frozen=True)
class GuessFirstRun:
    """Data, epochs (None: those of the recipe) and seed of one training run.

    A data set with splits is trained on its first `count` training images (None: all) and measured on its test images.
    A reference without splits, such as parquet:PATH, is divided: the first `count` images (None: four fifths) are for
    training, the rest is held out.
    """

    dataset: str = "digits"
    count: int | None = None
    epochs: int | None = None
    seed: int = 0
    data_dir: Path = Path("data")

    @property
    def dataset_name(self) -> str:
        """The name of the data set; for a reference, the file name without its folder."""
        _, colon, path = self.dataset.partition(":")
        return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).stem if colon else self.dataset)

    def name(self, recipe: GuessFirstRecipe) -> str:
        """Return the stem of the files: variant, data set and seed."""
        return f"guess-first-{recipe.variant}-{self.dataset_name}-{self.seed}"


class TrainingData(NamedTuple):
    """Training images (N, C, H, W) with labels (N,), held-out images (M, C, H, W) with labels (M,), class names."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]


def _make_recipes() -> dict[str, GuessFirstRecipe]:
    base = HypothesisTraining()
    conditioned = {
        f"{name}{suffix}": replace(base, objective=objective, elimination=weight, warm_up=WARM_UP if weight else 0.0)
        for suffix, weight in (("", 0.0), ("-ie", ELIMINATION))
        for name, objective in (("c-dv", "donsker-varadhan"), ("c-js", "jensen-shannon"))
    }
    plain = replace(base, objective="cross-entropy")
    baselines = {"cnn": plain, "vib": replace(plain, kl_weight=KL_WEIGHT), "lenet": plain}
    named = {"cnn": "plain-cnn", "vib": "vib", "lenet": "lenet"}
    recipes = [
        GuessFirstRecipe(f"guess-first/{name}", named.get(name, "hypothesis-net"), training)
        for name, training in (conditioned | baselines).items()
    ]
    return {recipe.id: recipe for recipe in recipes}


GUESS_FIRST_RECIPES = _make_recipes()
"""The six columns of the paper's table and the substitute `lenet`, by name."""


def load_training_data(run: GuessFirstRun) -> TrainingData:
    """Return the training and held-out images of a run.

    Raises the errors of `load_images`, and UsageError where `count` leaves no held-out images.
    """
    if ":" not in run.dataset:
        request = ImageRequest(run.count, "train", run.data_dir)
        train, test = load_images(run.dataset, request), load_images(run.dataset, ImageRequest(data_dir=run.data_dir))
        return TrainingData(train.images, train.labels, test.images, test.labels, train.classes)
    whole = load_images(run.dataset)
    count = len(whole.images) * 4 // 5 if run.count is None else run.count
    if not 0 < count < len(whole.images):
        raise UsageError(
            f"{count} of the {len(whole.images)} images of {run.dataset} cannot be for training: "
            f"legal are 1 to {len(whole.images) - 1}, the rest is held out"
        )
    return TrainingData(
        whole.images[:count], whole.labels[:count], whole.images[count:], whole.labels[count:], whole.classes
    )


def build_network(recipe: GuessFirstRecipe, data: TrainingData, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a recipe with the initial weights of a seed, and its constructor arguments."""
    arguments: dict[str, Any] = {"image_shape": tuple(data.images.shape[1:]), "num_classes": len(data.classes)}
    return build_seeded(lambda: build(recipe.architecture, arguments), seed), arguments


def train_guess_first(
    recipe: GuessFirstRecipe,
    run: GuessFirstRun,
    folder: Path,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
    data: TrainingData | None = None,
) -> dict[str, Any]:
    """Train the network of a recipe, write `<name>.safetensors` and its card `<name>.json`, and return the card.

    Training resumes after its last complete epoch, from `<name>.partial.pt` in the same folder. `data` avoids reading
    the data set again. Load the result as `file:<folder>/<name>.safetensors`.
    """
    data = load_training_data(run) if data is None else data
    network, arguments = build_network(recipe, data, run.seed)
    folder.mkdir(parents=True, exist_ok=True)
    name = run.name(recipe)
    partial = folder / f"{name}.partial.pt"
    train_hypothesis(network, data.images, data.labels, training_of(recipe, run), progress, partial)
    card = _card(recipe, run, arguments, network, data) | {"id": name}
    complete = write_model(network, folder / f"{name}.safetensors", card)
    partial.unlink(missing_ok=True)
    return complete


def training_of(recipe: GuessFirstRecipe, run: GuessFirstRun) -> HypothesisTraining:
    """Return the training settings of a recipe in a run."""
    epochs = recipe.training.epochs if run.epochs is None else run.epochs
    return replace(recipe.training, epochs=epochs, seed=run.seed)


def _card(
    recipe: GuessFirstRecipe, run: GuessFirstRun, arguments: dict[str, Any], network: nn.Module, data: TrainingData
) -> dict[str, Any]:
    images, labels = data.held_out_images[:_CARD_IMAGES], data.held_out_labels[:_CARD_IMAGES]
    sources = f"measured on the first {len(images)} held-out images", f"{EPS}"
    return {
        **describe_model(recipe.architecture, arguments, recipe.architecture, run.dataset_name, 0.0),
        "reference": "Zhu, An & Niu 2020, Guess First to Enable Better Compression and Adversarial Robustness",
        "recipe": f"rvaudit train {recipe.id}: {training_of(recipe, run).epochs} epochs, seed {run.seed}, "
        f"{len(data.images)} training images",
        "published": published_accuracies(network, images, labels, EPS, sources),
    }
