"""Statistics said in words: the caption under Figure 1 and the order inside families."""

from itertools import combinations

import pandas as pd

from reports.statistics import Correlation, correlations
from reports.table import contradicted, panels, ranked
from reports.text import plural, short_name

# models whose family nobody named have nothing in common
UNKNOWN_FAMILIES = ("", "unknown", "other")

_ORDER_COLUMNS = ["family", "weaker", "stronger", "rv_weaker", "rv_stronger", "holds", "panel"]


def caption(frame: pd.DataFrame) -> str:
    """Return one sentence a panel: how RV (estimate, nats) goes with the adversarial gap (measured)."""
    groups = panels(frame)
    sentences = [_panel_caption(panel.rows) for panel in groups]
    if len(groups) == 1:
        return sentences[0]
    told = [f"{panel.title}: {text}" for panel, text in zip(groups, sentences, strict=True) if " rho " in text]
    return " ".join(told) or "No group of comparable models is large enough for a correlation."


def describe(correlation: Correlation) -> str:
    """Return a correlation as text: value, interval and p where there are any.

    >>> describe(Correlation("Spearman rho", 0.87, 0.6, 0.96, 0.001, 12))
    'Spearman rho 0.87 [0.60, 0.96], p 0.001'
    """
    if correlation.value is None:
        return f"{correlation.name}: {correlation.note}"
    interval = "" if correlation.low is None else f" [{correlation.low:.2f}, {correlation.high:.2f}]"
    p = "" if correlation.p is None else f", p {_format_p(correlation.p)}"
    note = f" ({correlation.note})" if correlation.note else ""
    return f"{correlation.name} {correlation.value:.2f}{interval}{p}{note}"


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
        f"{len(order) - len(failures)} of {plural(len(order), 'comparison')} hold: inside a family, the model trained "
        f"for the smaller radius has the larger RV{exceptions}."
    )


def _panel_caption(rows: pd.DataFrame) -> str:
    rho, _, _, within, *_ = correlations(rows)
    out = int((contradicted(rows) & rows["status"].eq("valid")).sum())
    left_out = f"; {plural(out, 'contradicted model')} left out" if out else ""
    if rho.value is None:
        reason = rho.note[0].upper() + rho.note[1:]
        return f"{reason}{left_out}."
    interval = "" if rho.low is None else f" [{rho.low:.2f}, {rho.high:.2f}]"
    note = f", {rho.note}" if rho.note else ""
    first = f"Spearman rho {rho.value:.2f}{interval} over {rho.n} models (estimate against measured{note})"
    return f"{first}; {_within(within)}{left_out}."


def _within(within: Correlation) -> str:
    if within.value is None:
        return f"within training groups: {within.note}"
    interval = "" if within.low is None else f" [{within.low:.2f}, {within.high:.2f}]"
    p = "" if within.p is None else f", permutation p {_format_p(within.p)}"
    return f"within training groups r {within.value:.2f}{interval}{p}"


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
