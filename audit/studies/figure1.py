"""Figures 1 and 2: train the missing networks of the paper's model set, and write the benchmark that audits it.

Three scales: the bundled digits models, already trained; five small families on a subset of CIFAR-10, for two CPU
cores; the five networks of the paper on all of CIFAR-10, for a GPU.

Source: Zhu, Zhang & Evans 2020, section 4, Figures 1 and 2.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch

from audit.config.benchmark import BenchmarkConfig
from audit.errors import UnknownNameError, UsageError
from audit.storage import write_atomically
from audit.studies.recipes.cifar import EPS, PAPER_RECIPES, SMALL_RECIPES, CifarRecipe, is_trained, train_cifar
from audit.studies.recipes.digits import EPS as DIGITS_EPS
from model_zoo.images.datasets import ImageRequest, ImageSet, load_at_most

_HELD_OUT = 500  # images for the accuracies on the model cards

Progress = Callable[[str, float], None]
"""Receives a description of the current step, and the fraction of the training that is done."""


@dataclass(frozen=True)
class ModelSetScale:
    """A model set and its audit: l-inf radius, number of images (None: all), seeds, attack tier, estimators.

    Without recipes the set is the bundled models.
    """

    dataset: str
    eps: float
    recipes: tuple[CifarRecipe, ...] = ()
    train_images: int | None = None
    images: int | None = None
    seeds: tuple[int, ...] = (0,)
    attack: str = "audit"
    estimators: tuple[str, ...] = ("sandwich", "label-information")


SCALES = {
    "tiny": ModelSetScale("digits", DIGITS_EPS),
    "small": ModelSetScale("cifar10", EPS, SMALL_RECIPES, train_images=4000, images=300),
    "paper": ModelSetScale("cifar10", EPS, PAPER_RECIPES, images=1000, seeds=(0, 1, 2)),
}
"""From minutes on a laptop to the networks of the authors, 150 epochs each."""


@dataclass(frozen=True)
class ModelSetRequest:
    """The scale, and the location of its images other than `data_dir`.

    `data` (held out, for the audit) and `train_data` are references without splits, such as `parquet:PATH`. Raises
    UnknownNameError and UsageError for values that do not fit the scale.
    """

    scale: str
    dataset: str | None = None
    data: str | None = None
    train_data: str | None = None
    data_dir: Path = Path("data")
    offline: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UnknownNameError("scale", self.scale, (*SCALES, "study"))
        legal = self.settings.dataset
        if self.dataset not in (None, legal):
            raise UsageError(f"scale {self.scale} is of data set {legal}, not {self.dataset!r}")
        if not self.settings.recipes and (self.data or self.train_data):
            raise UsageError(f"scale {self.scale} trains nothing and uses the bundled {legal}: omit --data")
        if (self.data is None) != (self.train_data is None):
            raise UsageError(f"data {self.data!r} and train_data {self.train_data!r} must both be given, or neither")
        if self.data is not None and self.data == self.train_data:
            raise UsageError(f"data and train_data are both {self.data!r}: audit networks on held-out images")

    @property
    def settings(self) -> ModelSetScale:
        """The settings of the scale."""
        return SCALES[self.scale]

    def images(self, split: str, count: int | None) -> ImageSet:
        """Return the first `count` images of a split, or all where it has fewer; raises the errors of `load_images`."""
        reference = self.train_data if split == "train" else self.data
        image_request = ImageRequest(count, split if reference is None else "test", self.data_dir, self.offline)
        return load_at_most(reference or self.settings.dataset, image_request)


def prepare_model_set(
    request: ModelSetRequest,
    folder: Path,
    device: torch.device | None = None,
    progress: Progress = lambda _step, _done: None,
) -> Path:
    """Train the networks missing in `folder`/models, write `folder`/benchmark.yaml, and return its path.

    Training resumes after its last complete epoch. Raises UsageError where the folder holds a network of other settings
    or images.
    """
    if request.settings.recipes:
        _train(request, folder / "models", device, progress)
    path = folder / "benchmark.yaml"
    write_atomically(path, json.dumps(model_set_benchmark(request, folder).model_dump(mode="json"), indent=1) + "\n")
    return path


def model_set_benchmark(request: ModelSetRequest, folder: Path) -> BenchmarkConfig:
    """Return the benchmark of a scale, with its trained networks in `folder`/models."""
    scale = request.settings
    models = quote((folder / "models").as_posix())
    trained = [f"file:{models}/{recipe.id}.safetensors" for recipe in scale.recipes]
    fields = {
        "name": f"figure1-{request.scale}",
        "dataset": request.data or scale.dataset,
        "models": trained or ["bundled:digits-*"],
        "threats": [{"norm": "linf", "eps": [scale.eps]}],
        "images": scale.images,
        "seeds": list(scale.seeds),
        "estimators": list(scale.estimators),
        "attack": scale.attack,
    }
    return BenchmarkConfig.model_validate(fields)


def _train(request: ModelSetRequest, folder: Path, device: torch.device | None, progress: Progress) -> None:
    recipes = request.settings.recipes
    train = request.images("train", request.settings.train_images)
    total, done = sum(recipe.passes for recipe in recipes), 0.0
    held_out = None
    for recipe in recipes:
        if not is_trained(recipe, train, folder):
            held_out = held_out or request.images("test", _HELD_OUT)
            epochs_progress = _epoch_progress(progress, recipe, done / total, recipe.passes / total)
            train_cifar(recipe, train, held_out, folder, epochs_progress, device)
        done += recipe.passes
        progress(f"{recipe.id}: trained", done / total)


def _epoch_progress(
    progress: Progress, recipe: CifarRecipe, start: float, share: float
) -> Callable[[int, float], None]:
    epochs = recipe.training.epochs

    def report(epoch: int, loss: float) -> None:
        progress(f"{recipe.id}: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", start + share * (epoch + 1) / epochs)

    return report
