"""Statistics in words: captions of Figure 1 and comparisons inside families."""

from itertools import combinations

import pandas as pd

from reports.estimators import place
from reports.statistics.correlation import Correlation
from reports.statistics.gap_statistics import UNKNOWN_FAMILIES, Relations, correlations
from reports.tables.table import contradicted, panels, ranked
from reports.text import plain_text, plural, short_name

_ORDER_COLUMNS = ["family", "weaker", "stronger", "rv_weaker", "rv_stronger", "holds", "panel"]


def caption(frame: pd.DataFrame) -> str:
    """Return short sentences per panel: correlation of RV (estimate, nats) with the adversarial gap (measured)."""
    groups = panels(frame)
    sentences = [panel_caption(panel.rows) for panel in groups]
    if len(groups) == 1:
        return sentences[0]
    told = [f"{panel.title}: {text}" for panel, text in zip(groups, sentences, strict=True) if " rho " in text]
    return " ".join(told) or "No group of comparable models is large enough for a correlation."


def summary(frame: pd.DataFrame) -> list[str]:
    """Return the opening of a report: how many audits, how many refuted or failed, the order, the correlations.

    The last two are those of the default estimator, and left out where there is one model; a leaderboard with its
    ranks is expected.
    """
    refuted, failed = int(contradicted(frame).sum()), int(frame["status"].ne("valid").sum())
    counts = f"{plural(len(frame), 'audit')} of {plural(frame['model'].nunique(), 'model')}: "
    counts += f"{int(frame['rank'].ne('unranked').sum())} ranked, {refuted} contradicted, {failed} failed"
    silent = int((~frame["ranks"]).sum())
    counts += f"; {silent} by an estimator that does not claim to rank." if silent else "."
    names = sorted(set(frame[frame["ranks"]]["estimator"] if frame["ranks"].any() else frame["estimator"]), key=place)
    if frame["model"].nunique() == 1:
        return [counts]
    leading = frame[frame["estimator"].isin(names[:1])]
    by = f"By {plain_text(names[0])}: " if frame["estimator"].nunique() > 1 else ""
    return [counts, by + order_sentence(leading), f"{by}RV against adversarial gap: {caption(leading)}"]


def describe(correlation: Correlation) -> str:
    """Return a correlation as text: value, interval and p where there are any.

    >>> describe(Correlation("Spearman rho", 0.87, 0.6, 0.96, 0.001, 12))
    'Spearman rho 0.87 [0.60, 0.96], p 0.001'
    """
    if correlation.value is None:
        return f"{correlation.name}: {correlation.note}"
    p = "" if correlation.p is None else f", p {_format_p(correlation.p)}"
    note = f" ({correlation.note})" if correlation.note else ""
    return f"{correlation.name} {correlation.value:.2f}{_interval(correlation)}{p}{note}"


def family_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Return every comparison of RV (nats) between two ranked models of a family trained for different radii.

    `weaker` was trained for the smaller radius; the comparison `holds` where it has the larger RV.
    """
    rows = [comparison for panel in panels(frame) for comparison in _comparisons(panel.rows, panel.title)]
    return pd.DataFrame(rows, columns=_ORDER_COLUMNS)


def order_sentence(frame: pd.DataFrame) -> str:
    """Return the count of family comparisons that hold, and which do not."""
    order = family_order(frame)
    if order.empty:
        return "No family holds two ranked models trained for different radii, so there is no order to check."
    failures = order[~order["holds"].astype(bool)]
    pairs = zip(failures["weaker"], failures["stronger"], strict=True)
    named = [f"{short_name(str(weaker))} against {short_name(str(stronger))}" for weaker, stronger in pairs]
    exceptions = f" (not: {'; '.join(named)})" if named else ""
    return (
        f"{len(order) - len(failures)} of {plural(len(order), 'comparison')} hold: inside a family, training for "
        f"the larger radius leaves the smaller RV, standard training taken as radius 0{exceptions}."
    )


def panel_caption(rows: pd.DataFrame) -> str:
    """Return the sentences of one panel."""
    return " ".join(panel_sentences(rows))


def panel_sentences(rows: pd.DataFrame) -> list[str]:
    """Return the findings of one panel: overall, within training groups, given natural accuracy, and a footnote."""
    if not rows["ranks"].any():
        return ["This estimator does not claim to rank models: shown for replication, no correlation."]
    found = correlations(rows)
    if found.spearman.value is None:
        told = [_capital(found.spearman.note)]
    else:
        told = [_overall(found), _within(found.within), _partial(found.partial), _footnote(found)]
    return [f"{sentence}." for sentence in [*told, *_left_out(rows)]]


def _overall(found: Relations) -> str:
    rho, kin = found.spearman, found.by_family
    note = f", {rho.note}" if rho.note else ""
    drawn = f"; {_interval(kin).strip()} over {kin.note} drawn again" if kin.low is not None else ""
    value = f"Spearman rho {rho.value:.2f}{_interval(rho)} over {rho.n} models (estimate against measured{note})"
    return f"{value}{drawn}"


def _within(within: Correlation) -> str:
    if within.value is None:
        return f"Within training groups: {within.note}"
    p = "" if within.p is None else f", permutation p {_format_p(within.p)}"
    return f"Within training groups r {within.value:.2f}{_interval(within)}{p}"


def _partial(partial: Correlation) -> str:
    if partial.value is None:
        return f"Given natural accuracy: {partial.note}"
    return f"Given natural accuracy, partial r {partial.value:.2f}{_interval(partial)}"


def _footnote(found: Relations) -> str:
    trust, clean, raw = found.reliability, found.disattenuated, found.pearson
    if trust.value is None:
        return f"No reliability of RV: {trust.note}"
    reliable = f"Reliability of RV over {trust.note} {trust.value:.2f}"
    if clean.value is None or raw.value is None:
        return f"{reliable}; {clean.note}"
    return f"{reliable}; Pearson r {raw.value:.2f}, {clean.value:.2f} without that noise"


def _left_out(rows: pd.DataFrame) -> list[str]:
    out = int((contradicted(rows) & rows["status"].eq("valid")).sum())
    return [f"{plural(out, 'contradicted model')} left out"] if out else []


def _interval(correlation: Correlation) -> str:
    return "" if correlation.low is None else f" [{correlation.low:.2f}, {correlation.high:.2f}]"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _format_p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def _comparisons(rows: pd.DataFrame, panel: str) -> list[dict[str, object]]:
    usable = rows[ranked(rows)].sort_values(["family", "trained_eps", "model", "cell_id"])
    found: list[dict[str, object]] = []
    # a model that is not standard and tells no training eps cannot be placed in an order of training eps
    placed = usable["training"].eq("standard") | usable["trained_eps"].gt(0)
    known = usable[placed & ~usable["family"].isin(UNKNOWN_FAMILIES)]
    for family, members in known.groupby("family", sort=True):
        for (_, weaker), (_, stronger) in combinations(members.iterrows(), 2):
            if weaker["trained_eps"] < stronger["trained_eps"]:
                found.append(_comparison(str(family), weaker, stronger) | {"panel": panel})
    return found


def _comparison(family: str, weaker: "pd.Series[float]", stronger: "pd.Series[float]") -> dict[str, object]:
    return {
        "family": family,
        "weaker": weaker["model"],
        "stronger": stronger["model"],
        "rv_weaker": weaker["rv"],
        "rv_stronger": stronger["rv"],
        "holds": bool(weaker["rv"] > stronger["rv"]),
    }
