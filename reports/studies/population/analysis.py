"""The rows of the study under its plan: inside training groups, beside rivals, and on networks held back."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from audit.errors import EnvironmentFault, IntegrityError
from reports.statistics.correlation import MODELS_FOR_P, Vector
from reports.statistics.population.grouped import Blocks, Effort, Grouped, holm, inside_groups, partial_inside
from reports.statistics.population.prediction import (
    HeldBack,
    Increment,
    Sample,
    error_difference,
    fit_curve,
    increment,
    judge_held_back,
    reliability,
)

DECISIVE = ("gap", "adversarial")
"""The outcomes that the verdict rests on."""
_TEXT = ("model", "family", "training", "method", "dataset", "settings")


@dataclass(frozen=True)
class Design:
    """What the plan of the study says of predictors, outcomes, networks left out, and statistics."""

    values: dict[str, Any]

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Every outcome with the `sign` of its claimed correlation with RV, and its `words`."""
        found: dict[str, dict[str, Any]] = self.values["outcomes"]
        return found

    @property
    def predictors(self) -> dict[str, dict[str, Any]]:
        """Every predictor: its claimed sign with robustness, whether it is an `estimator`, and its `words`."""
        found: dict[str, dict[str, Any]] = self.values["predictors"]
        return found

    @property
    def estimators(self) -> list[str]:
        """The predictors that the study is about."""
        return [name for name, each in self.predictors.items() if each["estimator"]]

    @property
    def rivals(self) -> list[str]:
        """The predictors that they must beat."""
        return [name for name, each in self.predictors.items() if not each["estimator"]]

    @property
    def effort(self) -> Effort:
        """The number of shuffles and draws."""
        chosen = self.values["statistics"]
        return Effort(chosen["shuffles"], chosen["draws"], chosen["seed"])

    @property
    def costly(self) -> dict[str, str]:
        """The columns of estimators too costly for every network, and their names; {} for a plan without a subset."""
        subset = self.values.get("subset", {})
        found: dict[str, str] = subset.get("estimators", {}) | subset.get("optional", {})
        return found

    def expected(self, predictor: str, outcome: str) -> int:
        """Return the sign of the correlation that the claim implies; without a claim, that of more robustness."""
        robust = self.predictors[predictor]["robust"] or 1
        return -robust * int(self.outcomes[outcome]["sign"])


def read_design(path: Path) -> Design:
    """Return the plan in a file; raises EnvironmentFault for a missing one, IntegrityError for one that is no plan."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFault(f"{path} is missing: the plan of the study lies beside its rows") from error
    except tomllib.TOMLDecodeError as error:
        raise IntegrityError(f"{path} is no plan of a study: {error}") from error
    missing = [name for name in ("outcomes", "predictors", "statistics", "exclusion") if name not in values]
    if missing:
        raise IntegrityError(f"{path} lacks the sections {', '.join(missing)}")
    return Design(values)


def read_study_rows(path: Path, design: Design) -> pd.DataFrame:
    """Return the rows of one data set; raises IntegrityError for a file without the columns of the plan."""
    rows = pd.read_csv(path)
    needed = (*_TEXT, "multiple", "seed", "held_back", "eps", *design.outcomes, *design.predictors)
    missing = [name for name in needed if name not in rows]
    if missing:
        raise IntegrityError(f"{path} lacks the columns {', '.join(missing)}")
    return rows.assign(group=[f"{one} {many:g}" for one, many in zip(rows["method"], rows["multiple"], strict=True)])


@dataclass(frozen=True)
class Found:
    """What one estimator says of one outcome on one data set; `corrected` is p after Holm's correction."""

    estimator: str
    outcome: str
    expected: int
    inside: Grouped
    corrected: float | None
    overall: Increment
    added: Increment
    held_back: HeldBack | None
    best_rival: tuple[str, HeldBack] | None
    difference: tuple[float, float | None, float | None] | None

    @property
    def as_claimed(self) -> bool:
        """Whether the correlation has the claimed sign."""
        return self.inside.value is not None and self.inside.value * self.expected > 0


