"""Figures 4 and 5: saliency maps of the information in a layer and in single features, and their alignment.

Source: Zhu, Zhang & Evans 2020, Figures 4 and 5; Etmann et al. 2019, Definition 3 (alignment).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from audit.attribution.receptive_field import unit_features
from audit.attribution.saliency import (
    Alignment,
    Saliency,
    SaliencySettings,
    alignment,
    feature_saliency,
    layer_saliency,
)
from audit.attribution.single_features import FeatureRequest
from audit.representation.layers import Representation
from audit.run.cell import Cell
from audit.run.loading import RunOptions, batches_for
from audit.storage import write_atomically
from audit.studies.figure_networks import CellProgress, LoadedCell, figure_cells, load_cell, second_convolutions
from audit.studies.rows import write_rows
from audit.types import Images

_IMAGES, _EPS, _MAP_LEVELS = 300, 0.2, 50
WHOLE_LAYER = "g"


@dataclass(frozen=True)
class SaliencyStudy:
    """Saliency settings, the features (none: the layer as a whole), and the images to draw.

    Alignment is measured on all images; `drawn` are the indices of the images whose maps are stored.
    """

    settings: SaliencySettings
    features: tuple[int, ...] = ()
    drawn: tuple[int, ...] = (0, 1, 2)


def figure4_cells(path: Path | None) -> list[Cell]:
    """Return the cells of a benchmark file, or two bundled digits families at their logits."""
    return figure_cells(path, dict.fromkeys(second_convolutions(), "logits"), _IMAGES, _EPS)


def figure5_cells(path: Path | None) -> list[Cell]:
    """Return the cells of a benchmark file, or two bundled digits families at their second convolution."""
    return figure_cells(path, second_convolutions(), _IMAGES, _EPS)


def saliency_study(
    cells: Sequence[Cell], stem: Path, study: SaliencyStudy, options: RunOptions, progress: CellProgress
) -> list[dict[str, Any]]:
    """Write `stem`.csv (alignment, one row per network and feature) and `stem`.json, and return the rows.

    The JSON holds the drawn maps and, for a layer as a whole, the alignment of every image.
    """
    rows: list[dict[str, Any]] = []
    panels: dict[str, Any] = {}
    for done, cell in enumerate(cells):
        loaded = load_cell(cell, options)
        progress(f"{loaded.facts['model']}, {cell.layer}", done)
        with batches_for(loaded.network, loaded.images, options):
            found_maps = saliency_maps(loaded, study)
        for feature, (maps, noise) in found_maps.items():
            found = alignment(loaded.images, maps)
            rows.append({**alignment_row(loaded, feature, found), "noise": noise})
            _add_to_panel(panels, loaded, study.drawn, (feature, maps, found))
    write_rows(stem.with_suffix(".csv"), rows)
    write_atomically(stem.with_suffix(".json"), json.dumps(list(panels.values()), separators=(",", ":")) + "\n")
    return rows


def saliency_maps(loaded: LoadedCell, study: SaliencyStudy) -> dict[str, Saliency]:
    """Return the maps (N, C, H, W) of the layer as a whole, or of every named feature, keyed by the name in rows."""
    network, images, layer = loaded.network, loaded.images, loaded.cell.layer
    representation = Representation(network, layer)
    if not study.features:
        return {WHOLE_LAYER: layer_saliency(representation, images, study.settings)}
    columns = unit_features(network, layer, images).columns
    return {
        str(feature): feature_saliency(representation, images, _feature_column(columns, feature), study.settings)
        for feature in study.features
    }


def alignment_row(loaded: LoadedCell, feature: str, found: Alignment) -> dict[str, Any]:
    """Return the mean alignment and correlation of maps and images with standard errors, without zero maps."""
    kept = found.alignment.isfinite() & found.correlation.isfinite()
    row = {**loaded.facts, "feature": feature, "images": len(kept), "zeros": int((~kept).sum())}
    for name, values in found._asdict().items():
        row |= _mean_and_error(name, values[kept])
    return row


def _mean_and_error(name: str, values: Tensor) -> dict[str, float | None]:
    if len(values) < 2:
        return {name: None, f"{name}_se": None}
    return {name: float(values.mean()), f"{name}_se": float(values.std()) / sqrt(len(values))}


def _feature_column(columns: Tensor, feature: int) -> int:
    return int(columns[FeatureRequest((feature,)).chosen(len(columns))])


def _add_to_panel(
    panels: dict[str, Any], loaded: LoadedCell, drawn: tuple[int, ...], result: tuple[str, Images, Alignment]
) -> None:
    """Add the maps of the drawn images to the panel of their data set, averaged over colour channels."""
    dataset, drawn = loaded.facts["dataset"], tuple(i for i in drawn if i < len(loaded.images))
    feature, maps, found = result
    panel = panels.setdefault(
        dataset,
        {
            "dataset": dataset,
            "images": [_to_bytes(loaded.images[i]) for i in drawn],
            "labels": [int(loaded.labels[i]) for i in drawn],
            "maps": [],
        },
    )
    panel["maps"].append(
        {
            **loaded.facts,
            "feature": feature,
            "values": [_quantise(maps[i].mean(0)) for i in drawn],
            "alignment": [_rounded(float(x)) for x in found.alignment] if feature == WHOLE_LAYER else [],
        }
    )


def _rounded(value: float) -> float | None:
    return round(value, 3) if isfinite(value) else None


def _to_bytes(image: Tensor) -> list[Any]:
    """Return an image (C, H, W) as integers 0 to 255, channels last (H, W, C)."""
    levels: list[Any] = (255 * image).round().int().permute(1, 2, 0).tolist()
    return levels


def _quantise(values: Tensor) -> list[Any]:
    """Return a map (H, W) as integers from -50 to 50, scaled so that the largest magnitude is 50."""
    largest = float(values.abs().max())
    levels: list[Any] = (values * (_MAP_LEVELS / largest if largest else 0.0)).round().int().tolist()
    return levels
