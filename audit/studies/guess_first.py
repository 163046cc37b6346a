"""The "Guess First" study: train, attack and audit every recipe and seed, writing rows as they are measured.

A finished (recipe, seed) is not measured again, and an interrupted training resumes.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness", section 4.
"""

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from audit.adversary.robustness import TargetModel
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.hashing import tensors_sha256
from audit.information.sandwich import Sandwich
from audit.storage import digest
from audit.studies.adaptive_attack import TransferImages
from audit.studies.attack_table import (
    AttackedClassifier,
    AttackRow,
    AttackTableSettings,
    AuditedLayer,
    attack_table_rows,
    craft_black_box_images,
    stage_count,
)
from audit.studies.recipes.guess_first import (
    GUESS_FIRST_RECIPES,
    GuessFirstRecipe,
    GuessFirstRun,
    build_network,
    load_training_data,
    train_guess_first,
    training_of,
)
from audit.studies.rows import write_rows
from model_zoo.architectures.hypothesis_baselines import VIB
from model_zoo.architectures.hypothesis_net import HypothesisNet, SingleHypothesisView
from model_zoo.weights.checkpoints import copy_weights, read_weights

RECIPES = ("cnn", "c-dv", "c-js", "c-dv-ie", "c-js-ie", "vib")
VERSION = 2
"""Incremented when the same settings give other rows."""
_SUBSTITUTE_RECIPE = "lenet"
_SUBSTITUTE_SEED_OFFSET = 1000  # offset of the seed of the substitute from the seed of the attacked models
_NOISE, _WIDE_NOISE = 0.5, 2.5  # in layer deviations: for 256 features the same fraction of the total as for ten
_IDENTITY = ("recipe", "seed", "dataset", "training", "settings")
COLUMNS = (*_IDENTITY, *(known.name for known in fields(AttackRow)))

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class GuessFirstSettings:
    """Data, number of seeds, epochs and images of the study, and its output folder.

    `data` is a reference such as `parquet:PATH` to images without splits, of which the last fifth is held out; without
    it, the training and test splits of `dataset` are used. The first `count` held-out images are used (None: all).
    `recipes` may be a subset.
    """

    dataset: str = "digits"
    data: str = ""
    seeds: int = 3
    epochs: int = 40
    count: int | None = None
    folder: Path = Path("runs/guess-first")
    table: AttackTableSettings = field(default_factory=AttackTableSettings)
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
        """The path of the rows."""
        return self.folder / f"{self.dataset}.csv"

    @property
    def steps(self) -> int:
        """The number of steps that `run_guess_first` reports: epochs, and stages of the measurements."""
        return self.seeds * (self.epochs + len(self.recipes) * self.steps_of_one)

    @property
    def steps_of_one(self) -> int:
        """The number of steps of one recipe and seed."""
        return self.epochs + stage_count(self.table)

    def run(self, seed: int) -> GuessFirstRun:
        """Return the training run of one seed."""
        return GuessFirstRun(self.data or self.dataset, epochs=self.epochs, seed=seed, data_dir=self.data_dir)


