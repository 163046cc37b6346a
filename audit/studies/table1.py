"""Table 1 of the paper: how well heads do on representations learned with and without the worst case.

Rows are written as they come; a run that was stopped goes on where it was, within a training of an encoder too.

Source: Zhu, Zhang & Evans 2020, section 5.2 and Table 1.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.errors import UsageError
from audit.storage import write_atomically
from audit.studies.rows import write_rows
from audit.studies.table1_settings import PAPER_ATTACK, Parts, Sample, Table1Request, load_parts
from audit.training.classifiers import train_classifier
from audit.training.heads import OnLayer, Watched, fit_head, make_head
from audit.training.mutual_information import Progress, train_representation
from model_zoo.architectures.encoders import FEATURES, PaperEncoder
from model_zoo.weights.checkpoints import fit_weights, read_weights, write_safetensors

HEADS = ("mlp", "linear")
EARLY = "worst-case g, standard h, E.S."
EARLY_ON_TEST = "worst-case g, standard h, E.S. on test"
"""As the paper stopped: on the images that are reported."""
ROWS = (
    "standard g, standard h", "standard g, robust h", "worst-case g, standard h", EARLY, EARLY_ON_TEST,
    "worst-case g, robust h", "supervised, standard", "supervised, robust",
)  # fmt: skip
COLUMNS = (
    "dataset", "scale", "seed", "row", "head", "natural", "adversarial_pgd7", "adversarial_audit", "images", "eps",
    "attack", "settings",
)  # fmt: skip
_BETAS = {"standard": 0.0, "worst-case": 1.0}

Row = dict[str, Any]
Watch = Callable[[str, int, int], None]
"""Hears what is being done, and how much of how much work is behind it."""


def run_table1(
    request: Table1Request,
    seeds: int,
    folder: Path,
    device: torch.device | None = None,
    watch: Watch = lambda _what, _done, _total: None,
) -> list[Row]:
    """Return a row for every seed, row of the table and head; those in `folder`/rows.csv are not computed again.

    The folder also gets `encoders/`: each one learned, as safetensors with a card that says how to audit it. Raises
    UsageError where the folder holds rows of other settings.
    """
    parts = load_parts(request)
    if device is not None:
        train, validation, test = (Sample(*(each.to(device) for each in part)) for part in parts[:3])
        parts = Parts(train, validation, test, parts.classes)
    study = _Study(request, parts, folder, _Meter(_costs(request, parts), seeds, watch))
    for seed in range(seeds):
        for name in _BETAS:
            study.learned(name, seed)
        for name in ("standard", "robust"):
            study.supervised(name, seed)
    return study.rows


class _Meter:
    """How much of the work is done, in passes of single images through an encoder: an estimate, for the time left."""

    def __init__(self, costs: dict[str, int], seeds: int, watch: Watch) -> None:
        self.costs, self.watch, self.done = costs, watch, 0
        self.total = seeds * sum(costs.values())

    def within(self, task: str, what: str, epochs: int) -> Progress:
        """Return what hears the epochs of a task."""

        def heard(epoch: int, _value: float) -> None:
            share = self.costs[task] * (epoch + 1) // epochs
            self.watch(f"{what}, epoch {epoch + 1} of {epochs}", self.done + share, self.total)

        return heard

    def finished(self, task: str, what: str) -> None:
        """Count a task, done now or before."""
        self.done += self.costs[task]
        self.watch(what, self.done, self.total)


def _costs(request: Table1Request, parts: Parts) -> dict[str, int]:
    """Return what each task of one seed costs: passes, a critic's step as two and an audit of an image as 100."""
    scale, (train, validation, test) = request.scale, (len(part.images) for part in parts[:3])
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


