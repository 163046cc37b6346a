"""Cost of an audit against layers, radii, seeds, images and models, and convergence of the searches.

The rows are those of `benchmarks/`, which lies beside the folder of the docs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.figures.marks import dress, named
from reports.figures.style import Look, Sheet, label, looks, paper_style, place_key

ROWS = Path("benchmarks", "results")
TOLERANCE, EPOCH_LIMIT = 0.05, 1.25
_GREY, _LIMIT = "#777777", "#d55e00"
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 2))
_MEASURES = (("ratio_counted", "full", "-"), ("ratio_cpu", "none", _DASHED))


class Axis(NamedTuple):
    """One quantity that scales an audit, with the largest cost allowed at a given count, in units of one."""

    name: str
    title: str
    limit: tuple[int, float] | None = None


AXES = (
    Axis("layers", "layers", (8, 3)),
    Axis("eps", "eps values", (4, 2)),
    Axis("seeds", "seeds", (5, 3)),
    Axis("images", "images"),
    Axis("models", "models"),
)


def draw(folder: Path) -> list[Path]:
    """Draw speed-scaling.png and speed-search.png into a folder and return the paths; none without rows."""
    rows = Path(folder).resolve().parents[1] / ROWS
    scaling, convergence, epochs = (_read(rows / f"{name}.csv") for name in ("scaling", "convergence", "epoch"))
    drawn: dict[str, Callable[[], Figure]] = {}
    if len(scaling):
        drawn["speed-scaling"] = lambda: scaling_figure(scaling)
    if len(convergence) or len(epochs):
        drawn["speed-search"] = lambda: search_figure(convergence, epochs)
    paths = [Path(folder) / f"{name}.png" for name in drawn]
    for path, figure in zip(paths, drawn.values(), strict=True):
        write_atomically(path, figure_bytes(figure(), "png"))
    return paths


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() else pd.DataFrame()


def scaling_figure(rows: pd.DataFrame) -> Figure:
    """Return cost relative to one layer, radius, seed or model against their number, and peak memory.

    Filled marks are passes as counted at the network, hollow ones CPU seconds. Rows are those of
    `benchmarks/scaling.py`; a row whose axis is `base` is the one of its estimator that others are measured by.
    """
    look = looks(rows["estimator"])
    captions = [_caption(rows, axis) for axis in AXES] + ["Resident memory of the process: before the audit, and peak."]
    keys = [named(_mark(look[name], "full", "-"), label(name)) for name in look], _lines()
    with paper_style():
        sheet = Sheet(len(AXES) + 1, captions, plot_height=2.1, keys=keys)
        figure, axes = sheet.draw()
        for ax, axis in zip(axes, AXES, strict=False):
            _draw_axis(ax, rows, axis)
            dress(ax, [f"cost against {axis.title}"], axis.title, "cost by the base case's (measured)")
        _draw_memory(axes[-1], rows)
        place_key(figure, *keys)
    return figure


def along(rows: pd.DataFrame, estimator: str, axis: str) -> pd.DataFrame:
    """Return the base case of an estimator and its cases along one axis, by count."""
    chosen = rows[(rows["estimator"] == estimator) & rows["axis"].isin(["base", axis])]
    return chosen.sort_values(axis)


def slope(counts: "pd.Series[float]", costs: "pd.Series[float]") -> float:
    """Return the least-squares slope of log cost against log count: 1 where cost is proportional."""
    return float(np.polyfit(np.log(counts.astype("float64")), np.log(costs.astype("float64")), 1)[0])


def _draw_axis(ax: Axes, rows: pd.DataFrame, axis: Axis) -> None:
    highest = 1.0
    for name, look in looks(rows["estimator"]).items():
        found = along(rows, name, axis.name)
        if len(found) < 2:
            continue
        for column, fill, style in _MEASURES:
            line = _mark(look, fill, style)
            line.set_data(found[axis.name].tolist(), found[column].tolist())
            ax.add_line(line)
            highest = max(highest, float(found[column].max()))
    most = max(float(rows[rows["axis"].isin(["base", axis.name])][axis.name].max()), axis.limit[0] if axis.limit else 1)
    one = float(rows[rows["axis"] == "base"][axis.name].iloc[0])
    ax.plot([0, most], [0, most / one], color=_GREY, linewidth=0.8, linestyle=_DOTTED)
    if axis.limit:
        ax.plot([axis.limit[0]], [axis.limit[1]], marker="_", markersize=16, markeredgewidth=1.6, color=_LIMIT)
    ax.set_xlim(0, 1.06 * most)
    ax.set_ylim(0, 1.08 * max(highest, most / one))


def _caption(rows: pd.DataFrame, axis: Axis) -> str:
    said = []
    for name in looks(rows["estimator"]):
        found = along(rows, name, axis.name)
        if len(found) > 1 and axis.limit:
            last = found.iloc[-1]
            costs = f"{last['ratio_counted']:.2f} times the passes, {last['ratio_cpu']:.2f} times the CPU time"
            said.append(f"{name}: {costs} for {last[axis.name]}.")
        elif len(found) > 1:
            passes, seconds = (slope(found[axis.name], found[column]) for column, _, _ in _MEASURES)
            said.append(f"{name}: slope {passes:.2f} (passes), {seconds:.2f} (CPU time).")
    limit = (
        f"Limit: {axis.limit[1]:g} times for {axis.limit[0]}." if axis.limit else "Slopes of logarithms: 1 is linear."
    )
    return "\n".join([*said, limit])


def _draw_memory(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw one line per case, from the memory held before the audit to its peak."""
    look = looks(rows["estimator"])
    for place, row in enumerate(rows.to_dict(orient="records")):
        colour = look[row["estimator"]].colour
        ax.plot([row["peak_before_mib"], row["peak_mib"]], [place, place], color=colour, linewidth=1.6,
                solid_capstyle="butt")  # fmt: skip
        ax.plot([row["peak_mib"]], [place], marker="|", markersize=5, color=colour)
    dress(ax, ["memory"], "MiB (measured)", "")
    names = [_case(row) for row in rows.to_dict(orient="records")]
    ax.set_yticks(range(len(names)), names, fontsize=min(6.5, 150 / max(1, len(names))))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.08 * float(rows["peak_mib"].max()))
    ax.grid(visible=False, axis="y")


