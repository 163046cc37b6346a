"""Rows of a study as files: CSV in the order of the rows' keys, written whole or not at all."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from audit.storage import write_atomically

_DIGITS = 5
_EXACT = ("eps", "trained_eps")  # settings, not measurements: 2/255 must be read back as such


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows of the same columns as CSV, measured numbers to five significant digits, and return the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else ())
    writer.writerows([value if name in _EXACT else _short(value) for name, value in row.items()] for row in rows)
    write_atomically(path, text.getvalue())
    return path


def _short(value: object) -> object:
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else value
