"""Rows of the "Guess First" study aggregated over seeds: mean, standard deviation and trust."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pandas as pd

from audit.errors import EnvironmentFault, IntegrityError
from reports.studies.guess_first_paper import Line

NEEDED = ("recipe", "seed", "dataset", "attack", "access", "norm", "eps", "layer", "images", "accuracy", "excess",
          "trusted", "verdict")  # fmt: skip
_NUMBERS = (
    "eps", "images", "accuracy", "low", "high", "excess", "normal_nats", "worst_nats", "rv", "rv_se", "accuracy_bound",
)  # fmt: skip
_NAMED_OTHERWISE = {"mean": "fc2"}  # of VIB: where other networks have their second dense layer


class Over(NamedTuple):
    """Mean and standard deviation over seeds, and the number of seeds."""

    mean: float
    deviation: float
    seeds: int


@dataclass(frozen=True)
class Figure:
    """An accuracy over seeds, the images it was measured on, whether every seed's attack holds, and the verdicts.

    `excess` is the mean share of images that the adaptive attack breaks beyond it, 0 where it is not a single attack.
    """

    over: Over
    images: int
    trusted: bool
    verdicts: tuple[str, ...]
    excess: float

    @property
    def variance(self) -> float:
        """The squared error of the mean: of the seeds, and of the images, which all seeds share."""
        share = self.over.mean
        return self.over.deviation**2 / self.over.seeds + share * (1 - share) / self.images


def read_rows(path: Path) -> pd.DataFrame:
    """Return the rows of a study's CSV.

    Raises EnvironmentFault where it is not there, IntegrityError for another file.
    """
    if not Path(path).exists():
        raise EnvironmentFault(f"{path} is not there: `rvaudit reproduce guess-first` writes it")
    try:
        rows = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in _NUMBERS})
    except (ValueError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path} holds no rows of the study: {error}") from error
    missing = [name for name in NEEDED if name not in rows]
    if missing:
        raise IntegrityError(f"{path} holds no rows of the study: column {missing[0]} is not there")
    rows["layer"] = rows["layer"].replace(_NAMED_OTHERWISE)
    rows["trusted"] = rows["trusted"].astype(str) == "True"
    return rows


def over(values: "pd.Series[float]") -> Over:
    """Return mean and standard deviation over seeds; the deviation of a single seed is NaN."""
    numbers = [float(value) for value in values]
    return Over(fmean(numbers), stdev(numbers) if len(numbers) > 1 else float("nan"), len(numbers))


def accuracy(rows: pd.DataFrame, recipe: str, line: Line) -> Figure | None:
    """Return the accuracy of a recipe under one attack, None where no row has it."""
    found = rows[(rows["recipe"] == recipe) & chosen(rows, line)].dropna(subset=["accuracy"])
    if found.empty:
        return None
    verdicts = tuple(dict.fromkeys(text for text in found["verdict"] if text))
    more = found["excess"].astype("float64").fillna(0.0).mean()
    return Figure(over(found["accuracy"]), int(found["images"].min()), bool(found["trusted"].all()), verdicts, more)


def chosen(rows: pd.DataFrame, line: Line) -> "pd.Series[bool]":
    """Return which rows are of one line of the table."""
    attack = (rows["attack"] == line.attack) & (rows["access"] == line.access) & (rows["norm"] == line.norm)
    return attack & ((rows["eps"] - line.eps).abs() < 1e-9)


def difference(one: Figure, other: Figure) -> tuple[float, float]:
    """Return the difference of two accuracies and its standard error.

    The error is that of seeds and images, as if the two were independent: images that both saw make it smaller.
    """
    return one.over.mean - other.over.mean, sqrt(one.variance + other.variance)
