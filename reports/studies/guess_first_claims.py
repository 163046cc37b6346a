"""The paper's claims about the order of models, judged from rows: confirmed, refuted or undecided."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, sqrt

import pandas as pd

from reports.studies.guess_first_paper import RECIPES, TITLES, Line, published
from reports.studies.guess_first_rows import Figure, Over, accuracy, difference, over
from reports.text import format_eps

PAIRS = (
    ("c-dv", "cnn"), ("c-js", "cnn"), ("c-dv-ie", "cnn"), ("c-js-ie", "cnn"),
    ("c-dv", "vib"), ("c-js", "vib"), ("c-dv-ie", "vib"), ("c-js-ie", "vib"),
    ("c-dv-ie", "c-dv"), ("c-js-ie", "c-js"), ("c-js", "c-dv"), ("c-js-ie", "c-dv-ie"),
)  # fmt: skip
ELIMINATION = (("c-dv-ie", "c-dv"), ("c-js-ie", "c-js"))
WHITE = (Line("pgd", "white", "linf", 0.15), Line("pgd", "white", "linf", 0.3))
BLACK = tuple(
    Line(attack, "black", norm, eps)
    for attack, norm, radii in (("fgsm", "linf", (0.15, 0.3)), ("pgd", "linf", (0.15, 0.3)), ("cw", "l2", (2.0,)))
    for eps in radii
)
_ERRORS = 2.0  # how many standard errors decide
_NOTHING = 0.01  # an order of accuracies below this is none
_SHORT = {
    "the paper's figures are equal": ": no order",
    "next to nothing is left of either": ": nothing left",
    "the larger figure comes from an attack that failed its checks": ": attack failed",
}


@dataclass(frozen=True)
class Judged:
    """One pair of the paper's table: published difference and ours, in points, and the verdict."""

    line: Line
    pair: tuple[str, str]
    paper: float
    ours: float | None
    error: float | None
    verdict: str
    reason: str


def judge_all(rows: pd.DataFrame, lines: Sequence[Line], shown: str = "") -> list[Judged]:
    """Return the verdict on every pair of every line; `shown` names the attack whose rows are held against the paper's.

    With `shown` "adaptive", the paper's order under its attack is judged by what the adaptive attack leaves.
    """
    table = published(str(rows["dataset"].iloc[0]))
    found = []
    for line in lines:
        ours = line._replace(attack=shown) if shown else line
        figures = {recipe: accuracy(rows, recipe, ours) for recipe in RECIPES}
        found += [_judged(ours, pair, table[line], figures) for pair in PAIRS]
    return found


def _judged(line: Line, pair: tuple[str, str], paper: dict[str, float], figures: dict[str, Figure | None]) -> Judged:
    claimed = paper[pair[0]] - paper[pair[1]]
    one, other = (figures[recipe] for recipe in pair)
    if one is None or other is None:
        return Judged(line, pair, claimed, None, None, "undecided", "not measured")
    ours, error = difference(one, other)
    verdict, reason = _verdict(claimed, (ours, error), (one, other))
    return Judged(line, pair, claimed, 100 * ours, 100 * error, verdict, reason)


def _verdict(claimed: float, ours: tuple[float, float], figures: tuple[Figure, Figure]) -> tuple[str, str]:
    value, error = ours
    if claimed == 0:
        return "undecided", "the paper's figures are equal"
    if isnan(error):
        return "undecided", "one seed has no standard deviation"
    if max(figure.over.mean for figure in figures) < _NOTHING:
        return "undecided", "next to nothing is left of either"
    if abs(value) <= _ERRORS * error:
        return "undecided", "within two standard errors"
    # what an attack that failed left is an upper bound: it cannot carry the claim that it is the larger one
    larger = figures[0] if value > 0 else figures[1]
    if not larger.trusted:
        return "undecided", "the larger figure comes from an attack that failed its checks"
    return ("confirmed" if (value > 0) == (claimed > 0) else "refuted"), ""


