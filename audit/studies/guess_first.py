"""The "Guess First" study: every recipe and seed trained, attacked and audited; rows written as they come.

A finished (recipe, seed) is not measured again, and a training that was stopped goes on where it was.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness", section 4.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from audit.adversary.robustness import Target
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.hashing import tensors_sha256
from audit.information.sandwich import Sandwich
from audit.storage import digest
from audit.studies.adaptive import Crafted
from audit.studies.attack_table import Reading, Row, Study, TableSettings, craft_all, stages, table_rows
from audit.studies.recipes.guess_first import (
    GUESS_FIRST,
    GuessFirstRecipe,
    GuessFirstRun,
    fresh_network,
    load_training_data,
    train_guess_first,
    training_of,
)
from audit.studies.rows import write_rows
from model_zoo.architectures.hypothesis import VIB, Hypothesised, HypothesisNet
from model_zoo.weights.checkpoints import fit_weights, read_weights

RECIPES = ("cnn", "c-dv", "c-js", "c-dv-ie", "c-js-ie", "vib")
VERSION = 1
"""Raised when rows would come out differently from the same settings."""
_SUBSTITUTE = "lenet"
_OTHER_SEED = 1000  # the substitute is drawn and trained by another seed than the models it stands for
_WIDE_NOISE = 2.5  # in layer deviations: on 256 features as much of the whole as a half is on ten
_IDENTITY = ("recipe", "seed", "dataset", "training", "settings")
COLUMNS = (*_IDENTITY, *(known.name for known in fields(Row)))

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class GuessFirstSettings:
    """What the study is asked for: data, how many seeds, epochs and images, and where rows go.

    `data` is a reference such as `parquet:PATH` to images without splits, of which the last fifth is held out; without
    it, the train and test splits of `dataset` are taken. The first `count` held-out images are used, all where it is
    None. `recipes` may name fewer than all.
    """

    dataset: str = "digits"
    data: str = ""
    seeds: int = 3
    epochs: int = 40
    count: int | None = None
    folder: Path = Path("runs/guess-first")
    table: TableSettings = field(default_factory=TableSettings)
    recipes: tuple[str, ...] = RECIPES
    data_dir: Path = Path("data")

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} must be at least 1")
        for recipe in self.recipes:
            if recipe not in RECIPES:
                raise UnknownNameError("recipe", recipe, RECIPES)

    @property
    def path(self) -> Path:
        """Where the rows lie."""
        return self.folder / f"{self.dataset}.csv"

    @property
    def steps(self) -> int:
        """How many steps `run_guess_first` counts: epochs, and stages of the measurements."""
        return self.seeds * (self.epochs + len(self.recipes) * self.steps_of_one)

    @property
    def steps_of_one(self) -> int:
        """How many of them one recipe and seed take."""
        return self.epochs + stages(self.table)

    def run(self, seed: int) -> GuessFirstRun:
        """Return what a recipe of one seed is trained on."""
        return GuessFirstRun(self.data or self.dataset, epochs=self.epochs, seed=seed, data_dir=self.data_dir)


def run_guess_first(settings: GuessFirstSettings, progress: Progress = lambda _what, _done: None) -> Path:
    """Train, attack and audit every recipe and seed that has no rows yet, and return the path of the rows.

    `progress` hears what is going on and how many of `settings.steps` are behind. The folder also gets `models/`, as
    weights with cards. Raises UsageError where it holds rows of other settings.
    """
    study = _Study(settings, progress)
    for seed in range(settings.seeds):
        study.seed(seed)
    return settings.path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of an unfinished study, none where there is no file; raises IntegrityError for another file."""
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if any(tuple(row) != COLUMNS for row in rows):
        raise IntegrityError(f"{path} holds other columns than this version of the study writes: delete it")
    return rows


