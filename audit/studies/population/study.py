"""Train and measure every network of the study, one row each as it ends; a stopped run resumes.

Source: Zhu, Zhang & Evans 2020, Figure 1, with a population in place of fifteen networks.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from audit.errors import IntegrityError, UsageError
from audit.storage import digest, write_atomically
from audit.studies.population.measures import StudyData, information, measure_outcomes, measure_predictors
from audit.studies.population.plan import Plan, StudyRecipe, StudySet, read_plan
from audit.studies.recipes.model_cards import build_seeded, describe_model, write_model
from audit.studies.rows import write_rows
from audit.training.classifiers import train_classifier
from model_zoo.architectures import build
from model_zoo.images.datasets import ImageRequest, ImageSet, load_images
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.weights.checkpoints import copy_weights, read_weights

VERSION = 1
"""Incremented when the same plan gives other rows."""
_IDENTITY = (
    "model", "family", "training", "method", "multiple", "trained_eps", "seed", "held_back", "dataset", "eps",
    "settings",
)  # fmt: skip

Progress = Callable[[str, int], None]
"""Receives the name of the network at work and the number of networks done."""


@dataclass(frozen=True)
class PopulationRequest:
    """The data set of the study, where its images are, how many training seeds, and the folder of rows and networks.

    `data` are held-out images without splits, such as parquet:PATH; without `train_data` they are divided, the first
    ones to train on. Raises UsageError for fewer than one seed or more than the plan has.
    """

    dataset: str = "digits"
    data: str | None = None
    train_data: str | None = None
    seeds: int | None = None
    folder: Path = Path("runs/figure1-study")
    data_dir: Path = Path("data")
    offline: bool = False
    subset: str | None = None
    plan: Plan = field(default_factory=lambda: read_plan())

    def __post_init__(self) -> None:
        self.plan.chosen_set(self.dataset)
        known = len(self.plan.values["population"]["seeds"])
        if self.seeds is not None and not 1 <= self.seeds <= known:
            raise UsageError(f"{self.seeds} training seeds were asked for; the plan of the study has {known}")
        if self.train_data is not None and self.train_data == self.data:
            raise UsageError(f"data and train_data are both {self.data!r}: audit networks on held-out images")

    @property
    def path(self) -> Path:
        """The path of the rows."""
        return self.folder / f"{self.dataset}.csv"

    @property
    def recipes(self) -> tuple[StudyRecipe, ...]:
        """The networks of the chosen seeds, in the order of training."""
        chosen = self.plan.values["population"]["seeds"][: self.seeds]
        every = self.plan.recipes(self.plan.chosen_set(self.dataset))
        return tuple(recipe for recipe in every if recipe.seed in chosen)


def run_population(request: PopulationRequest, progress: Progress = lambda _name, _done: None) -> Path:
    """Train, measure and store every network that has no row yet, and return the path of the rows.

    The folder also gets `plan.toml` and `models/<dataset>/`, weights with cards. Raises UsageError where it holds rows
    of another plan or of other images.
    """
    study = _Population(request)
    write_atomically(request.folder / "plan.toml", request.plan.text)
    for done, recipe in enumerate(request.recipes):
        progress(recipe.id, done)
        study.measure(recipe)
    progress("rows", len(request.recipes))
    return request.path


def measure_subset(request: PopulationRequest, progress: Progress = lambda _name, _done: None) -> Path:
    """Measure the costly estimators of the plan's subset, as far as rows lack them, and return the path of the rows.

    Raises UsageError where a network of the subset has no row yet.
    """
    study = _Population(request)
    chosen = [recipe for recipe in request.recipes if in_subset(recipe, request.plan)]
    for done, recipe in enumerate(chosen):
        progress(recipe.id, done)
        study.complete(recipe)
    return request.path


def in_subset(recipe: StudyRecipe, plan: Plan) -> bool:
    """Return whether the plan's rule names a network for its costly estimators; standard training is in every rule."""
    rule = plan.values["subset"]
    trained = recipe.method in rule["methods"] or not recipe.multiple
    return trained and recipe.family in rule["families"] and recipe.seed in rule["seeds"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an unfinished study, [] without a file; raises IntegrityError for other columns."""
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if any(tuple(row)[: len(_IDENTITY)] != _IDENTITY or None in row.values() for row in rows):
        raise IntegrityError(f"{path} holds other columns than this version of the study writes: delete it")
    return rows


def load_data(request: PopulationRequest) -> StudyData:
    """Return the images of a request; raises the errors of `load_images`, and UsageError for too few images."""
    chosen = request.plan.chosen_set(request.dataset)
    if request.data is None or request.train_data is not None:
        train = _load(request, request.train_data, "train", chosen.train)
        held = _load(request, request.data, "test", chosen.images)
        return _data(chosen, train, slice(None), held, slice(None))
    both = _load(request, request.data, "test", chosen.train + chosen.images)
    return _data(chosen, both, slice(chosen.train), both, slice(chosen.train, None))


def _load(request: PopulationRequest, reference: str | None, split: str, count: int) -> ImageSet:
    chosen = request.plan.chosen_set(request.dataset)
    size = (chosen.side, chosen.side)
    resized = Preprocessing(resize=size, fit="exact", channels=chosen.channels) if chosen.side else None
    where = split if reference is None else "test"
    asked = ImageRequest(count, where, request.data_dir, request.offline, preprocessing=resized)
    return load_images(reference or request.dataset, asked)


def _data(chosen: StudySet, train: ImageSet, training: slice, held: ImageSet, testing: slice) -> StudyData:
    return StudyData(
        chosen,
        train.images[training],
        train.labels[training],
        held.images[testing],
        held.labels[testing],
        len(train.classes),
        digest([train.sha256, held.sha256])[:16],
    )


class _Population:
    """One run of the study on one data set: its images and its rows."""

    def __init__(self, request: PopulationRequest) -> None:
        self.request, self.plan = request, request.plan
        self.rows = read_rows(request.path)
        self._data: StudyData | None = None
        self.settings = self._identity() if self.rows else ""
        if {row["settings"] for row in self.rows} - {self.settings}:
            raise UsageError(f"{request.path} holds rows of another plan or of other images: name another folder")

    @property
    def data(self) -> StudyData:
        """The images, loaded when they are first needed."""
        if self._data is None:
            self._data = load_data(self.request)
        return self._data

    def _identity(self) -> str:
        values = self.plan.values
        named = {name: values[name] for name in ("training", "search")}
        chosen = values["sets"][self.request.dataset]
        families = values["population"]["families"]
        return digest({"version": VERSION, "set": chosen, "families": families, "images": self.data.sha256} | named)[
            :12
        ]

    def measure(self, recipe: StudyRecipe) -> None:
        """Train and measure a network, unless it has a row."""
        if any(row["model"] == recipe.id for row in self.rows):
            return
        self.settings = self.settings or self._identity()
        network = self._built(recipe)
        train_classifier(network, self.data.images, self.data.labels, recipe.training)
        network.requires_grad_(False)
        values = measure_outcomes(network, self.data)
        values |= measure_predictors(network, self.data, self.plan.values["search"])
        self._write_network(recipe, network, values)
        optional = dict.fromkeys(self._subset_columns(), "")
        self.rows.append(self._labels(recipe) | values | optional)
        write_rows(self.request.path, self.rows)

    def complete(self, recipe: StudyRecipe) -> None:
        """Measure the costly estimators of a network whose row lacks them."""
        row = next((row for row in self.rows if row["model"] == recipe.id), None)
        if row is None:
            raise UsageError(f"{recipe.id} has no row yet: run the study without a subset first")
        network = None
        for column, name in self._subset().items():
            if row[column] == "":
                network = network or self._stored(recipe)
                found = information(network, self.data, "logits", name, self.plan.values["search"])
                row[column] = found[f"rv_{name.replace('-', '_')}_logits"]
                write_rows(self.request.path, self.rows)

    def _subset(self) -> Mapping[str, str]:
        rule = self.plan.values["subset"]
        every: dict[str, str] = rule["estimators"] | rule["optional"]
        wanted = self.request.subset
        names = {column: name for column, name in every.items() if wanted in (None, name)}
        if not names:
            raise UsageError(f"subset estimator {wanted!r} is none of {', '.join(every.values())}")
        return rule["estimators"] if wanted is None else names

    def _subset_columns(self) -> tuple[str, ...]:
        rule = self.plan.values["subset"]
        return (*rule["estimators"], *rule["optional"])

    def _arguments(self, recipe: StudyRecipe) -> dict[str, Any]:
        shape = tuple(self.data.images.shape[1:])
        return {"image_shape": shape, "num_classes": self.data.classes, **recipe.arguments}

    def _built(self, recipe: StudyRecipe) -> nn.Module:
        return build_seeded(lambda: build(recipe.architecture, self._arguments(recipe)), recipe.training.seed)

    def _weights(self, recipe: StudyRecipe) -> Path:
        return self.request.folder / "models" / self.request.dataset / f"{recipe.id}.safetensors"

    def _stored(self, recipe: StudyRecipe) -> nn.Module:
        network = self._built(recipe)
        copy_weights(network, read_weights(self._weights(recipe)))
        return network.eval().requires_grad_(False)

    def _write_network(self, recipe: StudyRecipe, network: nn.Module, values: Mapping[str, float]) -> None:
        data = self.data.chosen
        source = f"measured on {data.images} held-out images"
        card = {
            "id": recipe.id,
            **describe_model(
                recipe.architecture, self._arguments(recipe), recipe.family, data.name, recipe.trained_eps
            ),
            "reference": "a population of networks after Zhu, Zhang & Evans 2020, Figure 1",
            "recipe": f"rvaudit reproduce figure1 --scale study: {recipe.method}, {data.epochs} epochs, "
            f"seed {recipe.training.seed}, {data.train} training images",
            "settings": self.settings,
            "published": [
                {"metric": f"{name}_accuracy", "value": values[name], "source": source}
                for name in ("natural", "adversarial")
            ],
        }
        self._weights(recipe).parent.mkdir(parents=True, exist_ok=True)
        write_model(network, self._weights(recipe), card)

    def _labels(self, recipe: StudyRecipe) -> dict[str, Any]:
        training = "robust" if recipe.multiple else "standard"
        values = (
            recipe.id, recipe.family, training, recipe.method, recipe.multiple, recipe.trained_eps, recipe.seed,
            recipe.held_back, self.request.dataset, self.data.chosen.eps, self.settings,
        )  # fmt: skip
        return dict(zip(_IDENTITY, values, strict=True))
