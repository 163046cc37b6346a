"""Figure 3: mutual information of every channel of a second convolution, in the normal and in the worst case.

Source: Zhu, Zhang & Evans 2020, Figure 3 and section 5.3.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from audit.attribution.single_features import FeatureAudit, FeatureRequest, FeatureSettings, audit_features
from audit.run.cell import Cell
from audit.run.loading import RunOptions
from audit.studies.figure_networks import CellProgress, LoadedCell, figure_cells, load_cell, second_convolutions
from audit.studies.rows import write_rows

_IMAGES, _EPS = 500, 0.05


def figure3_cells(path: Path | None) -> list[Cell]:
    """Return the cells of a benchmark file, or the bundled digits families at a quarter of their audited radius.

    At the audited radius of 0.2 an adversary can move every feature of every network to a single value.
    """
    return figure_cells(path, second_convolutions(), _IMAGES, _EPS)


def figure3(
    cells: Sequence[Cell], out: Path, settings: FeatureSettings, options: RunOptions, progress: CellProgress
) -> list[dict[str, Any]]:
    """Audit the features of every cell, write figure3.csv into `out`, and return its rows."""
    rows: list[dict[str, Any]] = []
    for done, cell in enumerate(cells):
        loaded = load_cell(cell, options)
        progress(f"{loaded.facts['model']}, {cell.layer}", done)
        request = FeatureRequest(seed=cell.settings.seeds[0])
        found = audit_features(loaded.network, loaded.images, cell.layer, cell.threat, settings, request)
        rows += feature_rows(loaded, found, settings)
        write_rows(out / "figure3.csv", rows)
    return rows


def feature_rows(loaded: LoadedCell, found: FeatureAudit, settings: FeatureSettings) -> list[dict[str, Any]]:
    """Return one row per feature, the most vulnerable first."""
    shared = {
        **loaded.facts,
        "norm": loaded.cell.threat.norm,
        "eps": loaded.cell.threat.eps,
        "images": found.images,
        "unit": "x".join(map(str, found.unit)),
        "field": "x".join(map(str, found.field)),
        "noise": settings.noise,
        "scale": settings.scale,
    }
    return [{**shared, **asdict(row)} for row in found.rows]