class _Study:
    """One run: the data, the rows so far, and how far it is."""

    def __init__(self, settings: GuessFirstSettings, progress: Progress) -> None:
        self.settings, self.progress, self.done = settings, progress, 0
        self.data = load_training_data(settings.run(0))
        self.images, self.labels = (each[: settings.count] for each in self.data[2:4])
        self.identity = self._identity()
        self.rows: list[dict[str, Any]] = list(read_rows(settings.path))
        if {row["settings"] for row in self.rows} - {self.identity}:
            raise UsageError(f"{settings.path} holds rows of other settings: name another folder, or delete the file")

    def _identity(self) -> str:
        settings = self.settings
        decided = {"version": VERSION, "table": settings.table.name, "data": tensors_sha256(*self.data[:2]),
                   "held_out": tensors_sha256(self.images, self.labels),
                   "training": [repr(training_of(each, settings.run(0))) for each in GUESS_FIRST.values()]}  # fmt: skip
        return digest(decided)[:12]

    def seed(self, seed: int) -> None:
        """Measure what is missing of one seed."""
        finished = {row["recipe"] for row in self.rows if int(row["seed"]) == seed}
        missing = [recipe for recipe in self.settings.recipes if recipe not in finished]
        self.done += self.settings.steps_of_one * (len(self.settings.recipes) - len(missing))
        if not missing:
            self.done += self.settings.epochs
            return
        substitute = self._trained(_recipe(_SUBSTITUTE), seed + _OTHER_SEED)
        crafted = craft_all(self._target(substitute), self.settings.table, seed)
        for name in missing:
            self._measure(name, seed, crafted)

    def _measure(self, name: str, seed: int, crafted: tuple[Crafted, ...]) -> None:
        recipe = _recipe(name)
        network = self._trained(recipe, seed)
        study = Study(self._target(network), crafted, readings(network))
        found = table_rows(study, self.settings.table, seed, lambda stage: self._step(f"{name}, seed {seed}: {stage}"))
        self._append(recipe, seed, found)

    def _trained(self, recipe: GuessFirstRecipe, seed: int) -> nn.Module:
        """Return a trained network, from its file where it was trained before."""
        run, folder = self.settings.run(seed), self.settings.folder / "models" / self.identity
        path = folder / f"{run.name(recipe)}.safetensors"
        if path.exists() and path.with_suffix(".json").exists():
            self.done += self.settings.epochs
        else:
            begun = self.done
            train_guess_first(recipe, run, folder, lambda epoch, _: self._trains(recipe, seed, begun, epoch), self.data)
            self.done = begun + self.settings.epochs
        network = fresh_network(recipe, self.data, seed)[0]
        fit_weights(network, read_weights(path))
        return network.eval().requires_grad_(False)

    def _trains(self, recipe: GuessFirstRecipe, seed: int, begun: int, epoch: int) -> None:
        self.progress(f"{recipe.variant}, seed {seed}: epoch {epoch + 1}", begun + epoch)

    def _target(self, network: nn.Module) -> Target:
        return Target(network, self.images, self.labels)

    def _step(self, what: str) -> None:
        self.progress(what, self.done)
        self.done += 1

    def _append(self, recipe: GuessFirstRecipe, seed: int, found: Iterable[Row]) -> None:
        training = training_of(recipe, self.settings.run(seed))
        words = f"{training.epochs} epochs on {len(self.data.images)} images"
        identity = zip(_IDENTITY, (recipe.variant, seed, self.settings.dataset, words, self.identity), strict=True)
        named = dict(identity)
        self.rows += [named | asdict(row) for row in found]
        write_rows(self.settings.path, self.rows)


def readings(network: nn.Module) -> tuple[Reading, ...]:
    """Return the layers to read of a network of the study: its scores, and the second dense layer.

    Under all hypotheses at once that layer has 2,560 features, on which every image stands alone; it is read under the
    predicted one.
    """
    wide = Sandwich(noise=_WIDE_NOISE)
    layer = "mean" if isinstance(network, VIB) else "fc2"
    module = Hypothesised(network) if isinstance(network, HypothesisNet) else network
    return Reading("logits", network, "logits", Sandwich()), Reading("fc2", module, layer, wide)


def _recipe(name: str) -> GuessFirstRecipe:
    return GUESS_FIRST[f"guess-first/{name}"]
