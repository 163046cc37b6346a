"""Certified upper bounds beside the best head trained: CSV rows, a profile over layers and a profile over eps.

Imports no torch: everything is drawn from the rows that `rvaudit certify` writes.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from audit.errors import IntegrityError
from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.figures.marks import GREY, dress, named, whisker
from reports.figures.proved_band import LEDGER_TEXT, ledger_band, ledger_mark
from reports.figures.style import Look, Sheet, label, looks, marker, paper_style, place_key
from reports.text import format_eps, format_norm, short_name, spreadsheet_text

Row = Mapping[str, Any]

COLUMNS = (
    "model", "training", "dataset", "layer", "dimension", "norm", "eps", "images", "certified_bound",
    "certified_bound_randomised", "certified_bound_population", "certified_bound_held_out", "confidence",
    "certified_tier", "best_head", "best_head_accuracy", "heads", "attack", "at_hubs", "pairs", "carried_from",
    "proved", "broken", "undecided", "kept_population", "ledger_reason", "ledger_passes",
    "delta_curve", "passes", "attack_passes", "seconds", "reason", "flags", "weights_sha256", "witness",
    "witness_sha256",
)  # fmt: skip
_NUMBERS = (
    "eps", "images", "certified_bound", "certified_bound_population", "certified_bound_held_out", "best_head_accuracy",
    "confidence", "proved", "broken", "undecided",
)  # fmt: skip
_NEEDED = ("model", "layer", "norm", "eps", "certified_bound", "best_head_accuracy", "certified_tier")
_HEIGHT = 2.1


def to_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV: nested values as JSON in one field, text escaped against spreadsheet formulas."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_field(name, row.get(name)) for name in COLUMNS] for row in rows)
    return buffer.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return rows from a CSV that `to_csv` wrote, or from the JSON that `rvaudit certify --json` prints.

    Raises IntegrityError for a file that holds neither.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        plain = text.lstrip().startswith("[")
        rows: list[dict[str, Any]] = json.loads(text) if plain else list(map(_read, csv.DictReader(StringIO(text))))
        missing = [name for row in rows for name in _NEEDED if name not in row.keys()]  # noqa: SIM118 (or it is no row)
    except (ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} holds no rows of certificates: {error}") from error
    if missing:
        raise IntegrityError(f"{path} holds no rows of certificates: column {missing[0]} is not there")
    return rows


def layer_profile(rows: Sequence[Row]) -> Figure | None:
    """Return bound (certified) and best head (measured) along the layers, one line per eps.

    Bands show what a ledger proves of the network. None for a single layer, unless it has a ledger at one eps.
    """
    single = len({row["eps"] for row in rows}) == 1 and any(_known(row, "proved") is not None for row in rows)
    return _profile(rows, "layer", "eps", fewest=1 if single else 2)


def eps_profile(rows: Sequence[Row]) -> Figure | None:
    """Return bound (certified) and best head (measured) against eps, one line per layer; None for a single eps."""
    return _profile(rows, "eps", "layer")


def write_certificate_figures(rows: Sequence[Row], path: Path) -> list[Path]:
    """Write the profiles that are not empty beside a file of rows and return the paths.

    `rows.csv` gives `rows-layers.png` and `rows-eps.png`, each with an SVG.
    """
    paths = []
    for name, figure in (("layers", layer_profile(rows)), ("eps", eps_profile(rows))):
        for suffix in ("png", "svg") if figure is not None else ():
            target = path.with_name(f"{path.stem}-{name}.{suffix}")
            write_atomically(target, figure_bytes(figure, suffix))  # type: ignore[arg-type]
            paths.append(target)
    return paths


def _profile(rows: Sequence[Row], along: str, lines: str, fewest: int = 2) -> Figure | None:
    shown = [row for row in rows if row["certified_bound"] is not None or row["best_head_accuracy"] is not None]
    models = list(dict.fromkeys(row["model"] for row in shown))
    if len({row[along] for row in shown}) < fewest:
        return None
    names = list(dict.fromkeys(_name(row, lines) for row in shown))
    # looks follow the order of their keys: numbered, they follow the order of the rows
    looked = dict(zip(names, looks(f"{i:03}" for i in range(len(names))).values(), strict=True))
    keys = _line_key(looked), _kind_key(shown)
    with paper_style():
        captions = [_caption([row for row in shown if row["model"] == model]) for model in models]
        sheet = Sheet(len(models), captions, plot_height=_HEIGHT, keys=keys, head=0.46)
        figure, axes = sheet.draw()
        for model, ax in zip(models, axes, strict=True):
            _draw(ax, [row for row in shown if row["model"] == model], along, lines, looked)
        place_key(figure, *keys)
    return figure


def _draw(ax: Axes, rows: Sequence[Row], along: str, lines: str, looked: Mapping[str, Look]) -> None:
    first = rows[0]
    title = (short_name(first["model"]), f"{short_name(first['dataset'])}, {format_norm(first['norm'])}")
    axis = "layer" if along == "layer" else "eps (pixel units)"
    dress(ax, title, axis, "adversarial accuracy")
    places = list(dict.fromkeys(row["layer"] for row in rows))
    for name, look in looked.items():
        own = [row for row in rows if _name(row, lines) == name]
        at = [float(places.index(row["layer"])) if along == "layer" else float(row["eps"]) for row in own]
        _curve(ax, at, own, look)
    ax.set_ylim(-0.04, 1.04)
    if along == "layer":
        ax.set_xticks(range(len(places)), [label(place, 14) for place in places])
        ax.set_xlim(-0.3, len(places) - 0.7)
    else:
        radii = sorted({float(row["eps"]) for row in rows})
        ax.set_xticks(radii, [format_eps(eps) for eps in radii])
        room = 0.08 * (radii[-1] - radii[0])
        ax.set_xlim(radii[0] - room, radii[-1] + room)


def _curve(ax: Axes, at: Sequence[float], rows: Sequence[Row], look: Look) -> None:
    """Draw the bound with whiskers up to the population bound, and the accuracy of the best head."""
    for column, fill, dashes in (("certified_bound", "full", "-"), ("best_head_accuracy", "none", "--")):
        known = sorted((x, float(row[column])) for x, row in zip(at, rows, strict=True) if row[column] is not None)
        if not known:
            continue
        x, y = zip(*known, strict=True)
        ax.plot(x, y, linestyle=dashes, color=look.colour, linewidth=1.0, zorder=2)
        for point in known:
            artist = marker(look, fill, 4.5)
            artist.set_data([point[0]], [point[1]])
            ax.add_line(artist)
    for x_, row in zip(at, rows, strict=True):
        if row["certified_bound"] is not None and row["certified_bound_population"] is not None:
            whisker(ax, [x_, x_], [float(row["certified_bound"]), float(row["certified_bound_population"])], look)
        if (proved := _known(row, "proved")) is not None:
            ledger_band(ax, x_, (proved, 1 - (_known(row, "broken") or 0.0)), look, _population(row))


def _known(row: Row, name: str) -> float | None:
    value = row.get(name)
    return None if value is None or value == "" else float(value)


def _population(row: Row) -> tuple[float, float] | None:
    """Return the ledger's limits on the population, of a row as it is computed or as text from a file."""
    ends = row.get("kept_population")
    parts = [part.strip() for part in ends.split(";")] if isinstance(ends, str) else list(ends or ())
    return (float(parts[0]), float(parts[1])) if len(parts) == 2 else None