def run_guess_first(settings: GuessFirstSettings, progress: Progress = lambda _step, _done: None) -> Path:
    """Train, attack and audit every recipe and seed that has no rows yet, and return the path of the rows.

    `progress` receives a description and the number of completed `settings.steps`. The folder also gets `models/`,
    weights with cards. Raises UsageError where it holds rows of other settings.
    """
    table = _GuessFirstTable(settings, progress)
    for seed in range(settings.seeds):
        table.measure_seed(seed)
    return settings.path


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of an unfinished study, [] without a file; raises IntegrityError for other columns."""
    if not path.exists():
        return []
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    if any(tuple(row) != COLUMNS for row in rows):
        raise IntegrityError(f"{path} holds other columns than this version of the study writes: delete it")
    return rows


class _GuessFirstTable:
    """One run of the study: data, rows, and progress."""

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
        identity = {
            "version": VERSION,
            "table": settings.table.name,
            "data": tensors_sha256(*self.data[:2]),
            "held_out": tensors_sha256(self.images, self.labels),
            "training": [repr(training_of(each, settings.run(0))) for each in GUESS_FIRST_RECIPES.values()],
        }
        return digest(identity)[:12]

    def measure_seed(self, seed: int) -> None:
        """Measure the missing recipes of one seed."""
        finished = {row["recipe"] for row in self.rows if int(row["seed"]) == seed}
        missing = [recipe for recipe in self.settings.recipes if recipe not in finished]
        self.done += self.settings.steps_of_one * (len(self.settings.recipes) - len(missing))
        if not missing:
            self.done += self.settings.epochs
            return
        substitute = self._trained(_find_recipe(_SUBSTITUTE_RECIPE), seed + _SUBSTITUTE_SEED_OFFSET)
        transfer = craft_black_box_images(self._target(substitute), self.settings.table, seed)
        for name in missing:
            self._measure(name, seed, transfer)

    def _measure(self, name: str, seed: int, transfer: tuple[TransferImages, ...]) -> None:
        recipe = _find_recipe(name)
        network = self._trained(recipe, seed)
        classifier = AttackedClassifier(self._target(network), transfer, audited_layers(network))
        rows = attack_table_rows(
            classifier, self.settings.table, seed, lambda stage: self._step(f"{name}, seed {seed}: {stage}")
        )
        self._append(recipe, seed, rows)

    def _trained(self, recipe: GuessFirstRecipe, seed: int) -> nn.Module:
        """Return a trained network, loaded from its file where it was trained before."""
        run, folder = self.settings.run(seed), self.settings.folder / "models" / self.identity
        path = folder / f"{run.name(recipe)}.safetensors"
        if path.exists() and path.with_suffix(".json").exists():
            self.done += self.settings.epochs
        else:
            done_before = self.done
            train_guess_first(
                recipe, run, folder, lambda epoch, _: self._report_epoch(recipe, seed, done_before, epoch), self.data
            )
            self.done = done_before + self.settings.epochs
        network = build_network(recipe, self.data, seed)[0]
        copy_weights(network, read_weights(path))
        return network.eval().requires_grad_(False)

    def _report_epoch(self, recipe: GuessFirstRecipe, seed: int, done_before: int, epoch: int) -> None:
        self.progress(f"{recipe.variant}, seed {seed}: epoch {epoch + 1}", done_before + epoch)

    def _target(self, network: nn.Module) -> TargetModel:
        return TargetModel(network, self.images, self.labels)

    def _step(self, what: str) -> None:
        self.progress(what, self.done)
        self.done += 1

    def _append(self, recipe: GuessFirstRecipe, seed: int, found: Iterable[AttackRow]) -> None:
        training = training_of(recipe, self.settings.run(seed))
        description = f"{training.epochs} epochs on {len(self.data.images)} images"
        values = recipe.variant, seed, self.settings.dataset, description, self.identity
        identity = dict(zip(_IDENTITY, values, strict=True))
        self.rows += [identity | asdict(row) for row in found]
        write_rows(self.settings.path, self.rows)


def audited_layers(network: nn.Module) -> tuple[AuditedLayer, ...]:
    """Return the audited layers of a network: its logits, and the second dense layer.

    Under all hypotheses that layer has 2,560 features, which separate every image; it is audited under the predicted
    hypothesis.
    """
    wide = Sandwich(noise=_WIDE_NOISE)
    layer = "mean" if isinstance(network, VIB) else "fc2"
    module = SingleHypothesisView(network) if isinstance(network, HypothesisNet) else network
    return AuditedLayer("logits", network, "logits", Sandwich(noise=_NOISE)), AuditedLayer("fc2", module, layer, wide)


def _find_recipe(name: str) -> GuessFirstRecipe:
    return GUESS_FIRST_RECIPES[f"guess-first/{name}"]
