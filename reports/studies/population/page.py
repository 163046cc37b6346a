"""The page of the study: the verdict in its first sentence, then what each estimator says of every outcome.

Imports no torch: everything is derived from the rows that `rvaudit reproduce figure1 --scale study` writes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.studies.population.analysis import (
    DECISIVE,
    Design,
    Found,
    SetAnalysis,
    Verdict,
    read_design,
    read_study_rows,
    verdict,
)
from reports.studies.population.figures import forest_figure, population_figure
from reports.text import format_eps, plural

PLAN = "plan.toml"
_ANSWERS = {
    "yes": "Yes: RV predicts robustness inside training groups, and beyond the best cheap rival",
    "no": "No: RV neither follows robustness inside training groups nor adds to the best cheap rival",
    "mixed": "In part",
    "open": "Open: there are too few networks to tell",
}
_NOTE = (
    "rho: rank correlation inside training groups, its interval over families drawn again; tau: Kendall's tau-b over "
    "pairs inside groups; p: shuffles inside groups, corrected by Holm over estimators and outcomes; p, families: "
    "exchanges of whole families, at least one in the number of their orders; added: adjusted R2 of ranks beside the "
    "best rival less that of the rival alone, inside groups and over all networks; held back: mean absolute error of "
    "the prediction (of the best rival's), and the share inside its intervals. * as claimed and significant."
)


def draw(folder: Path) -> list[Path]:
    """Write the page and the figures of a folder of rows beside them, and return the paths; [] without rows.

    Raises EnvironmentFault without a plan beside the rows, IntegrityError for a plan or rows of other columns.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        return []
    design = read_design(folder / PLAN)
    analyses = [SetAnalysis(path.stem, read_study_rows(path, design), design) for path in files]
    enough = [each for each in analyses if each.enough]
    contents: dict[str, str | bytes] = {"study.md": page(enough, design)}
    if enough:
        drawn = {"population": population_figure(enough), "forest": forest_figure(enough)}
        contents |= {f"{name}.png": figure_bytes(figure, "png") for name, figure in drawn.items()}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def page(analyses: Sequence[SetAnalysis], design: Design) -> str:
    """Return the page as Markdown."""
    parts = [f"# Does RV predict robustness?\n\n{answer(analyses, design)}\n"]
    for analysis in analyses:
        parts += [f"## {_title(analysis)}\n", _population(analysis)]
        for name in design.estimators:
            found = [each for each in analysis.found if each.estimator == name]
            parts += [f"### {_capital(design.predictors[name]['words'])}\n", _table(analysis, found)]
        parts += ["### Given one rival at a time\n", _partial_table(analysis)]
        parts += ["### Over training seeds\n", _reliability_table(analysis)]
        subset = analysis.subset
        if subset is not None and subset.enough:
            parts += ["### Costly estimators, on the plan's subset\n", _population(subset), _subset_table(subset)]
    return "\n".join([*parts, f"{_NOTE}\n"])


def answer(analyses: Sequence[SetAnalysis], design: Design) -> str:
    """Return the first paragraph: whether RV predicts robustness, with the numbers that carry it."""
    found = {name: verdict(analyses, name) for name in design.estimators}
    words = {each.word for each in found.values()}
    word = words.pop() if len(words) == 1 else "mixed"
    networks = sum(len(each.usable) for each in analyses)
    over = f"{networks} networks on {plural(len(analyses), 'data set')}"
    sentences = [f"{_ANSWERS[word]} ({over})."] if word != "mixed" else [_in_part(list(found.values()), over)]
    return " ".join([*sentences, *(_sentence(analyses, design, name) for name in found)] if analyses else sentences)


def _in_part(found: Sequence[Verdict], over: str) -> str:
    related, adds, cases = (sum(getattr(each, name) for each in found) for name in ("related", "adds", "cases"))
    return (
        f"{_ANSWERS['mixed']}: RV follows robustness inside training groups in {related} of {cases} cases "
        f"(estimators, data sets, and the outcomes {' and '.join(DECISIVE)}), and what it adds to the best cheap rival "
        f"is above 0 beyond doubt in {adds} of {cases} ({over})."
    )


def _sentence(analyses: Sequence[SetAnalysis], design: Design, name: str) -> str:
    told = []
    for analysis in analyses:
        found = next(each for each in analysis.found if (each.estimator, each.outcome) == (name, DECISIVE[0]))
        rho = _interval(found.inside.value, found.inside.low, found.inside.high)
        added = _interval(found.added.added, found.added.low, found.added.high)
        told.append(
            f"on {analysis.name} rho {rho} with the gap (corrected p {_p(found.corrected)}), {added} of rank variance "
            f"added to {_rival(found.added.rival)}{_fell(found)}"
        )
    return f"{_capital(design.predictors[name]['words'])}: {'; '.join(told)}."


