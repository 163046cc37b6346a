"""Figure 3: what each channel of a second convolution tells, and how much of it an adversary takes away.

Source: Zhu, Zhang & Evans 2020, Figure 3 and section 5.3.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from audit.attribution.single_features import FeatureAudit, FeatureRequest, FeatureSettings, audit_features
from audit.attribution.single_features import Watch as Watch
from audit.run.cell import Cell
from audit.run.cell_runner import RunOptions
from audit.studies.networks import Exhibit, opened, preset, second_convolutions
from audit.studies.rows import write_rows

_IMAGES, _EPS = 500, 0.05


def figure3_cells(path: Path | None) -> list[Cell]:
    """Return the networks of a benchmark file, or the bundled digits families at a quarter of their audited radius.

    At the audited radius of 0.2 every feature of every network can be moved to one value.
    """
    return preset(path, second_convolutions(), _IMAGES, _EPS)


def figure3(
    cells: Sequence[Cell], out: Path, settings: FeatureSettings, options: RunOptions, watch: Watch
) -> list[dict[str, Any]]:
    """Measure the features of each cell's network, write figure3.csv into a folder, and return its rows."""
    rows: list[dict[str, Any]] = []
    for done, cell in enumerate(cells):
        exhibit = opened(cell, options)
        watch(f"{exhibit.facts['model']}, {cell.layer}", done)
        request = FeatureRequest(seed=cell.settings.seeds[0])
        found = audit_features(exhibit.network, exhibit.images, cell.layer, cell.threat, settings, request)
        rows += feature_rows(exhibit, found, settings)
        write_rows(out / "figure3.csv", rows)
    return rows


def feature_rows(exhibit: Exhibit, found: FeatureAudit, settings: FeatureSettings) -> list[dict[str, Any]]:
    """Return one row a feature, the most vulnerable first."""
    shared = {
        **exhibit.facts, "norm": exhibit.cell.threat.norm, "eps": exhibit.cell.threat.eps, "images": found.images,
        "unit": "x".join(map(str, found.unit)), "field": "x".join(map(str, found.field)),
        "noise": settings.noise, "scale": settings.scale,
    }  # fmt: skip
    return [{**shared, **asdict(row)} for row in found.rows]