def sentence(judged: Judged) -> str:
    """Return a verdict in words, number by number."""
    one, other = (TITLES[recipe] for recipe in judged.pair)
    order = "above" if judged.paper > 0 else "below"
    measured = "not measured" if judged.ours is None else f"ours {judged.ours:+.1f} ± {judged.error:.1f}"
    because = f" ({judged.reason})" if judged.reason and judged.ours is not None else ""
    claim = f"{line_title(judged.line)}, {one} {order} {other}"
    return f"{claim}: paper {judged.paper:+.1f}, {measured}: {judged.verdict}{because}"


def claims_table(judged: Sequence[Judged]) -> str:
    """Return verdicts as a markdown table: a line per pair, a column per attack; points, ours (theirs)."""
    lines = list(dict.fromkeys(each.line for each in judged))
    cells = {(each.pair, each.line): each for each in judged}
    head = ["pair", *(line_title(line) for line in lines)]
    body = [
        [f"{TITLES[one]} − {TITLES[other]}", *(_cell(cells[(one, other), line]) for line in lines)]
        for one, other in PAIRS
    ]
    return markdown(head, body)


def counts(judged: Sequence[Judged]) -> str:
    """Return the number of claims by verdict, in words."""
    told = [f"{sum(each.verdict == name for each in judged)} {name}" for name in ("confirmed", "refuted", "undecided")]
    return f"Of {len(judged)} ordered pairs: {', '.join(told)}."


def decided(judged: Sequence[Judged]) -> str:
    """Return every verdict that is not undecided, in words, as a markdown list; empty where there is none."""
    return "".join(f"- {sentence(each)}\n" for each in judged if each.verdict != "undecided")


def elimination(rows: pd.DataFrame) -> list[str]:
    """Return whether information elimination lowers RV, in words: each pair, layer and radius."""
    nats = rows[rows["attack"] == "sandwich"].dropna(subset=["rv"])
    told = []
    settings = nats[["layer", "eps"]].drop_duplicates()
    for layer, eps in settings.itertuples(index=False):
        part = nats[(nats["layer"] == layer) & (nats["eps"] == eps)]
        for pair in ELIMINATION:
            values = [part[part["recipe"] == recipe] for recipe in pair]
            if not any(each.empty for each in values):
                told.append(f"{layer}, {format_eps(float(eps))}: {_eliminated(pair, values)}")
    return told


def _eliminated(pair: tuple[str, str], values: list[pd.DataFrame]) -> str:
    one, other = (over(part["rv"]) for part in values)
    change = one.mean - other.mean
    error = sqrt(sum(_variance(each, part) for each, part in zip((one, other), values, strict=True)))
    names = f"{TITLES[pair[0]]} {one.mean:.2f}, {TITLES[pair[1]]} {other.mean:.2f} nats"
    if not all(part["trusted"].all() for part in values):
        return f"{names}: undecided (an estimate is contradicted)"
    if isnan(error) or abs(change) <= _ERRORS * error:
        return f"{names}: undecided ({change:+.2f} ± {error:.2f})"
    return f"{names}: {'lower' if change < 0 else 'higher'} with elimination ({change:+.2f} ± {error:.2f})"


def _variance(each: Over, part: pd.DataFrame) -> float:
    return each.deviation**2 / each.seeds + float((part["rv_se"] ** 2).mean())


def line_title(line: Line) -> str:
    """Return a line's name as tables show it."""
    names = {"fgsm": "FGSM", "pgd": "PGD", "cw": "C&W", "two-losses": "two losses", "square": "Square"}
    access = {"white": " white", "black": " black", "none": ""}[line.access]
    radius = f" {line.norm} {format_eps(line.eps)}" if line.norm else ""
    return f"{names.get(line.attack, line.attack)}{access}{radius}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(judged: Judged) -> str:
    if judged.ours is None:
        return "not measured"
    figures = f"{judged.ours:+.1f} ± {judged.error:.1f} ({judged.paper:+.1f})"
    return f"{figures} {judged.verdict}{_SHORT.get(judged.reason, '')}"
