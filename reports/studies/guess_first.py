"""Report of the "Guess First" study: the paper's table beside ours, gradient masking, information, and a figure.

Imports no torch: everything is made from the rows that `rvaudit reproduce guess-first` writes.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from audit.storage import write_atomically
from reports.figures.all_figures import figure_bytes
from reports.figures.marks import GREY, dress, named
from reports.figures.style import Look, Sheet, looks, paper_style, place_key
from reports.studies.guess_first_claims import (
    BLACK,
    WHITE,
    claims_table,
    counts,
    decided,
    elimination,
    judge_all,
    line_title,
    markdown,
)
from reports.studies.guess_first_paper import RECIPES, TITLES, Line, published
from reports.studies.guess_first_rows import Figure, Over, accuracy, over, read_rows
from reports.text import format_eps, plural

_LAYERS = ("logits", "fc2")
_FAR = 0.02  # many steps that leave so much more than the adaptive attack were misled
_MISLED = 0.5  # and one step, which is weak anyhow


def write_guess_first(path: Path, folder: Path | None = None) -> list[Path]:
    """Write the report and the figure of a study's rows beside them, or into a folder, and return the paths.

    `rows.csv` gives `rows.md`, `rows.png` and `rows.svg`. Raises what `read_rows` raises.
    """
    rows = read_rows(path)
    target = (Path(folder) if folder else path.parent) / path.stem
    drawing = accuracy_figure(rows)
    contents: dict[str, str | bytes] = {
        ".md": report_text(rows),
        ".png": figure_bytes(drawing, "png"),
        ".svg": figure_bytes(drawing, "svg"),
    }
    for suffix, content in contents.items():
        write_atomically(target.with_suffix(suffix), content)
    return [target.with_suffix(suffix) for suffix in contents]


def report_text(rows: pd.DataFrame) -> str:
    """Return the report as markdown: table, verdicts, gradient masking, information."""
    white, adaptive, black = judge_all(rows, WHITE), judge_all(rows, WHITE, "adaptive"), judge_all(rows, BLACK)
    parts = [
        _heading(rows),
        "### Accuracy, per cent\n", accuracy_table(rows), _TABLE_NOTE,
        "### Gradient masking\n", masking_table(rows), _MASKING_NOTE,
        "### The order the paper claims\n",
        f"White-box PGD. {counts(white)}\n", claims_table(white), decided(white),
        f"The same radii under the adaptive attack. {counts(adaptive)}\n", claims_table(adaptive), decided(adaptive),
        f"Black-box. {counts(black)}\n", claims_table(black), decided(black), _CLAIMS_NOTE,
        "### Representation vulnerability\n", information_table(rows), _information_note(rows),
    ]  # fmt: skip
    return "\n".join(parts)


def accuracy_table(rows: pd.DataFrame) -> str:
    """Return the paper's table: ours, mean ± standard deviation over seeds, and the paper's figure in brackets."""
    paper = published(str(rows["dataset"].iloc[0]))
    extra = [Line(*key) for key in _lines(rows) if Line(*key) not in paper and key[0] in ("adaptive", "square")]
    body = [[line_title(line), *(_cell(rows, recipe, line, paper) for recipe in RECIPES)] for line in (*paper, *extra)]
    return markdown(["attack", *(TITLES[recipe] for recipe in RECIPES)], body)


def masking_table(rows: pd.DataFrame) -> str:
    """Return, for each model and radius, what one step, many steps and the adaptive attack leave, and the verdict."""
    body = []
    for line in WHITE:
        for recipe in RECIPES:
            found = {name: accuracy(rows, recipe, line._replace(attack=name)) for name in ("fgsm", "pgd", "adaptive")}
            if all(found.values()):
                shown = [_percent(each.over) for each in found.values() if each]
                body.append([TITLES[recipe], format_eps(line.eps), *shown, masking(found)])
    return markdown(["model", "eps", "FGSM", "PGD", "adaptive", "verdict"], body)


def masking(found: dict[str, Figure | None]) -> str:
    """Return in words whether gradients mask: by trust checks, and by what weaker attacks leave beyond the union."""
    step, search, union = found["fgsm"], found["pgd"], found["adaptive"]
    assert step is not None
    assert search is not None
    assert union is not None
    told = []
    if not union.trusted:
        told.append("; ".join(text for text in union.verdicts if text != "measured"))
    if search.excess > _FAR:
        told.append(f"PGD leaves {100 * search.excess:.1f} points too much")
    if step.excess > _MISLED:
        told.append(f"single steps leave {100 * step.excess:.0f} points too much")
    return "; ".join(told) or "no sign"


def information_table(rows: pd.DataFrame) -> str:
    """Return RV in nats (an estimate) and Theorem 3.4's ceiling (an estimated bound) by layer, radius and model."""
    nats = rows[rows["attack"] == "sandwich"]
    body = []
    for layer in _LAYERS:
        for eps in sorted(nats["eps"].unique()):
            part = nats[(nats["layer"] == layer) & (nats["eps"] == eps)]
            for column, title in (("rv", "RV, nats"), ("accuracy_bound", "Theorem 3.4")):
                body.append(
                    [layer, format_eps(float(eps)), title, *(_nats(part, recipe, column) for recipe in RECIPES)]
                )
    return markdown(["layer", "eps", "", *(TITLES[recipe] for recipe in RECIPES)], body)


