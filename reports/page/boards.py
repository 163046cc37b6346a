"""Tables of the HTML report: one leaderboard per estimator, agreement between estimators, calibration."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import pandas as pd

from audit.records import CalibrationRow
from reports.estimators import place
from reports.page.cells import MISSING, NO_CLAIM, Cell, Header, Row, headers_of, unranked_reason, with_error
from reports.statistics.agreement import Agreement, agreements
from reports.statistics.gap_statistics import correlations
from reports.statistics.sentences import describe, panel_caption
from reports.tables.calibration import calibration_sentence, channel_name, errors, failed_calibration, verdict
from reports.tables.table import Panel, contradicted, panels, too_few
from reports.text import format_eps, format_norm, layer_place, plain_text, short_name, shorten


@dataclass(frozen=True)
class Board:
    """One estimator: calibration, leaderboard, contradicted models with the figures, correlations.

    `headers` are the columns that its rows fill; `unbounded` says why no valid row bounds the accuracy of heads, ""
    if one does.
    """

    estimator: str
    quantity: str
    calibration: str
    failed: bool
    unbounded: str
    headers: Sequence[Header]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    refuted: Sequence[str]
    caption: str
    correlations: Sequence[str]


@dataclass(frozen=True)
class Setting:
    """The estimators of one data set, layer and threat, the default for ranking first.

    `view` is its name as a view of the page; the `leading` one is shown first; `facts` say what was audited, and how.
    """

    title: str
    view: str
    leading: bool
    facts: str
    boards: Sequence[Board]


@dataclass(frozen=True)
class Concord:
    """Agreement of the estimators of one setting, and the reliability of each."""

    title: str
    pairs: Sequence[str]
    firmness: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Trial:
    """One calibration channel as text: true value, estimate and error of each case."""

    estimator: str
    channel: str
    samples: int
    verdict: str
    cases: Sequence[tuple[str, str, str]]


def settings(frame: pd.DataFrame, calibration: Sequence[CalibrationRow]) -> list[Setting]:
    """Return the boards of a leaderboard, by setting."""
    alone = frame["model"].nunique() == 1
    grouped = [(title, list(group)) for title, group in groupby(panels(frame), key=lambda panel: panel.setting)]
    leading = max(range(len(grouped)), key=lambda i: _importance(grouped[i][1]), default=0)
    return [
        Setting(title, f"view-{i}", i == leading, _facts(group), [_board(p, calibration, alone=alone) for p in group])
        for i, (title, group) in enumerate(grouped)
    ]


def _importance(group: Sequence[Panel]) -> tuple[int, tuple[int, object], float]:
    """Return the sort key of a setting: that of most models leads, then the layer nearest to the output."""
    first = group[0].rows.iloc[0]
    return max(panel.rows["model"].nunique() for panel in group), layer_place(first["layer"]), float(first["eps"])


def concords(frame: pd.DataFrame) -> list[Concord]:
    """Return the agreement of estimators, one entry per setting."""
    return [_concord(agreement) for agreement in agreements(frame)]


def trials(calibration: Sequence[CalibrationRow]) -> list[Trial]:
    """Return the rows of the calibration table."""
    return [_trial(row) for row in sorted(calibration, key=lambda row: (place(row.estimator), channel_name(row)))]


def _facts(group: Sequence[Panel]) -> str:
    """Return what the tables of a setting are over: images, classes, layer, radius, seeds, and the named attack."""
    rows = pd.concat([panel.rows for panel in group])
    shared = rows[rows["status"].eq("valid")]
    first = rows.iloc[0]

    def listed(name: str) -> str:
        return " or ".join(dict.fromkeys(plain_text(str(value)) for value in shared[name].dropna() if value))

    classes = f" in {listed('num_classes')} classes" if listed("num_classes") else ""  # older records tell none
    told = [
        f"{listed('images')} images of {shorten(plain_text(first['dataset']), 80)}{classes}",
        f"layer {shorten(plain_text(first['layer']), 80)}",
        f"radius {format_norm(first['norm'])} {format_eps(first['eps'])} for pixels from 0 to 1",
        f"seeds: {listed('seeds')}",
    ]
    attack = listed("attack")
    named = f" Adversarial accuracy is measured under {attack}." if attack else ""
    return f"{', '.join(told)}.{named}" if len(shared) else "No audit of this setting succeeded."


def _board(panel: Panel, calibration: Sequence[CalibrationRow], *, alone: bool) -> Board:
    """Return one table; a model that is alone in its run has no correlations to caption."""
    first, heads = panel.rows.iloc[0], headers_of(panel.rows)
    valid = panel.rows[panel.rows["status"].eq("valid")]
    rows = [cast(Row, row) for row in panel.rows.to_dict(orient="records")]
    refuted = [row for row, mark in zip(rows, contradicted(panel.rows), strict=True) if mark]
    claims = bool(panel.rows["ranks"].any())
    ranks = claims and not alone
    return Board(
        estimator=plain_text(first["estimator"]),
        quantity=plain_text(first["quantity"]),
        calibration=calibration_sentence(calibration, first["estimator"]),
        failed=failed_calibration(calibration, first["estimator"]),
        unbounded=_unbounded(valid),
        headers=heads,
        rows=[
            ("unranked" if row["rank"] == "unranked" else "ranked", [head.cell(row) for head in heads]) for row in rows
        ],
        refuted=[_refuted(row) for row in refuted],
        caption=panel_caption(panel.rows) if ranks else "" if claims else NO_CLAIM,
        correlations=[describe(correlation) for correlation in correlations(panel.rows)] if ranks else [],
    )


def _unbounded(valid: pd.DataFrame) -> str:
    """Return why no valid row bounds the accuracy of heads; "" if one does, or if there is none."""
    if not len(valid) or valid["fano_accuracy_bound"].notna().any():
        return ""
    if too_few(valid).any():
        return "There are too few images a class to state a bound on the accuracy of heads: see the flags."
    return "Its worst case limits no head, so this table has no accuracy bound."


def _refuted(row: Row) -> str:
    why = unranked_reason(row).replace("contradicted: ", "").replace("contradicted", "")
    return f"{short_name(row['model'])} is contradicted and not ranked{': ' + why if why else ''}."


def _concord(agreement: Agreement) -> Concord:
    pairs = [
        f"{plain_text(one)} and {plain_text(other)}, {tau.n} models: {describe(tau)}"
        for (one, other), tau in agreement.taus.items()
    ]
    firmness = [
        (
            plain_text(name) + ("" if firm.ranks else " (does not claim to rank)"),
            str(firm.models),
            MISSING if firm.error is None else f"{firm.error:.3f}",
            MISSING if firm.spread is None else f"{firm.spread:.3f}",
        )
        for name, firm in agreement.firmness.items()
    ]
    return Concord(agreement.title, pairs, firmness)


def _trial(row: CalibrationRow) -> Trial:
    cases = []
    for case in ("normal", "worst"):
        truth, value = getattr(row, f"true_{case}_nats"), getattr(row, f"{case}_nats")
        error, tolerance = errors(row).get(case), getattr(row, f"{case}_tolerance")
        allowed = "" if tolerance is None else f" (± {tolerance:.3f} allowed)"
        cases.append(
            (
                MISSING if truth is None else f"{truth:.3f}",
                MISSING if value is None else with_error(value, getattr(row, f"{case}_nats_se")),
                MISSING if error is None else f"{error:+.3f}{allowed}",
            )
        )
    return Trial(plain_text(row.estimator), channel_name(row), row.samples, verdict(row), cases)