class _Study:
    """One table in one folder."""

    def __init__(self, request: Table1Request, parts: Parts, folder: Path, meter: _Meter) -> None:
        self.request, self.parts, self.folder, self.meter = request, parts, folder, meter
        self.settings = request.identity(parts)
        self.rows = self._known()

    def learned(self, name: str, seed: int) -> None:
        """Compute the rows of one encoder that are missing: heads of both kinds, standard and robust."""
        task, names = f"{name} g", [row for row in ROWS if row.startswith(name)]
        missing = [(row, head) for row in names for head in HEADS if not self._has(seed, row, head)]
        encoder = self._encoder(name, seed) if missing else None
        self.meter.finished(task, f"seed {seed}: {task}")
        for head in HEADS:
            for kind in ("standard", "robust"):
                row = f"{name} g, {kind} h"
                if encoder is not None and any(each.startswith(row) and h == head for each, h in missing):
                    self._heads(encoder, row, head, seed)
                self.meter.finished(f"{row}, {head}", f"seed {seed}: {row}, {head}")

    def supervised(self, name: str, seed: int) -> None:
        """Compute the rows of classifiers trained as a whole that are missing."""
        row, training = f"supervised, {name}", self.request.classifier(robust=name == "robust", seed=seed)
        for head in HEADS:
            task, what = f"{row}, {head}", f"seed {seed}: {row}, {head}"
            if not self._has(seed, row, head):
                made = make_head(FEATURES, self.request.head(head, self.parts.classes, robust=False, seed=seed))
                network = OnLayer(self._fresh(seed), made).to(self.parts.train.images.device)
                heard = self.meter.within(task, what, training.epochs)
                train_classifier(network, *self.parts.train, training, heard)
                self._write(seed, {(row, head): network.requires_grad_(False)})
            self.meter.finished(task, what)

    def _heads(self, encoder: nn.Module, row: str, head: str, seed: int) -> None:
        """Train one head and write its row; with it, where the paper has them, the rows of early stopping."""
        fit = self.request.head(head, self.parts.classes, robust="robust" in row, seed=seed)
        stopping = {}
        if EARLY.startswith(row):
            stopping = {EARLY: self.parts.validation, EARLY_ON_TEST: self.parts.test}
        watched = {name: Watched(*sample, self.request.threat) for name, sample in stopping.items()}
        heard = self.meter.within(f"{row}, {head}", f"seed {seed}: {row}, {head}", fit.epochs)
        fitted = fit_head(encoder, *self.parts.train, fit, watched, heard)
        found = {(row, head): fitted.last} | {(name, head): each.network for name, each in fitted.best.items()}
        if head == "linear":
            self._save(fitted.last, row.partition(" ")[0], seed, robust=fit.threat is not None)
        self._write(seed, found)

    def _save(self, classifier: OnLayer, name: str, seed: int, *, robust: bool) -> None:
        """Write an encoder with its linear head, a model whose layer `penultimate` is the representation."""
        parts = {"0": classifier.layer, "1": classifier.head}
        tensors = {f"{place}.{name}": each for place, part in parts.items() for name, each in part.state_dict().items()}
        path = self.folder / "encoders" / f"{self._stem(name, seed)}-{'robust' if robust else 'standard'}-h.safetensors"
        sha256 = write_safetensors(tensors, path)
        card = self._card(path.stem, self.parts.classes, robust=robust or _BETAS[name] > 0)
        _write_card(path, card | {"sha256": sha256})

    def _write(self, seed: int, networks: dict[tuple[str, str], OnLayer]) -> None:
        """Measure classifiers and write their rows; those of one training are written together or not at all."""
        self.rows += [self._measured(seed, *key, network) for key, network in networks.items()]
        write_rows(self.folder / "rows.csv", self.rows)

    def _measured(self, seed: int, row: str, head: str, network: OnLayer) -> Row:
        request, test, tier = self.request, self.parts.test, TIERS[self.request.scale.attack]
        paper, audit = (
            measure_accuracy(network, *test, request.threat, attack, seed) for attack in (PAPER_ATTACK, tier)
        )
        values = (
            request.dataset, request.scale_name, seed, row, head, paper.natural.value, paper.adversarial.value,
            audit.adversarial.value, len(test.images), request.subject.eps, request.scale.attack, self.settings,
        )  # fmt: skip
        return dict(zip(COLUMNS, values, strict=True))

    def _encoder(self, name: str, seed: int) -> nn.Module:
        """Return an encoder that is in the folder already, or learn it."""
        stem = self._stem(name, seed)
        weights, encoder = self.folder / "encoders" / f"{stem}.safetensors", self._fresh(seed)
        card = weights.with_suffix(".json")
        if card.exists() and json.loads(card.read_text(encoding="utf-8")).get("settings") == self.settings:
            fit_weights(encoder, read_weights(weights))
        else:
            training, kept = self.request.mutual_information(_BETAS[name], seed), self.folder / f"{stem}.checkpoint"
            heard = self.meter.within(f"{name} g", f"seed {seed}: {name} g", training.epochs)
            train_representation(encoder, self.parts.train.images, training, heard, kept)
            sha256 = write_safetensors(encoder.state_dict(), weights)
            made = {"mutual_information": training.identity(), "sha256": sha256}
            _write_card(weights, self._card(stem, 0, robust=_BETAS[name] > 0) | made)
            kept.unlink(missing_ok=True)
        return encoder.eval().requires_grad_(False)

    def _fresh(self, seed: int) -> PaperEncoder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = PaperEncoder(self._shape, self.request.scale.width)
        return encoder.to(self.parts.train.images.device)

    def _card(self, stem: str, classes: int, *, robust: bool) -> dict[str, Any]:
        """Return a card as those of the recipes, so that `file:PATH` loads the encoder by it; 0 classes: no head."""
        arguments = {"image_shape": list(self._shape), "width": self.request.scale.width, "num_classes": classes}
        return {
            "id": stem,
            "architecture": "paper-encoder",
            "arguments": arguments,
            "num_classes": classes,
            "image_shape": list(self._shape),
            "family": "paper-encoder",
            "dataset": self.request.dataset,
            "training": "robust" if robust else "standard",
            "trained_norm": "linf" if robust else "",
            "trained_eps": self.request.subject.eps if robust else 0.0,
            "licence": "MIT",
            "reference": "Zhu, Zhang & Evans 2020, section 5",
            "recipe": f"rvaudit reproduce table1 --dataset {self.request.dataset} --scale {self.request.scale_name}",
            "published": [],
            "settings": self.settings,
        }

    def _stem(self, name: str, seed: int) -> str:
        return f"{self.request.dataset}-{self.request.scale_name}-{name}-seed{seed}"

    @property
    def _shape(self) -> tuple[int, int, int]:
        channels, height, width = self.parts.train.images.shape[1:]
        return channels, height, width

    def _has(self, seed: int, row: str, head: str) -> bool:
        return any((int(each["seed"]), each["row"], each["head"]) == (seed, row, head) for each in self.rows)

    def _known(self) -> list[Row]:
        path = self.folder / "rows.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            rows: list[Row] = list(csv.DictReader(file))
        if any(row.get("settings") != self.settings for row in rows):
            raise UsageError(f"{path} holds rows of other settings or images: name another folder, or delete it")
        return rows


def _write_card(weights: Path, card: dict[str, Any]) -> None:
    write_atomically(weights.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