def accuracy_figure(rows: pd.DataFrame) -> Drawing:
    """Return accuracy (measured) against eps: white-box PGD, the adaptive attack, and black-box PGD."""
    looked = dict(zip(RECIPES, looks(f"{i}" for i in range(len(RECIPES))).values(), strict=True))
    panels = (("pgd", "white", "PGD"), ("two-losses", "white", "adaptive"), ("pgd", "black", "black-box PGD"))
    keys = [_stroke(look, TITLES[recipe]) for recipe, look in looked.items()]
    rest = [
        named(_dot(GREY, filled=True), "attack holds"),
        named(_dot(GREY, filled=False), "upper bound: attack failed"),
    ]
    with paper_style():
        sheet = Sheet(len(panels), _captions(rows), keys=(keys, rest), head=0.4)
        figure, axes = sheet.draw()
        for ax, (attack, access, title) in zip(axes, panels, strict=True):
            dress(ax, (title, str(rows["dataset"].iloc[0])), "eps (ℓ∞, pixel units)", "accuracy under attack")
            for recipe, look in looked.items():
                _curve(ax, rows[rows["recipe"] == recipe], (attack, access), look)
            ax.set_ylim(-0.03, 1.03)
            ax.set_xlim(-0.015, None)
        place_key(figure, keys, rest)
    return figure


def _curve(ax: Axes, rows: pd.DataFrame, panel: tuple[str, str], look: Look) -> None:
    attack, access = panel
    lines = [Line("clean", "none", "", 0.0)]
    lines += [Line(*key) for key in _lines(rows) if key[0] == attack and key[1] == access and key[3] <= 0.3 + 1e-9]
    if attack == "two-losses":  # where the whole attack was made, its number takes the place of the quick one's
        whole = {key[3]: Line(*key) for key in _lines(rows) if key[0] == "adaptive" and key[2] == "linf"}
        lines = [whole.get(line.eps, line) for line in lines]
    recipe = str(rows["recipe"].iloc[0]) if len(rows) else ""
    points = [(line.eps, found) for line in lines if (found := accuracy(rows, recipe, line)) is not None]
    points.sort(key=lambda point: point[0])
    ax.plot([eps for eps, _ in points], [found.over.mean for _, found in points], color=look.colour, linewidth=1.0)
    for eps, found in points:
        artist = _dot(look, filled=found.trusted)
        artist.set_data([eps], [found.over.mean])
        ax.add_line(artist)
        deviation = 0.0 if found.over.seeds < 2 else found.over.deviation
        ax.plot(
            [eps, eps], [found.over.mean - deviation, found.over.mean + deviation], color=look.colour, linewidth=0.8
        )


def _captions(rows: pd.DataFrame) -> list[str]:
    seeds = rows["seed"].nunique()
    whiskers = f"Means and standard deviations (whiskers) over {seeds} seeds." if seeds > 1 else "One seed."
    return [
        f"{whiskers} Hollow: the adaptive attack breaks over 1 % more.",
        "All attacks, image by image, at eps 0.15 and 0.3; between them PGD on cross-entropy and margin.",
        "Images made against a LeNet trained on the same images.",
    ]