def _case(row: dict[Any, Any]) -> str:
    axis = str(row["axis"])
    return "base" if axis == "base" else f"{row[axis]} {axis}"


def _mark(look: Look, fill: str, style: Any) -> Line2D:
    return Line2D(
        [], [], color=look.colour, linestyle=style, linewidth=1.0, marker=look.marker, markersize=4.5,
        markerfacecolor=look.colour if fill == "full" else "white", markeredgewidth=0.9,
    )  # fmt: skip


def _lines() -> list[Line2D]:
    black = Look("black", "o")
    return [
        named(_mark(black, "full", "-"), "passes, counted at the network"),
        named(_mark(black, "none", _DASHED), "CPU time, in bare passes"),
        named(Line2D([], [], color=_GREY, linewidth=0.8, linestyle=_DOTTED), "as often as one, nothing shared"),
        named(Line2D([], [], color=_LIMIT, marker="_", markersize=10, markeredgewidth=1.6, linestyle="none"), "limit"),
    ]


def search_figure(convergence: pd.DataFrame, epochs: pd.DataFrame) -> Figure:
    """Return worst-case estimates (nats) against passes, one panel per radius, and epochs beside their parts.

    Rows are those of `benchmarks/convergence.py` and `benchmarks/epoch.py`; one of the two may be empty.
    """
    curves = [curve for _, curve in convergence.groupby("eps", sort=False)] if len(convergence) else []
    captions = [_sentence(curve) for curve in curves]
    if len(epochs):
        captions.append(f"CPU time by passes x the bare pass + the bare critic steps. Limit: {EPOCH_LIMIT}.")
    keys = _search_key(looks(convergence["method"])) if curves else ([], [])
    with paper_style():
        sheet = Sheet(len(captions), captions, plot_height=2.3, keys=keys)
        figure, axes = sheet.draw()
        for ax, curve in zip(axes, curves, strict=False):
            _draw_curve(ax, curve, looks(convergence["method"]))
            dress(
                ax,
                [f"logits, l-inf {curve['eps'].iloc[0]}"],
                "passes (counted, logarithmic)",
                "worst-case nats (estimate)",
            )
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda passes, _place: f"{passes:,.0f}")
        if len(epochs):
            _draw_epochs(axes[-1], epochs)
        place_key(figure, *keys)
    return figure


