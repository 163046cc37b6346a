"""Laws of the rows that stand in the repository: worst cases do not rise with the radius, nor by following a search."""

from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[3]
RECORDS = [
    path
    for path in sorted((ROOT / "docs").rglob("*.csv"))
    if {"cell_id", "model", "layer", "estimator", "norm", "eps", "worst_nats"} <= set(pd.read_csv(path, nrows=0))
]
FOLLOWING = ROOT / "benchmarks" / "results" / "following.csv"
TOLERANCE = 0.05  # nats, by which a search may miss


def rising(rows: pd.DataFrame, columns: list[str], value: str, tolerance: float = 0.0) -> list[str]:
    """Return the cells whose value is larger at a larger radius, within groups of equal columns."""
    found = []
    for _, group in rows.dropna(subset=[value]).sort_values("eps").groupby(columns):
        rises = group[value] > group[value].cummin() + tolerance
        found += [f"{row.model} {row.layer} {row.eps}" for row in group[rises].itertuples()]
    return found


def test_records_are_read():
    assert {path.parent.name for path in RECORDS} >= {"digits", "third-party"}


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_no_worst_case_rises_with_the_radius(path):
    assert not rising(pd.read_csv(path), ["model", "dataset", "layer", "estimator", "norm"], "worst_nats")


def test_searches_that_follow_are_as_good_as_searches_from_scratch():
    rows = pd.read_csv(FOLLOWING)
    assert len(rows) == 18
    assert (rows["after"] <= rows["alone"] + TOLERANCE).all()
    assert not rising(rows, ["model", "layer"], "after")
    assert not rising(rows, ["model", "layer"], "alone", TOLERANCE)


def test_a_worst_case_that_rises_is_found():
    rows = pd.DataFrame({"model": "m", "layer": "logits", "eps": [0.1, 0.3, 0.2], "after": [1.0, 0.9, 0.8]})
    assert rising(rows, ["model", "layer"], "after") == ["m logits 0.3"]
