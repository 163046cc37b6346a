"""Figures 1 and 2: the paper's model set, trained where it is missing, and the benchmark that audits it.

Three scales: the bundled digits zoo, which is trained already; four families on some CIFAR-10 images for two cores;
the paper's five networks on all of them for a GPU.

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
from audit.studies.recipes.cifar import EPS, PAPER, SMALL, CifarRecipe, is_trained, train_cifar
from audit.studies.recipes.digits import EPS as DIGITS_EPS
from model_zoo.images.load import ImageRequest, ImageSet, load_at_most

_HELD_OUT = 500  # images that the accuracies on cards are measured on

Watch = Callable[[str, float], None]
"""Hears what is being done, and which share of the training is behind it."""


@dataclass(frozen=True)
class Scale:
    """A model set and how it is audited: at which l-inf radius, on how many images (None for all), seeds, tier.

    Without recipes the set is the bundled zoo.
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
    "tiny": Scale("digits", DIGITS_EPS),
    "small": Scale("cifar10", EPS, SMALL, train_images=4000, images=300),
    "paper": Scale("cifar10", EPS, PAPER, images=1000, seeds=(0, 1, 2)),
}
"""From a laptop's minutes to the authors' networks, 150 epochs each."""


@dataclass(frozen=True)
class ModelSetRequest:
    """Which scale, and where its images are if not in their usual place.

    `data` is audited on and held out, `train_data` trained on: references without splits, such as `parquet:PATH`.
    Raises UnknownNameError and UsageError for what does not fit the scale.
    """

    scale: str
    dataset: str | None = None
    data: str | None = None
    train_data: str | None = None
    data_dir: Path = Path("data")
    offline: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UnknownNameError("scale", self.scale, SCALES)
        legal = self.settings.dataset
        if self.dataset not in (None, legal):
            raise UsageError(f"scale {self.scale} is of data set {legal}, not {self.dataset!r}")
        if not self.settings.recipes and (self.data or self.train_data):
            raise UsageError(f"scale {self.scale} trains nothing and takes the bundled {legal}: leave out --data")
        if (self.data is None) != (self.train_data is None):
            raise UsageError(f"data {self.data!r} and train_data {self.train_data!r} must both be given, or neither")
        if self.data is not None and self.data == self.train_data:
            raise UsageError(f"data and train_data are both {self.data!r}: audit networks on images they never saw")

    @property
    def settings(self) -> Scale:
        """Return the settings of the scale."""
        return SCALES[self.scale]

    def images(self, split: str, count: int | None) -> ImageSet:
        """Return the first images of a split; all of a set that has fewer. Raises what `load_images` raises."""
        named = self.train_data if split == "train" else self.data
        asked = ImageRequest(count, split if named is None else "test", self.data_dir, self.offline)
        return load_at_most(named or self.settings.dataset, asked)


def prepare(
    request: ModelSetRequest,
    folder: Path,
    device: torch.device | None = None,
    watch: Watch = lambda _what, _share: None,
) -> Path:
    """Train the networks that `folder`/models lacks, write `folder`/benchmark.yaml and return its path.

    A training that was stopped goes on at its last whole epoch. Raises UsageError where a network is there, of other
    settings or images.
    """
    if request.settings.recipes:
        _train(request, folder / "models", device, watch)
    path = folder / "benchmark.yaml"
    write_atomically(path, json.dumps(benchmark(request, folder).model_dump(mode="json"), indent=1) + "\n")
    return path


def benchmark(request: ModelSetRequest, folder: Path) -> BenchmarkConfig:
    """Return the benchmark of a scale, its networks in `folder`/models."""
    scale = request.settings
    models = quote((folder / "models").as_posix())
    trained = [f"file:{models}/{recipe.id}.safetensors" for recipe in scale.recipes]
    asked = {
        "name": f"figure1-{request.scale}",
        "dataset": request.data or scale.dataset,
        "models": trained or ["bundled:digits-*"],
        "threats": [{"norm": "linf", "eps": [scale.eps]}],
        "images": scale.images,
        "seeds": list(scale.seeds),
        "estimators": list(scale.estimators),
        "attack": scale.attack,
    }
    return BenchmarkConfig.model_validate(asked)


def _train(request: ModelSetRequest, folder: Path, device: torch.device | None, watch: Watch) -> None:
    recipes = request.settings.recipes
    train = request.images("train", request.settings.train_images)
    total, done = sum(recipe.passes for recipe in recipes), 0.0
    held_out = None
    for recipe in recipes:
        if not is_trained(recipe, train, folder):
            held_out = held_out or request.images("test", _HELD_OUT)
            heard = _heard(watch, recipe, done / total, recipe.passes / total)
            train_cifar(recipe, train, held_out, folder, heard, device)
        done += recipe.passes
        watch(f"{recipe.id}: trained", done / total)


def _heard(watch: Watch, recipe: CifarRecipe, start: float, share: float) -> Callable[[int, float], None]:
    epochs = recipe.training.epochs

    def heard(epoch: int, loss: float) -> None:
        watch(f"{recipe.id}: epoch {epoch + 1} of {epochs}, loss {loss:.3f}", start + share * (epoch + 1) / epochs)

    return heard
