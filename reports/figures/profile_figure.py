"""One model along its layers and radii: nats of each estimator, and accuracies with their bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reports.estimators import curve_of, place
from reports.figures.marks import dress, named
from reports.figures.style import Keys, Look, Sheet, label, marker, paper_style, place_key
from reports.text import format_eps, format_norm, layer_place, plain_text, short_name

_NATS = {"normal_nats": "normal case (estimate)", "worst_nats": "worst case (estimate)", "rv": "RV (estimate)"}
_SHARES = {
    "natural_accuracy": "natural accuracy (measured)",
    "adversarial_accuracy": "adversarial accuracy (measured)",
    "fano_accuracy_bound": "exact Fano (estimated bound)",
    "certified_bound": "no head exceeds (certified)",
    "best_head_accuracy": "best head (measured)",
    "not_broken_share": "not broken, the network (certified)",
    "proved_share": "proved to stay right, the network (certified)",
}
_LOOKS = (Look("#0173b2", "o"), Look("#d55e00", "s"), Look("#555555", "D"), Look("#5b2a9d", "_"),
          Look("#8c6d1f", "P"), Look("#117733", "v"), Look("#117733", "^"))  # fmt: skip
_WIDTH, _HEIGHT = 4.8, 2.8
_MOST = 12  # characters of a layer's name on the axis


class Profile(NamedTuple):
    """A plot with its title and the rows that it shows."""

    title: str
    figure: Figure
    rows: pd.DataFrame


def profile_figures(frame: pd.DataFrame) -> list[Profile]:
    """Return plots of one model: against the layer and the radius, where there are two or more.

    Information and RV in nats, a plot an estimator; accuracies and bounds as fractions.
    """
    rows = frame[frame["status"].eq("valid")]
    found = []
    for keys, along in ((["dataset", "norm", "eps"], "layer"), (["dataset", "layer", "norm"], "eps")):
        for _, part in rows.groupby(keys, sort=False):
            if part[along].nunique() > 1:
                found += _plots(part, along)
    return found


def _plots(rows: pd.DataFrame, along: str) -> list[Profile]:
    estimators = sorted(set(rows["estimator"]), key=place)
    several = [part for name in estimators if len(part := rows[rows["estimator"].eq(name)].dropna(subset=["rv"])) > 1]
    axis = {"layer": "layer", "eps": "radius"}[along]
    found = []
    for part in several:
        title = f"Information against {axis}: {_where(part, along)}, {plain_text(part['estimator'].iloc[0])}"
        found.append(Profile(title, _figure(part, along, _NATS, "nats"), part))
    limited = _limits(rows)
    if limited[along].nunique() > 1:
        title = f"Accuracy against {axis}: {_where(rows, along)}"
        found.append(Profile(title, _figure(limited, along, _SHARES, "fraction"), rows))
    return found


def _limits(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row a setting: accuracies, the certified bound, and the first estimated bound that limits heads."""
    limits = [bool(curve_of(*names)) for names in zip(rows["estimator"], rows["quantity"], strict=True)]
    shown = rows.assign(fano_accuracy_bound=rows["fano_accuracy_bound"].where(pd.Series(limits, index=rows.index)))
    ordered = shown.sort_values("estimator", key=lambda names: names.map(lambda name: place(str(name))))
    return ordered.groupby(["layer", "eps"], sort=False, as_index=False).first()


def _where(rows: pd.DataFrame, along: str) -> str:
    first = rows.iloc[0]
    norm = format_norm(first["norm"])
    rest = f"{norm} {format_eps(first['eps'])}" if along == "layer" else f"{plain_text(first['layer'])}, {norm}"
    return f"{short_name(first['dataset'])}, {rest}"


def _figure(rows: pd.DataFrame, along: str, columns: dict[str, str], unit: str) -> Figure:
    drawn = [name for name in columns if rows[name].notna().any()]
    looked = dict(zip(columns, _LOOKS, strict=False))
    keys: Keys = [named(_mark(looked[name]), columns[name]) for name in drawn], []
    with paper_style():
        names = along == "layer"
        sheet = Sheet(1, width=_WIDTH, plot_height=_HEIGHT, keys=keys, foot=0.95 if names else 0.42)
        figure, (ax,) = sheet.draw()
        ordered, places = _ordered(rows, along)
        for name in drawn:
            _line(ax, places, ordered, (name, looked[name]))
        dress(ax, [_where(rows, along)], "" if names else f"radius ({format_norm(rows['norm'].iloc[0])})", unit)
        texts = [label(layer, _MOST) for layer in ordered["layer"]] if names else map(format_eps, ordered["eps"])
        _ticks(ax, places, list(texts), slanted=names)
        if unit == "fraction":
            ax.set_ylim(-0.04, 1.04)
        place_key(figure, *keys)
    return figure


def _ordered(rows: pd.DataFrame, along: str) -> tuple[pd.DataFrame, list[float]]:
    """Return the rows along an axis and their places on it: layers evenly apart, radii to scale."""
    key: Callable[[Any], Any] = layer_place if along == "layer" else float
    ordered = rows.iloc[sorted(range(len(rows)), key=lambda i: key(rows[along].iloc[i]))]
    places = [float(i) for i in range(len(ordered))] if along == "layer" else [float(eps) for eps in ordered["eps"]]
    return ordered, places


def _line(ax: Axes, places: list[float], rows: pd.DataFrame, drawn: tuple[str, Look]) -> None:
    name, look = drawn
    for x, (_, row) in zip(places, rows.iterrows(), strict=True):
        ends = _interval(row, name)
        if ends:
            ax.plot([x, x], ends, color=look.colour, linewidth=0.8, zorder=2.5)
    artist = _mark(look)
    artist.set_data(places, rows[name].astype("float64"))
    ax.add_line(artist)
    ax.update_datalim([(x, y) for x, y in zip(places, rows[name], strict=True) if not pd.isna(y)])
    ax.autoscale_view()


def _interval(row: "pd.Series[Any]", name: str) -> list[float]:
    """Return the ends of a value's error bar; none where it has none."""
    if f"{name}_se" in row and not pd.isna(row[f"{name}_se"]) and not pd.isna(row[name]):
        return [row[name] - row[f"{name}_se"], row[name] + row[f"{name}_se"]]
    ends = [row.get(f"{name}_{end}") for end in ("low", "high")]
    return [] if any(end is None or pd.isna(end) for end in ends) else [float(end) for end in ends if end is not None]


def _mark(look: Look) -> Line2D:
    artist = marker(look, "full", 7 if look.marker == "_" else 4.5)
    artist.set(linestyle="-", linewidth=0.9, color=look.colour)
    return artist


def _ticks(ax: Axes, places: list[float], texts: list[str], *, slanted: bool) -> None:
    """Label places, as many as have room; the rest keep their tick."""
    apart = 1 + len(places) // (16 if slanted else 8)
    shown = [text if i % apart == 0 else "" for i, text in enumerate(texts)]
    ax.set_xticks(places, shown, rotation=40 if slanted else 0, ha="right" if slanted else "center",
                  rotation_mode="anchor")  # fmt: skip
