"""The band of what is proved about a network: from the share of images kept to the share that nothing has broken."""

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from reports.figures.marks import GREY
from reports.figures.style import Look

LEDGER_TEXT = "network: proved to keep, not broken (certified)"
_WIDTH, _FAINT = 5.0, 0.28


def ledger_band(
    ax: Axes, x: float, ends: tuple[float, float], look: Look, population: tuple[float, float] | None = None
) -> None:
    """Draw the band at `x` between two shares, with thin lines to limits on the population where known."""
    if population is not None:
        ax.plot([x, x], population, color=look.colour, linewidth=0.6, alpha=0.8, zorder=1.7)
    ax.plot([x, x], ends, color=look.colour, linewidth=_WIDTH, alpha=_FAINT, solid_capstyle="butt", zorder=1.8)
    for share, mark in zip(ends, "^v", strict=True):
        ax.plot([x], [share], marker=mark, markersize=3.2, color=look.colour, linestyle="none", zorder=2.6)


def ledger_mark() -> Line2D:
    """Return the legend's picture of the band."""
    return Line2D([], [], color=GREY.colour, alpha=0.6, linewidth=_WIDTH - 1, marker="^", markersize=3.2)