def _fell(found: Found) -> str:
    if found.held_back is None or found.best_rival is None:
        return ""
    rival, other = found.best_rival
    return f", held-back error {_number(found.held_back.error)} against {_number(other.error)} of {_rival(rival)}"


def _title(analysis: SetAnalysis) -> str:
    return f"{_capital(analysis.name)}, l-inf {format_eps(float(analysis.every['eps'].iloc[0]))}"


def _population(analysis: SetAnalysis) -> str:
    out = len(analysis.every) - len(analysis.usable)
    groups = analysis.chosen["group"].nunique()
    families = plural(analysis.chosen["family"].nunique(), "family").replace("familys", "families")
    return (
        f"{len(analysis.every)} networks, {out} left out that have not learned; {len(analysis.chosen)} for all choices,"
        f" in {plural(groups, 'training group')} and {families}; {len(analysis.held)} held back.\n"
    )


def _table(analysis: SetAnalysis, found: Iterable[Found]) -> str:
    head = (
        "outcome", "rho", "tau", "p", "p, families", "given natural accuracy", "best rival", "added inside",
        "added overall", "held back", "covered",
    )  # fmt: skip
    level = analysis.design.values["statistics"]["level"]
    return _markdown(head, (_line(analysis, each, level) for each in found))


def _line(analysis: SetAnalysis, found: Found, level: float) -> tuple[str, ...]:
    inside, partial = found.inside, analysis.partial(found.estimator, found.outcome, ["natural"])
    star = _star(found, level)
    held, rival = found.held_back, found.best_rival
    return (
        found.outcome.replace("_", " "),
        _interval(inside.value, inside.low, inside.high) + star,
        _number(inside.tau),
        _p(found.corrected),
        _p(inside.families_p),
        f"{_number(partial.value)}, p {_p(partial.p)}",
        _rival(found.added.rival),
        _interval(found.added.added, found.added.low, found.added.high),
        _interval(found.overall.added, found.overall.low, found.overall.high),
        ""
        if held is None or rival is None
        else f"{_number(held.error)} ({_rival(rival[0])} {_number(rival[1].error)})",
        "" if held is None else f"{held.covered:.0%}",
    )


def _star(found: Found, level: float) -> str:
    return "*" if found.as_claimed and found.corrected is not None and found.corrected < level else ""


def _partial_table(analysis: SetAnalysis) -> str:
    design = analysis.design
    head = ("given", *(f"{name}, {outcome}" for name in design.estimators for outcome in DECISIVE))
    lines = []
    for rival in design.rivals:
        found = [analysis.partial(name, outcome, [rival]) for name in design.estimators for outcome in DECISIVE]
        lines.append((_rival(rival), *(f"{_number(each.value)}, p {_p(each.p)}" for each in found)))
    return _markdown([name.replace("_", " ") for name in head], lines)


def _reliability_table(analysis: SetAnalysis) -> str:
    lines = []
    for name in analysis.design.predictors:
        value, pairs = analysis.reliability(name)
        lines.append((name.replace("_", " "), _number(value), str(pairs)))
    return _markdown(("predictor", "correlation between seeds", "recipes with both"), lines)


def _subset_table(subset: SetAnalysis) -> str:
    """Return what every estimator says of the decisive outcomes on the networks of the subset."""
    head = ("estimator", "outcome", "rho", "tau", "p", "best rival", "added inside")
    level = subset.design.values["statistics"]["level"]
    lines = []
    for found in (each for each in subset.found if each.outcome in DECISIVE):
        inside, added = found.inside, found.added
        star = _star(found, level)
        lines.append(
            (
                subset.design.predictors[found.estimator]["words"],
                found.outcome.replace("_", " "),
                _interval(inside.value, inside.low, inside.high) + star,
                _number(inside.tau),
                _p(found.corrected),
                _rival(added.rival),
                _interval(added.added, added.low, added.high),
            )
        )
    return _markdown(head, lines)


def _markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _rival(name: str) -> str:
    return name.replace("_", " ") or "none"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" [{_number(low)}, {_number(high)}]"
    return f"{_number(value)}{ends}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0:.2f}"


def _p(p: float | None) -> str:
    return "–" if p is None else "< .001" if p < 0.001 else f"{p:.2g}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
