"""What people look at: tables, statistics, figures and the HTML report, all derived from records.

Imports no torch, and nothing heavy until a name is used: `rvaudit --help` comes through here.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "to_frame": "reports.tables.table",
    "leaderboard": "reports.tables.ranking",
    "write_reports": "reports.publish",
}

__all__ = ["leaderboard", "to_frame", "write_reports"]


def __getattr__(name: str) -> Any:
    """Import one of the public names on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_HOMES})
