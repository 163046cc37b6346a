"""The networks of a figure: a benchmark file says which, at which layer, on which images, at which radius."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from audit.config.benchmark import BenchmarkConfig
from audit.run.cell import Cell, read_config
from audit.run.cell_runner import RunOptions, device_of
from audit.run.layer_audit import check_input
from audit.run.run_loop import expand
from audit.types import Images, Labels
from model_zoo.images.load import ImageRequest, check_fit, load_images
from model_zoo.load import load_model

_TRAININGS = ("standard", "robust-quarter", "robust")
# the second convolution itself, before norm and ReLU: a rectified unit has no gradient where it is silent
_SECOND = {"baseline-h": "convolutions.1.0", "vgg": "stages.1.0"}


@dataclass(frozen=True)
class Exhibit:
    """A network in eval mode, images (N, C, H, W) with labels (N,), and what rows say of both."""

    cell: Cell
    network: nn.Module
    images: Images
    labels: Labels
    facts: dict[str, Any]


def preset(path: Path | None, layers: dict[str, str], images: int, eps: float) -> list[Cell]:
    """Return the cells of a benchmark file, or without one those of the bundled digits networks of some families."""
    if path is not None:
        return expand(read_config(path))
    models = [
        {"ref": f"bundled:digits-{family}-{training}", "layers": [layer]}
        for family, layer in layers.items()
        for training in _TRAININGS
    ]
    asked = {"name": "figure", "dataset": "digits", "images": images, "models": models,
             "threats": [{"norm": "linf", "eps": [eps]}], "estimators": ["sandwich"]}  # fmt: skip
    return expand(BenchmarkConfig.model_validate(asked))


def second_convolutions() -> dict[str, str]:
    """Return the bundled families with two plain convolutions in a row, and the name of the second."""
    return dict(_SECOND)


def opened(cell: Cell, options: RunOptions) -> Exhibit:
    """Load what a cell names; raises UsageError or MismatchError where it cannot be had or does not fit."""
    device = device_of(options.device)
    request = ImageRequest(count=cell.images, data_dir=options.data_dir, offline=options.sources.offline)
    found, model = load_images(cell.dataset, request), load_model(cell.ref, options.sources)
    model.network.to(device).eval()
    check_fit(model, found)
    images, labels = found.images.to(device), found.labels.to(device)
    check_input(model.network, images, labels, fewest=2)
    facts = {
        "model": cell.name or model.entry.name, "family": model.entry.family or model.entry.architecture,
        "training": model.entry.training, "trained_eps": float(model.entry.trained_eps),
        "dataset": _without_folder(cell.dataset), "layer": cell.layer,
    }  # fmt: skip
    return Exhibit(cell, model.network, images, labels, facts)


def _without_folder(dataset: str) -> str:
    """Rows must not tell where a file lay on one machine."""
    scheme, colon, path = dataset.partition(":")
    return f"{scheme}:{Path(path).name}" if colon else dataset
