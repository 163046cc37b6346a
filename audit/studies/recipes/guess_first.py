"""Recipes of "Guess First": networks on label hypotheses, their baselines, and the substitute of black-box attacks.

Source: Zhu, An & Niu 2020, section 4.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.errors import UsageError
from audit.storage import write_atomically
from audit.training.label_hypothesis import HypothesisTraining, train_hypothesis
from model_zoo.architectures import build
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.weights.checkpoints import write_safetensors

EPS = 0.15
"""The radius of the accuracies on the cards, l-inf, in pixel units: the paper's smaller one."""

ELIMINATION, WARM_UP = 0.1, 0.5
"""The weight of information elimination, and the share of the epochs before it begins.

At weight 1, or without warm-up, networks on 8,000 digits of MNIST stay at chance; at 0.1 after half of the epochs one
seed of each named .97 and .98 of 800 training images put aside. On the small digits: benchmarks/elimination.py.
"""

KL_WEIGHT = 1e-2
"""The weight of the information bottleneck's divergence, chosen in the same way."""

_SHOWN = 500  # held-out images that a card's accuracies are measured on


@dataclass(frozen=True)
class GuessFirstRecipe:
    """One column of the paper's table: an architecture and how it is trained."""

    id: str
    architecture: str
    training: HypothesisTraining

    @property
    def variant(self) -> str:
        """The name without its prefix: c-js-ie, say."""
        return self.id.rpartition("/")[2]


@dataclass(frozen=True)
class GuessFirstRun:
    """What a recipe is trained on and for how long; None takes the recipe's own number of epochs.

    A set with splits is trained on its first `count` training images (all, without it) and measured on its test
    images. A reference without splits, such as parquet:PATH, is cut: the first `count` images (four fifths, without
    it) are trained on, the rest is held out.
    """

    dataset: str = "digits"
    count: int | None = None
    epochs: int | None = None
    seed: int = 0
    data_dir: Path = Path("data")

    @property
    def dataset_name(self) -> str:
        """The data set's name, or of a reference the name of its file, without the folders of this machine."""
        _, colon, path = self.dataset.partition(":")
        return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).stem if colon else self.dataset)

    def name(self, recipe: GuessFirstRecipe) -> str:
        """Return the stem of the files: recipe, data set and seed."""
        return f"guess-first-{recipe.variant}-{self.dataset_name}-{self.seed}"


class TrainingData(NamedTuple):
    """Images (N, C, H, W) and labels (N,) to learn from, held-out ones (M, C, H, W) and (M,), and the classes."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    classes: tuple[str, ...]


def _recipes() -> dict[str, GuessFirstRecipe]:
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


GUESS_FIRST = _recipes()
"""The six columns of the paper's table and `lenet`, the substitute, by name."""


def load_training_data(run: GuessFirstRun) -> TrainingData:
    """Return what a run learns from and what it holds out.

    Raises what `load_images` raises, and UsageError where `count` leaves nothing to hold out.
    """
    if ":" not in run.dataset:
        request = ImageRequest(run.count, "train", run.data_dir)
        train, test = load_images(run.dataset, request), load_images(run.dataset, ImageRequest(data_dir=run.data_dir))
        return TrainingData(train.images, train.labels, test.images, test.labels, train.classes)
    whole = load_images(run.dataset)
    count = len(whole.images) * 4 // 5 if run.count is None else run.count
    if not 0 < count < len(whole.images):
        raise UsageError(
            f"{count} of the {len(whole.images)} images of {run.dataset} are to be trained on: "
            f"legal are 1 to {len(whole.images) - 1}, the rest is held out"
        )
    parts = whole.images[:count], whole.labels[:count], whole.images[count:], whole.labels[count:]
    return TrainingData(*parts, whole.classes)


def fresh_network(recipe: GuessFirstRecipe, data: TrainingData, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a recipe's network with initial weights of a seed, and the arguments it is built with."""
    arguments: dict[str, Any] = {"image_shape": tuple(data.images.shape[1:]), "num_classes": len(data.classes)}
    # initial weights are drawn globally by torch: fix the draw, leave the caller's stream alone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(recipe.architecture, arguments), arguments


def train_guess_first(
    recipe: GuessFirstRecipe,
    run: GuessFirstRun,
    folder: Path,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
    data: TrainingData | None = None,
) -> dict[str, Any]:
    """Train a recipe's network, write its weights and card `<name>.safetensors` and `.json`, and return the card.

    A run that was stopped is taken up at its last whole epoch, from `<name>.partial.pt` in the same folder. `data`
    spares reading the data set again. Load the result as `file:<folder>/<name>.safetensors`.
    """
    data = load_training_data(run) if data is None else data
    training = training_of(recipe, run)
    network, arguments = fresh_network(recipe, data, run.seed)
    folder.mkdir(parents=True, exist_ok=True)
    name = run.name(recipe)
    partial = folder / f"{name}.partial.pt"
    train_hypothesis(network, data.images, data.labels, training, progress, partial)
    sha256 = write_safetensors(network.state_dict(), folder / f"{name}.safetensors")
    card = _card(recipe, run, arguments, network, data) | {"id": name, "sha256": sha256}
    write_atomically(folder / f"{name}.json", json.dumps(card, indent=1) + "\n")
    partial.unlink(missing_ok=True)
    return card


def training_of(recipe: GuessFirstRecipe, run: GuessFirstRun) -> HypothesisTraining:
    """Return the settings of a recipe's training in a run."""
    epochs = recipe.training.epochs if run.epochs is None else run.epochs
    return replace(recipe.training, epochs=epochs, seed=run.seed)


def _card(
    recipe: GuessFirstRecipe, run: GuessFirstRun, arguments: dict[str, Any], network: nn.Module, data: TrainingData
) -> dict[str, Any]:
    network.requires_grad_(False)
    attack = TIERS["smoke"]
    images, labels = data.held_out_images[:_SHOWN], data.held_out_labels[:_SHOWN]
    measured = measure_accuracy(network, images, labels, Linf(EPS), attack, seed=0)
    source = f"measured on the first {len(images)} held-out images"
    return {
        "architecture": recipe.architecture,
        "arguments": arguments,
        "num_classes": arguments["num_classes"],
        "image_shape": list(arguments["image_shape"]),
        "family": recipe.architecture,
        "dataset": run.dataset_name,
        "training": "standard",
        "trained_norm": "",
        "trained_eps": 0.0,
        "licence": "MIT",
        "reference": "Zhu, An & Niu 2020, Guess First to Enable Better Compression and Adversarial Robustness",
        "recipe": f"rvaudit train {recipe.id}: {training_of(recipe, run).epochs} epochs, seed {run.seed}, "
        f"{len(data.images)} training images",
        "published": [
            {"metric": "natural_accuracy", "value": measured.natural.value, "source": source},
            {
                "metric": "adversarial_accuracy",
                "value": measured.adversarial.value,
                "source": f"{source}, {attack.name} at l-inf {EPS}",
            },
        ],
    }