def _dot(look: Look, *, filled: bool) -> Line2D:
    face = look.colour if filled else "white"
    return Line2D([], [], linestyle="none", marker=look.marker, markersize=4.5, markeredgecolor=look.colour,
                  markerfacecolor=face, markeredgewidth=0.9, zorder=3)  # fmt: skip


def _stroke(look: Look, text: str) -> Line2D:
    line = Line2D([], [], color=look.colour, linewidth=1.0, marker=look.marker, markersize=4.5)
    return named(line, text)


def _lines(rows: pd.DataFrame) -> list[tuple[str, str, str, float]]:
    columns = rows[["attack", "access", "norm", "eps"]].drop_duplicates()
    return [(str(a), str(b), str(c), float(d)) for a, b, c, d in columns.itertuples(index=False)]


def _cell(rows: pd.DataFrame, recipe: str, line: Line, paper: dict[Line, dict[str, float]]) -> str:
    found = accuracy(rows, recipe, line)
    theirs = f" ({paper[line][recipe]:.1f})" if line in paper else ""
    if found is None:
        return f"not measured{theirs}"
    return f"{_percent(found.over)}{'' if found.trusted else ' †'}{theirs}"


def _percent(found: Over) -> str:
    spread = "" if found.seeds < 2 else f" ± {100 * found.deviation:.1f}"
    return f"{100 * found.mean:.1f}{spread}"


def _nats(part: pd.DataFrame, recipe: str, column: str) -> str:
    own = part[part["recipe"] == recipe].dropna(subset=[column])
    if own.empty:
        return "not measured"
    found = over(own[column])
    spread = "" if found.seeds < 2 else f" ± {found.deviation:.2f}"
    return f"{found.mean:.2f}{spread}{'' if own['trusted'].all() else ' †'}"


def _heading(rows: pd.DataFrame) -> str:
    images = rows[rows["attack"].isin(("clean", "adaptive", "sandwich"))].groupby("attack")["images"].max()
    counted = {name: int(images.get(name, 0)) for name in ("clean", "adaptive", "sandwich")}
    dataset, seeds = str(rows["dataset"].iloc[0]), plural(rows["seed"].nunique(), "seed")
    trained = "; ".join(dict.fromkeys(text for text in rows.get("training", []) if text))
    beside = "MNIST" if dataset in ("digits", "mnist") else dataset
    return (
        f"## {dataset}\n\n{seeds}; {trained}. Single attacks and transfer on {counted['clean']} held-out images, "
        f"the adaptive attack on the first {counted['adaptive']}, Carlini & Wagner, Square by itself and nats on the "
        f"first {counted['sandwich']}. Beside it: the paper's {beside} table.\n"
    )


def _information_note(rows: pd.DataFrame) -> str:
    lines = "\n".join(f"- {line}" for line in elimination(rows))
    return f"{_NATS_NOTE}\nDoes information elimination lower RV?\n\n{lines}\n"


_TABLE_NOTE = """Mean ± standard deviation over seeds (the paper's figure). † : no claim may rest on it. For a single
white-box attack: in some seed the adaptive attack breaks over 1 % of the images more. For the adaptive attack: a trust
check failed, so the number is an upper bound. For black-box: a trust check of the substitute failed.
"""
_MASKING_NOTE = """The adaptive attack is the union, image by image, of the audit tier (cross-entropy, margin, targeted
margins, noise, Square), losses on scores divided by their spread, the true and the likeliest other scores moved one by
one, FGSM, PGD and the images that transfer.
"""
_CLAIMS_NOTE = """Differences in points: ours ± standard error (the paper's). A claim is confirmed or refuted beyond two
standard errors of seeds and images, and only where the larger figure comes from an attack that passed its checks.
"""
_NATS_NOTE = """RV is an estimate by the sandwich of the noise-smoothed layer, Theorem 3.4's ceiling on the adversarial
accuracy of any head an estimated bound. † : a measurement contradicts the estimate. fc2 is the second dense layer under
the predicted hypothesis (VIB: the mean of its Gaussian), with noise of 2.5 layer deviations on its 256 features, the
scores with half a deviation. The search gives a worst case from above: an RV at a larger radius that is lower than at a
smaller one says that the search fell short.
"""