class SetAnalysis:
    """The statistics of one data set; networks that have not learned are left out of all of them."""

    def __init__(self, name: str, rows: pd.DataFrame, design: Design) -> None:
        self.name, self.design, self.every = name, design, rows
        self.usable = rows[rows["natural"] >= design.values["exclusion"]["natural_accuracy"]]
        self.chosen = self.usable[~self.usable["held_back"]]
        self.held = self.usable[self.usable["held_back"]]

    @property
    def enough(self) -> bool:
        """Whether there are networks enough for statistics."""
        return len(self.chosen) >= MODELS_FOR_P and self.chosen["family"].nunique() > 1

    @cached_property
    def blocks(self) -> Blocks:
        """The training groups, families and seeds of the networks that choices may rest on."""
        return blocks_of(self.chosen)

    @cached_property
    def found(self) -> list[Found]:
        """Every estimator and outcome, with Holm's correction over all of them."""
        results = [self._found(name, outcome) for name in self.design.estimators for outcome in self.design.outcomes]
        corrected = holm([each.inside.p for each in results])
        return [replace(each, corrected=p) for each, p in zip(results, corrected, strict=True)]

    @cached_property
    def forest(self) -> dict[tuple[str, str], Grouped]:
        """The correlation inside training groups of every predictor with every outcome."""
        known = {(each.estimator, each.outcome): each.inside for each in self.found}
        brief = self.design.effort._replace(shuffles=0)
        rivals = {
            (name, outcome): inside_groups(
                _vector(self.chosen, name), _vector(self.chosen, outcome), self.blocks, brief
            )
            for name in self.design.rivals
            for outcome in self.design.outcomes
        }
        return known | rivals

    @property
    def subset(self) -> "SetAnalysis | None":
        """The analysis of the networks that costly estimators have measured, by these too; None where none has."""
        measured = [name for name in self.design.costly if name in self.usable and self.usable[name].notna().any()]
        if not measured:
            return None
        rows = self.usable[self.usable[measured].notna().all(axis=1)]
        layers = {name: "logits" if name.endswith("logits") else "penultimate layer" for name in measured}
        added = {
            name: {"robust": -1, "estimator": True, "words": f"RV by {self.design.costly[name]} at the {layers[name]}"}
            for name in measured
        }
        values = self.design.values | {"predictors": added | self.design.predictors}
        return SetAnalysis(self.name, rows, Design(values))

    def partial(self, estimator: str, outcome: str, given: Sequence[str]) -> Grouped:
        """Return the correlation inside groups of an estimator with an outcome, given other predictors."""
        one, other = _vector(self.chosen, estimator), _vector(self.chosen, outcome)
        effort = self.design.effort
        return partial_inside(one, other, [_vector(self.chosen, name) for name in given], self.blocks, effort)

    def reliability(self, predictor: str) -> tuple[float | None, int]:
        """Return the correlation of a predictor between two training seeds, over all usable networks."""
        return reliability(_vector(self.usable, predictor), blocks_of(self.usable))

    def _found(self, name: str, outcome: str) -> Found:
        design, effort = self.design, self.design.effort
        x, y = _vector(self.chosen, name), _vector(self.chosen, outcome)
        sample = Sample(x, {rival: _vector(self.chosen, rival) for rival in design.rivals}, y, self.blocks)
        held, rival, difference = self._fallen(name, outcome) if len(self.held) else (None, None, None)
        return Found(
            estimator=name,
            outcome=outcome,
            expected=design.expected(name, outcome),
            inside=inside_groups(x, y, self.blocks, effort),
            corrected=None,
            overall=increment(sample, effort, inside=False),
            added=increment(sample, effort, inside=True),
            held_back=held,
            best_rival=rival,
            difference=difference,
        )

    def _fallen(
        self, name: str, outcome: str
    ) -> tuple[HeldBack, tuple[str, HeldBack], tuple[float, float | None, float | None]]:
        """Return how networks held back fell by an estimator and by the rival of the narrowest intervals."""
        chosen, coverage = self.chosen, self.design.values["statistics"]["coverage"]
        y, families = _vector(chosen, outcome), list(chosen["family"])
        known = (name, *self.design.rivals)
        curves = {each: fit_curve(_vector(chosen, each), y, families, coverage) for each in known}
        best = min(self.design.rivals, key=lambda each: curves[each].half_width)
        truth = _vector(self.held, outcome)
        one, other = (judge_held_back(curves[each], _vector(self.held, each), truth) for each in (name, best))
        values = _vector(self.held, name), _vector(self.held, best)
        pair, groups = (curves[name], curves[best]), list(self.held["group"])
        return one, (best, other), error_difference(pair, values, truth, groups, self.design.effort)


def blocks_of(rows: pd.DataFrame) -> Blocks:
    """Return the training group, family and seed of every row."""
    return Blocks(list(rows["group"]), list(rows["family"]), [int(seed) for seed in rows["seed"]])


@dataclass(frozen=True)
class Verdict:
    """In how many decisive cases, of data sets and outcomes, an estimator is related inside groups, and adds."""

    related: int
    adds: int
    cases: int

    @property
    def word(self) -> str:
        """Return "yes", "no" or "mixed" by the rule of the plan; "open" without a case."""
        if not self.cases:
            return "open"
        if self.related == self.adds == self.cases:
            return "yes"
        return "mixed" if self.related or self.adds else "no"


def verdict(analyses: Sequence[SetAnalysis], estimator: str) -> Verdict:
    """Return the verdict on an estimator over all data sets."""
    judged = [
        _holds(each, analysis.design.values["statistics"]["level"])
        for analysis in analyses
        for each in analysis.found
        if each.estimator == estimator and each.outcome in DECISIVE
    ]
    return Verdict(sum(related for related, _ in judged), sum(adds for _, adds in judged), len(judged))


def _holds(found: Found, level: float) -> tuple[bool, bool]:
    """Return whether an estimator is related to an outcome inside groups, and whether it adds to its best rival."""
    related = found.as_claimed and found.corrected is not None and found.corrected < level
    return related, found.added.low is not None and found.added.low > 0


def _vector(rows: pd.DataFrame, name: str) -> Vector:
    return np.asarray(rows[name], dtype=np.float64)
