"""Table 1 of the paper: accuracy of heads on representations learned with and without the worst case.

Rows are written as they are measured; a run resumes where it was interrupted, also within the training of an encoder.

Source: Zhu, Zhang & Evans 2020, section 5.2 and Table 1.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.errors import UsageError
from audit.studies.rows import write_rows
from audit.studies.table1_encoders import BETAS, EncoderStore
from audit.studies.table1_settings import PAPER_ATTACK, DataSplits, Table1Request, load_splits
from audit.training.classifiers import train_classifier
from audit.training.heads import LayerClassifier, ValidationSet, fit_head, make_head
from audit.training.mutual_information import EpochProgress
from model_zoo.architectures.paper_encoder import FEATURES

HEADS = ("mlp", "linear")
EARLY_STOPPED = "worst-case g, standard h, E.S."
EARLY_STOPPED_ON_TEST = "worst-case g, standard h, E.S. on test"
"""Early stopping as in the paper: on the images that the row reports."""
ROWS = (
    "standard g, standard h",
    "standard g, robust h",
    "worst-case g, standard h",
    EARLY_STOPPED,
    EARLY_STOPPED_ON_TEST,
    "worst-case g, robust h",
    "supervised, standard",
    "supervised, robust",
)
COLUMNS = (
    "dataset",
    "scale",
    "seed",
    "row",
    "head",
    "natural",
    "adversarial_pgd7",
    "adversarial_audit",
    "images",
    "eps",
    "attack",
    "settings",
)

Row = dict[str, Any]
WorkProgress = Callable[[str, int, int], None]
"""Receives a description of the current step, the work done, and the total work."""


def run_table1(
    request: Table1Request,
    seeds: int,
    folder: Path,
    device: torch.device | None = None,
    progress: WorkProgress = lambda _step, _done, _total: None,
) -> list[Row]:
    """Return one row per seed, row of the table and head; rows in `folder`/rows.csv are not computed again.

    The folder also gets `encoders/`: every learned encoder as safetensors with a card. Raises UsageError where the
    folder holds rows of other settings.
    """
    splits = load_splits(request)
    if device is not None:
        splits = splits.to(device)
    table = _Table(request, splits, folder, _WorkMeter(_costs(request, splits), seeds, progress))
    for seed in range(seeds):
        for name in BETAS:
            table.add_encoder_rows(name, seed)
        for name in ("standard", "robust"):
            table.add_supervised_rows(name, seed)
    return table.rows


class _WorkMeter:
    """Estimate of the work done, in passes of single images through an encoder, for the remaining time."""

    def __init__(self, costs: dict[str, int], seeds: int, progress: WorkProgress) -> None:
        self.costs, self.progress, self.done = costs, progress, 0
        self.total = seeds * sum(costs.values())

    def epochs_of(self, task: str, step: str, epochs: int) -> EpochProgress:
        """Return a callback for the epochs of a task."""

        def report(epoch: int, _value: float) -> None:
            share = self.costs[task] * (epoch + 1) // epochs
            self.progress(f"{step}, epoch {epoch + 1} of {epochs}", self.done + share, self.total)

        return report

    def finished(self, task: str, step: str) -> None:
        """Count a task that was completed now or in an earlier run."""
        self.done += self.costs[task]
        self.progress(step, self.done, self.total)


def _costs(request: Table1Request, splits: DataSplits) -> dict[str, int]:
    """Return the cost of each task of one seed in passes; a critic step counts 2, the audit of an image 100."""
    scale, (train, validation, test) = request.scale, (len(part.images) for part in splits[:3])
    steps = request.mutual_information(1.0, 0).pgd.steps + 1
    costs = {"standard g": 3 * scale.epochs * train, "worst-case g": (2 * steps + 2) * scale.epochs * train}
    watching = steps * (validation + test) * scale.head_epochs // scale.every
    for head in HEADS:
        robust = steps * scale.robust_epochs * train + 100 * test
        costs |= {f"standard g, standard h, {head}": train + 100 * test, f"standard g, robust h, {head}": robust}
        costs |= {f"worst-case g, standard h, {head}": watching + 300 * test, f"worst-case g, robust h, {head}": robust}
        costs |= {f"supervised, standard, {head}": scale.supervised_epochs * train + 100 * test}
        costs |= {f"supervised, robust, {head}": steps * scale.supervised_epochs * train + 100 * test}
    return costs


class _Table:
    """The rows of one table in one folder."""

    def __init__(self, request: Table1Request, splits: DataSplits, folder: Path, meter: _WorkMeter) -> None:
        self.request, self.splits, self.folder, self.meter = request, splits, folder, meter
        self.encoders = EncoderStore(request, splits, folder)
        self.settings = self.encoders.settings
        self.rows = self._read_rows()

    def add_encoder_rows(self, name: str, seed: int) -> None:
        """Compute the missing rows of one encoder: heads of both kinds, standard and robust."""
        task, names = f"{name} g", [row for row in ROWS if row.startswith(name)]
        missing = [(row, head) for row in names for head in HEADS if not self._has(seed, row, head)]
        encoder = self._encoder(name, seed) if missing else None
        self.meter.finished(task, f"seed {seed}: {task}")
        for head in HEADS:
            for kind in ("standard", "robust"):
                row = f"{name} g, {kind} h"
                if encoder is not None and any(each.startswith(row) and h == head for each, h in missing):
                    self._add_head_rows(encoder, row, head, seed)
                self.meter.finished(f"{row}, {head}", f"seed {seed}: {row}, {head}")

    def add_supervised_rows(self, name: str, seed: int) -> None:
        """Compute the missing rows of classifiers whose encoder and head are trained together."""
        row, training = f"supervised, {name}", self.request.classifier(robust=name == "robust", seed=seed)
        for head_kind in HEADS:
            task, step = f"{row}, {head_kind}", f"seed {seed}: {row}, {head_kind}"
            if not self._has(seed, row, head_kind):
                fit = self.request.head(head_kind, self.splits.classes, robust=False, seed=seed)
                head = make_head(FEATURES, fit)
                network = LayerClassifier(self.encoders.untrained(seed), head).to(self.splits.train.images.device)
                train_classifier(
                    network, *self.splits.train, training, self.meter.epochs_of(task, step, training.epochs)
                )
                self._write(seed, {(row, head_kind): network.requires_grad_(False)})
            self.meter.finished(task, step)

    def _encoder(self, name: str, seed: int) -> nn.Module:
        epochs = self.request.mutual_information(BETAS[name], seed).epochs
        task = f"{name} g"
        return self.encoders.learn(name, seed, self.meter.epochs_of(task, f"seed {seed}: {task}", epochs))

    def _add_head_rows(self, encoder: nn.Module, row: str, head: str, seed: int) -> None:
        """Train one head and write its row, with the rows of early stopping where the paper has them."""
        fit = self.request.head(head, self.splits.classes, robust="robust" in row, seed=seed)
        stopping = {}
        if EARLY_STOPPED.startswith(row):
            stopping = {EARLY_STOPPED: self.splits.validation, EARLY_STOPPED_ON_TEST: self.splits.test}
        watched = {name: ValidationSet(*images, self.request.threat) for name, images in stopping.items()}
        progress = self.meter.epochs_of(f"{row}, {head}", f"seed {seed}: {row}, {head}", fit.epochs)
        fitted = fit_head(encoder, *self.splits.train, fit, watched, progress)
        networks = {(row, head): fitted.last} | {(name, head): each.network for name, each in fitted.best.items()}
        if head == "linear":
            self.encoders.save_with_head(fitted.last, row.partition(" ")[0], seed, robust=fit.threat is not None)
        self._write(seed, networks)

    def _write(self, seed: int, networks: dict[tuple[str, str], LayerClassifier]) -> None:
        """Measure classifiers and write their rows; the rows of one training are written atomically."""
        self.rows += [self._measure(seed, *key, network) for key, network in networks.items()]
        write_rows(self.folder / "rows.csv", self.rows)

    def _measure(self, seed: int, row: str, head: str, network: LayerClassifier) -> Row:
        request, test, tier = self.request, self.splits.test, TIERS[self.request.scale.attack]
        paper, audit = (
            measure_accuracy(network, *test, request.threat, attack, seed) for attack in (PAPER_ATTACK, tier)
        )
        values = (
            request.dataset,
            request.scale_name,
            seed,
            row,
            head,
            paper.natural.value,
            paper.adversarial.value,
            audit.adversarial.value,
            len(test.images),
            request.dataset_settings.eps,
            request.scale.attack,
            self.settings,
        )
        return dict(zip(COLUMNS, values, strict=True))

    def _has(self, seed: int, row: str, head: str) -> bool:
        return any((int(each["seed"]), each["row"], each["head"]) == (seed, row, head) for each in self.rows)

    def _read_rows(self) -> list[Row]:
        path = self.folder / "rows.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
        if any(row.get("settings") != self.settings for row in rows):
            raise UsageError(f"{path} holds rows of other settings or images: name another folder, or delete it")
        return rows