def _name(row: Row, column: str) -> str:
    return f"eps {format_eps(float(row['eps']))}" if column == "eps" else str(row["layer"])


def _caption(rows: Sequence[Row]) -> str:
    tiers, sizes = sorted({str(row["certified_tier"]) for row in rows}), sorted({int(row["images"]) for row in rows})
    confidence = {float(row["confidence"]) for row in rows}
    counted = " or ".join(map(str, sizes))
    limit = f"{max(confidence):.0%} limit on the population" if confidence else "limit on the population"
    heads = sorted({str(row["best_head"]) for row in rows if row["best_head"]})
    best = f" Best heads: {', '.join(heads)}." if heads else ""
    return f"{counted} images. Certified: {', '.join(tiers)}; whiskers reach up to the {limit}.{best}"


def _line_key(looked: Mapping[str, Look]) -> list[Line2D]:
    return [named(marker(look, "full", 4.5), label(name, 18)) for name, look in looked.items()]


def _kind_key(rows: Sequence[Row]) -> list[Line2D]:
    proved = [named(ledger_mark(), LEDGER_TEXT)] if any(_known(row, "proved") is not None for row in rows) else []
    lines = [_stroke("-", GREY.colour, "no head exceeds (certified)"), _stroke("--", "white", "best head (measured)")]
    return [*lines, *proved]


def _stroke(dashes: Literal["-", "--"], face: str, text: str) -> Line2D:
    line = Line2D([], [], color=GREY.colour, linewidth=1.0, linestyle=dashes)
    line.set(marker=GREY.marker, markersize=4.5, markerfacecolor=face)
    return named(line, text)


def _field(name: str, value: Any) -> str | float | int:
    if value is None:
        return ""
    if name == "delta_curve":
        return "; ".join(f"{point['relative']:g}={point['bound']:.6g}" for point in value)
    if isinstance(value, Mapping):
        return "; ".join(f"{key}={number:.6g}" for key, number in value.items())
    if isinstance(value, list | tuple):
        return spreadsheet_text("; ".join(map(str, value)))
    return spreadsheet_text(value) if isinstance(value, str) else value


def _read(row: Mapping[str, str]) -> dict[str, Any]:
    texts: dict[str, Any] = {name: value for name, value in row.items() if name not in _NUMBERS}
    return texts | {name: float(row[name]) if row[name] else None for name in _NUMBERS if name in row}
