"""Write the rows of a study as CSV, atomically, with columns in the order of the keys."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from audit.storage import write_atomically

_DIGITS = 5
_EXACT_COLUMNS = ("eps", "trained_eps")  # settings, not measurements: 2/255 must survive a round trip


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows with equal keys as CSV, floats to five significant digits, and return the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0] if rows else ())
    writer.writerows(
        [value if name in _EXACT_COLUMNS else _round(value) for name, value in row.items()] for row in rows
    )
    write_atomically(path, text.getvalue())
    return path


def _round(value: object) -> object:
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else value
