"""The networks of a figure: the cells of a benchmark file or of the bundled models, and how they are loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from audit.adversary.threat import ThreatModel
from audit.config.benchmark import BenchmarkConfig
from audit.config.settings import AuditSettings
from audit.config.yaml_source import read_config
from audit.run.cell import Cell, InputRules, expand
from audit.run.loading import RunOptions, open_images_for, open_model
from audit.types import Images, Labels

_TRAININGS = ("standard", "robust-quarter", "robust")
# the second convolution before norm and ReLU: a rectified unit has no gradient where it is inactive
_SECOND_CONVOLUTIONS = {"baseline-h": "convolutions.1.0", "vgg": "stages.1.0"}

CellProgress = Callable[[str, int], None]
"""Receives a description of the next cell and the number of cells done."""


@dataclass(frozen=True)
class LoadedCell:
    """The loaded contents of a cell: network in eval mode, images (N, C, H, W), labels (N,), shared row columns."""

    cell: Cell
    network: nn.Module
    images: Images
    labels: Labels
    facts: dict[str, Any]


def figure_cells(path: Path | None, layers: dict[str, str], images: int, eps: float) -> list[Cell]:
    """Return the cells of a benchmark file, or without one those of bundled digits networks at the given layers."""
    if path is not None:
        return expand(read_config(path))
    models = [
        {"ref": f"bundled:digits-{family}-{training}", "layers": [layer]}
        for family, layer in layers.items()
        for training in _TRAININGS
    ]
    fields = {
        "name": "figure",
        "dataset": "digits",
        "images": images,
        "models": models,
        "threats": [{"norm": "linf", "eps": [eps]}],
        "estimators": ["sandwich"],
    }
    return expand(BenchmarkConfig.model_validate(fields))


def second_convolutions() -> dict[str, str]:
    """Return the second convolution layer of each bundled family with two consecutive plain convolutions."""
    return dict(_SECOND_CONVOLUTIONS)


def layer_cell(
    ref: str, dataset: str, layer: str, threat: ThreatModel, *, images: int, rules: InputRules | None = None
) -> Cell:
    """Return the cell of one layer of a model, on the first images of a data set."""
    return Cell(ref, None, dataset, images, layer, threat, AuditSettings(), rules=rules or InputRules())


def load_cell(cell: Cell, options: RunOptions) -> LoadedCell:
    """Load the network and images of a cell; raises the errors of loading, and MismatchError where they do not fit."""
    found = open_images_for(cell.ref, cell.dataset, options, options.request(cell.images), cell.rules)
    model = open_model(cell.ref, found, options, min_images=2)
    facts = {
        "model": cell.name or model.entry.name,
        "family": model.entry.family or model.entry.architecture,
        "training": model.entry.training,
        "trained_eps": float(model.entry.trained_eps),
        "dataset": _without_folder(cell.dataset),
        "layer": cell.layer,
    }
    return LoadedCell(cell, model.network, found.images, found.labels, facts)


def _without_folder(dataset: str) -> str:
    """Drop the folder of a data set reference, which differs between machines."""
    scheme, colon, path = dataset.partition(":")
    return f"{scheme}:{Path(path).name}" if colon else dataset