def reached(curve: pd.DataFrame) -> float:
    """Return the passes at which one curve is first within the tolerance of its own end; NaN where it never is."""
    inside = curve[curve["reached"].astype(bool)]
    return float(inside["passes"].min()) if len(inside) else float("nan")


def _draw_curve(ax: Axes, curve: pd.DataFrame, look: dict[str, Look]) -> None:
    for (method, _), part in curve.groupby(["method", "seed"], sort=False):
        own = look[str(method)]
        ax.plot(part["passes"], part["nats"], color=own.colour, linewidth=0.5, alpha=0.45)
        ax.plot(part["passes"], part["smoothed"], color=own.colour, linewidth=1.3)
        end, passes = float(part["converged"].iloc[0]), reached(part)
        ax.axhspan(end - TOLERANCE, end + TOLERANCE, color=own.colour, alpha=0.12, linewidth=0)
        ax.plot([passes], [end], marker=own.marker, markersize=6, color=own.colour, markeredgecolor="black", zorder=4)


def _search_key(look: dict[str, Look]) -> tuple[list[Line2D], list[Line2D]]:
    methods = [named(Line2D([], [], color=own.colour, linewidth=1.3, marker=own.marker, markersize=5), label(name))
               for name, own in look.items()]  # fmt: skip
    rest = [
        named(Line2D([], [], color=_GREY, linewidth=6, alpha=0.25), f" its own end, {TOLERANCE} nats either way"),
        named(Line2D([], [], color=_GREY, marker="o", linestyle="none", markeredgecolor="black"), "first within"),
    ]
    return methods, rest


def _sentence(curve: pd.DataFrame) -> str:
    first = {str(name): reached(part) for name, part in curve[curve["seed"] == curve["seed"].min()].groupby("method")}
    said = "; ".join(f"{name} {passes:,.0f}" if passes == passes else f"{name} never" for name, passes in first.items())
    text = f"Passes until within {TOLERANCE} nats of its own end: {said}."
    ours, theirs = _two(first)
    return f"{text}\nOurs by best response's: {ours / theirs:.3f}." if ours == ours and theirs == theirs else text


def _two(first: dict[str, float]) -> tuple[float, float]:
    """Return the passes of ours and of best response; NaN for a missing method."""
    ours = [passes for name, passes in first.items() if name.startswith("search")]
    return (ours[0] if ours else float("nan")), first.get("best-response", float("nan"))


def _draw_epochs(ax: Axes, epochs: pd.DataFrame) -> None:
    parts, networks = list(dict.fromkeys(epochs["part"])), list(dict.fromkeys(epochs["network"]))
    look, width = looks(parts), 0.8 / len(parts)
    for number, part in enumerate(parts):
        chosen = epochs[epochs["part"] == part].set_index("network")["ratio"].reindex(networks)
        places = np.arange(len(networks)) + (number - (len(parts) - 1) / 2) * width
        bars = ax.bar(places, chosen, 0.92 * width, color=look[part].colour, label=label(part))
        ax.bar_label(bars, fmt="%.2f", fontsize=5.8, label_type="center", color="white")
    ax.axhline(EPOCH_LIMIT, color=_LIMIT, linewidth=1.0)
    dress(ax, ["a worst-case epoch"], "", "times its floor (measured)")
    ax.set_xticks(range(len(networks)), [label(name, 16) for name in networks])
    ax.set_ylim(0, 1.3 * max(EPOCH_LIMIT, float(epochs["ratio"].max())))
    ax.grid(visible=False, axis="x")
    ax.legend(frameon=False, loc="upper left", ncols=len(parts), fontsize=5.8, columnspacing=0.8, handlelength=1.2)
