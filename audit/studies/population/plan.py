"""The plan of the study: networks, data, outcomes, predictors and statistics, read from `plan.toml`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.training.classifiers import METHODS, ClassifierTraining

PLAN_FILE = Path(__file__).with_name("plan.toml")
"""The plan of the published rows."""
STANDARD = "standard"
"""The training group of networks trained without a threat model."""


@dataclass(frozen=True)
class StudySet:
    """A data set of the study: radii in pixel units, image sizes, numbers of images, epochs, and new labels.

    `side` is the side in pixels that images are resized to, 0 for none. The first `heads` training images train new
    heads; the first `images` held-out images measure accuracies, and the first `information` of them information.
    """

    name: str
    eps: float
    l2: float
    side: int
    channels: int
    train: int
    heads: int
    images: int
    information: int
    epochs: int
    transfer: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("train", "heads", "images", "information", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of study set {self.name} must be at least 1")
        for larger, smaller in (("train", "heads"), ("images", "information")):
            if getattr(self, smaller) > getattr(self, larger):
                raise UsageError(f"{smaller} {getattr(self, smaller)} of study set {self.name} exceeds its {larger}")


@dataclass(frozen=True)
class StudyRecipe:
    """One network of the study: family, architecture, method and radius of training in pixel units, and seed.

    `multiple` is the radius in audited radii; `held_back` networks take no part in any choice.
    """

    family: str
    architecture: str
    arguments: Mapping[str, int]
    method: str
    multiple: float
    seed: int
    held_back: bool
    training: ClassifierTraining

    @property
    def id(self) -> str:
        """The name of the network, such as resnet-trades-0.25-seed1."""
        return f"{self.family}-{self.method}-{self.multiple:g}-seed{self.seed}"

    @property
    def trained_eps(self) -> float:
        """The l-inf radius of training in pixel units; 0 for standard training."""
        return self.training.threat.eps if self.training.threat else 0.0


class Plan:
    """A plan as read: its sections as plain values, its data sets and its networks.

    Raises UsageError for a plan that lacks a section, UnknownNameError for a held-back family or method that it does
    not train.
    """

    def __init__(self, text: str) -> None:
        self.text, self.values = text, tomllib.loads(text)
        needed = ("population", "held_back", "training", "sets", "outcomes", "predictors", "subset", "search")
        missing = [name for name in needed if name not in self.values]
        if missing:
            raise UsageError(f"the plan lacks the sections {', '.join(missing)}")
        population, held = self.values["population"], self.values["held_back"]
        for name in population["methods"]:
            if name not in METHODS:
                raise UnknownNameError("training method", name, METHODS)
        for kind in ("families", "methods"):
            for name in held[kind]:
                if name not in population[kind]:
                    raise UnknownNameError(f"held-back {kind}", name, population[kind])

    @cached_property
    def sets(self) -> dict[str, StudySet]:
        """The data sets by name."""
        return {
            name: StudySet(name, **values | {"transfer": tuple(values["transfer"])})
            for name, values in self.values["sets"].items()
        }

    def chosen_set(self, name: str) -> StudySet:
        """Return a data set by name; raises UnknownNameError with the nearest name."""
        if name not in self.sets:
            raise UnknownNameError("data set of the study", name, self.sets)
        return self.sets[name]

    def recipes(self, chosen: StudySet) -> tuple[StudyRecipe, ...]:
        """Return all networks of a data set in the order of training: seeds, then training groups, then families."""
        population = self.values["population"]
        groups = [(STANDARD, 0.0)] if 0 in population["radii"] else []
        groups += [(method, radius) for radius in population["radii"] if radius for method in population["methods"]]
        return tuple(
            self._recipe(chosen, family, group, seed)
            for seed in population["seeds"]
            for group in groups
            for family in population["families"]
        )

    def _recipe(self, chosen: StudySet, family: str, group: tuple[str, float], seed: int) -> StudyRecipe:
        (method, multiple), held = group, self.values["held_back"]
        arguments = dict(self.values["population"]["families"][family])
        return StudyRecipe(
            family=family,
            architecture=arguments.pop("architecture"),
            arguments=arguments,
            method=method,
            multiple=multiple,
            seed=seed,
            held_back=family in held["families"] or method in held["methods"],
            training=self._training(chosen, group, self._key(family, group, seed)),
        )

    def _training(self, chosen: StudySet, group: tuple[str, float], key: int) -> ClassifierTraining:
        (method, multiple), settings = group, self.values["training"]
        robust: dict[str, Any] = {"method": method, "threat": Linf(multiple * chosen.eps)} if multiple else {}
        return ClassifierTraining(
            epochs=chosen.epochs,
            batch_size=settings["batch_size"],
            pgd=PGD(settings["steps"], settings["relative_step"]),
            seed=key,
            **robust,
        )

    def _key(self, family: str, group: tuple[str, float], seed: int) -> int:
        """Return the seed of one network: different for every network of the plan."""
        population = self.values["population"]
        methods = (STANDARD, *population["methods"])
        row, column = list(population["families"]).index(family), methods.index(group[0])
        return 10_000 * seed + 1000 * row + 100 * column + population["radii"].index(group[1])


def read_plan(path: Path = PLAN_FILE) -> Plan:
    """Return the plan of a file; raises IntegrityError for a file that is no TOML, and the errors of `Plan`."""
    try:
        return Plan(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise IntegrityError(f"{path} is no plan of a study: {error}") from error
