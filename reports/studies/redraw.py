"""Redraw every figure and page of the committed studies from their rows, without torch.

A study is a folder of rows; what draws it takes the folder and returns the paths it wrote, none where the folder
holds no rows of its own.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from audit.errors import EnvironmentFault, UnknownNameError

Draw = Callable[[Path], list[Path]]


def _drawer(module: str) -> Draw:
    """Return a function that imports a module on use and calls its `draw`."""
    return lambda folder: list(import_module(_HOMES[module]).draw(folder))


def _table1(folder: Path) -> list[Path]:
    from reports.studies.table1 import write_table1

    return [write_table1(rows, rows.with_suffix(".md")) for rows in sorted(folder.glob("*.csv"))]


def _guess_first(folder: Path) -> list[Path]:
    from reports.studies.guess_first import write_guess_first

    return [path for rows in sorted(folder.glob("*.csv")) for path in write_guess_first(rows)]


_HOMES = {
    "leaderboard": "reports.figures.leaderboard_figures",
    "mixture": "reports.figures.mixture_figure",
    "features": "reports.figures.feature_figure",
    "saliency": "reports.figures.saliency_figure",
    "speed": "reports.figures.speed_figure",
    "study": "reports.studies.population.page",
}
# name: the folders its rows lie in, under the folder of all studies; and what draws them
STUDIES: dict[str, tuple[tuple[str, ...], Draw]] = {
    "figure1-2": (("digits", "third-party", "figure1-small"), _drawer("leaderboard")),
    "theorem-3.2": (("figures",), _drawer("mixture")),
    "figure3": (("figures/digits", "figures/third-party"), _drawer("features")),
    "figure4-5": (("figures/digits", "figures/third-party"), _drawer("saliency")),
    "table1": (("table1",), _table1),
    "guess-first": (("guess-first",), _guess_first),
    "speed": (("figures",), _drawer("speed")),
    "study": (("study",), _drawer("study")),
}


def holds_studies(folder: Path) -> bool:
    """Return whether a folder holds folders of rows, and is no run folder."""
    return not (folder / "cells").is_dir() and any((folder / at).is_dir() for ats, _ in STUDIES.values() for at in ats)


def draw_studies(folder: Path, only: str | None = None) -> list[Path]:
    """Redraw all studies under a folder, or the one named `only`, and return the paths written.

    Raises UnknownNameError for a study that is not there, EnvironmentFault where there are no rows to draw.
    """
    if only is not None and only not in STUDIES:
        raise UnknownNameError("study", only, STUDIES)
    paths = []
    for name, (places, draw) in STUDIES.items():
        if only in (None, name):
            paths += [path for at in places if (folder / at).is_dir() for path in draw(folder / at)]
    if not paths:
        raise EnvironmentFault(f"{folder} holds no rows of {only or 'any study'}")
    return paths
