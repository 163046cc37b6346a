"""Figures 4 and 5: saliency maps of the information of a layer and of single features, and their alignment.

Source: Zhu, Zhang & Evans 2020, Figures 4 and 5; Etmann et al. 2019, Definition 3 (alignment).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from audit.attribution.receptive_field import units
from audit.attribution.saliency import (
    Alignment,
    Saliency,
    SaliencySettings,
    alignment,
    feature_saliency,
    layer_saliency,
)
from audit.attribution.single_features import FeatureRequest, Watch
from audit.representation.layers import Representation
from audit.run.cell import Cell
from audit.run.cell_runner import RunOptions
from audit.storage import write_atomically
from audit.studies.networks import Exhibit, opened, preset, second_convolutions
from audit.studies.rows import write_rows
from audit.types import Images

_IMAGES, _EPS, _LEVELS = 300, 0.2, 50
WHOLE = "g"


@dataclass(frozen=True)
class SaliencyStudy:
    """What to draw: saliency settings, the features (none: the layer as a whole), and which images.

    Alignment is measured on all images; `drawn` are the numbers of those whose maps are kept.
    """

    settings: SaliencySettings
    features: tuple[int, ...] = ()
    drawn: tuple[int, ...] = (0, 1, 2)


def figure4_cells(path: Path | None) -> list[Cell]:
    """Return the networks of a benchmark file, or two bundled digits families at their logits."""
    return preset(path, dict.fromkeys(second_convolutions(), "logits"), _IMAGES, _EPS)


def figure5_cells(path: Path | None) -> list[Cell]:
    """Return the networks of a benchmark file, or two bundled digits families at their second convolution."""
    return preset(path, second_convolutions(), _IMAGES, _EPS)


def saliency_study(
    cells: Sequence[Cell], stem: Path, study: SaliencyStudy, options: RunOptions, watch: Watch
) -> list[dict[str, Any]]:
    """Write `stem`.csv (alignment, one row a network and feature) and `stem`.json, and return the rows.

    The JSON holds the maps drawn and, of a layer as a whole, the alignment of every image.
    """
    rows: list[dict[str, Any]] = []
    panels: dict[str, Any] = {}
    for done, cell in enumerate(cells):
        exhibit = opened(cell, options)
        watch(f"{exhibit.facts['model']}, {cell.layer}", done)
        for feature, (maps, noise) in saliency_maps(exhibit, study).items():
            found = alignment(exhibit.images, maps)
            rows.append({**alignment_row(exhibit, feature, found), "noise": noise})
            _keep(panels, exhibit, study.drawn, (feature, maps, found))
    write_rows(stem.with_suffix(".csv"), rows)
    write_atomically(stem.with_suffix(".json"), json.dumps(list(panels.values()), separators=(",", ":")) + "\n")
    return rows


def saliency_maps(exhibit: Exhibit, study: SaliencyStudy) -> dict[str, Saliency]:
    """Return the maps (N, C, H, W) of the layer as a whole, or of each feature named, by its name in rows."""
    network, images, layer = exhibit.network, exhibit.images, exhibit.cell.layer
    read = Representation(network, layer)
    if not study.features:
        return {WHOLE: layer_saliency(read, images, study.settings)}
    columns = units(network, layer, images).columns
    return {
        str(feature): feature_saliency(read, images, _column(columns, feature), study.settings)
        for feature in study.features
    }


def alignment_row(exhibit: Exhibit, feature: str, found: Alignment) -> dict[str, Any]:
    """Return how far maps follow their images: means over images and standard errors, maps of zeros left out."""
    kept = found.alignment.isfinite() & found.correlation.isfinite()
    row = {**exhibit.facts, "feature": feature, "images": len(kept), "zeros": int((~kept).sum())}
    for name, values in found._asdict().items():
        row |= _with_error(name, values[kept])
    return row


def _with_error(name: str, values: Tensor) -> dict[str, float | None]:
    if len(values) < 2:
        return {name: None, f"{name}_se": None}
    return {name: float(values.mean()), f"{name}_se": float(values.std()) / sqrt(len(values))}


def _column(columns: Tensor, feature: int) -> int:
    return int(columns[FeatureRequest((feature,)).chosen(len(columns))])


def _keep(
    panels: dict[str, Any], exhibit: Exhibit, drawn: tuple[int, ...], made: tuple[str, Images, Alignment]
) -> None:
    """Add the maps of the images drawn to the panel of their data set: one map an image, colours averaged."""
    dataset, drawn = exhibit.facts["dataset"], tuple(i for i in drawn if i < len(exhibit.images))
    feature, maps, found = made
    panel = panels.setdefault(
        dataset,
        {"dataset": dataset, "images": [_pixels(exhibit.images[i]) for i in drawn],
         "labels": [int(exhibit.labels[i]) for i in drawn], "maps": []},
    )  # fmt: skip
    panel["maps"].append({
        **exhibit.facts, "feature": feature, "values": [_levels(maps[i].mean(0)) for i in drawn],
        "alignment": [_rounded(float(x)) for x in found.alignment] if feature == WHOLE else [],
    })  # fmt: skip


def _rounded(value: float) -> float | None:
    return round(value, 3) if isfinite(value) else None


def _pixels(image: Tensor) -> list[Any]:
    """An image (C, H, W) as whole grey levels of 255, its last axis the channels (H, W, C)."""
    levels: list[Any] = (255 * image).round().int().permute(1, 2, 0).tolist()
    return levels


def _levels(values: Tensor) -> list[Any]:
    """A map (H, W) as whole numbers from -50 to 50, its largest entry 50 in size."""
    largest = float(values.abs().max())
    levels: list[Any] = (values * (_LEVELS / largest if largest else 0.0)).round().int().tolist()
    return levels
