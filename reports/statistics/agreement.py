"""Do the estimators put the models in the same order? Kendall's tau-b of their RVs, and how firm each one stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from reports.estimators import place
from reports.statistics.correlation import Correlation, Vector
from reports.statistics.gap_statistics import kendall
from reports.tables.table import SETTING, setting_title, sound

_MODEL = ["model", "weights_sha256"]


@dataclass(frozen=True)
class Firmness:
    """How far RV (nats, estimate) moves: its median standard error, and its spread between models."""

    models: int
    error: float | None
    spread: float | None
    ranks: bool


@dataclass(frozen=True)
class Agreement:
    """The estimators of one setting, what each pair says of the models both cover, and how firm each one is."""

    title: str
    estimators: Sequence[str]
    taus: dict[tuple[str, str], Correlation]
    firmness: dict[str, Firmness]

    def tau(self, one: str, other: str) -> Correlation:
        """Return Kendall's tau-b of two different estimators, in either order."""
        return self.taus[(one, other) if (one, other) in self.taus else (other, one)]


def agreements(frame: pd.DataFrame) -> list[Agreement]:
    """Return the agreement of estimators for every data set, layer and threat that at least two of them cover.

    A pair is compared over the models that both cover and neither row of which is contradicted. Estimators that do
    not claim to rank take part, so that a reader sees whether a replication orders the models as the others do.
    """
    found = []
    for _, rows in frame.drop_duplicates("cell_id", keep="last").groupby(list(SETTING), sort=True):
        names = sorted(set(rows["estimator"]), key=place)
        if len(names) > 1:
            found.append(_agreement(rows, names))
    return found


def _agreement(rows: pd.DataFrame, names: Sequence[str]) -> Agreement:
    firmness = {name: _firmness(rows[rows["estimator"] == name]) for name in names}
    usable = rows[sound(rows)]
    taus = {pair: _tau(usable, *pair) for pair in combinations(names, 2)}
    return Agreement(setting_title(rows.iloc[0]), names, taus, firmness)


def _tau(rows: pd.DataFrame, one: str, other: str) -> Correlation:
    first, second = (_by_model(rows[rows["estimator"] == name]) for name in (one, other))
    both = first.merge(second, on=_MODEL, suffixes=("_one", "_other"))
    return kendall(_vector(both["rv_one"]), _vector(both["rv_other"]))


def _by_model(rows: pd.DataFrame) -> pd.DataFrame:
    # a model audited twice in a setting, with other seeds say, counts once
    return rows.sort_values("cell_id").drop_duplicates(_MODEL, keep="last")[[*_MODEL, "rv"]]


def _firmness(rows: pd.DataFrame) -> Firmness:
    usable = rows[sound(rows)]
    rv, error = _vector(usable["rv"]), usable["rv_se"].dropna()
    return Firmness(
        models=len(usable),
        error=None if error.empty else float(error.median()),
        spread=float(np.std(rv, ddof=1)) if len(rv) > 1 else None,
        ranks=bool(rows["ranks"].all()),
    )


def _vector(series: "pd.Series[float]") -> Vector:
    return np.asarray(series, dtype=np.float64)
