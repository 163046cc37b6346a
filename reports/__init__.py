"""Reports: tables, statistics, figures and the HTML page, all derived from records.

Imports no torch, and nothing heavy until a name is used: `rvaudit --help` imports this package. May import: the leaves
of `audit`.
"""

from typing import Any

from audit import exported

_EXPORTS = {
    "figure1": "reports.figures.gap_figure",
    "figure2": "reports.figures.information_figure",
    "leaderboard": "reports.tables.ranking",
    "report": "reports.page.html:render_report",
    "to_frame": "reports.tables.table",
    "write_reports": "reports.publish",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_EXPORTS})
