"""Everything people look at, rebuilt from the records of a run folder."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from audit.records import read_records
from audit.storage import write_atomically
from reports.figures.all_figures import save_figures
from reports.page.html import render_report
from reports.page.origin import of_folder
from reports.page.side_by_side import Other
from reports.tables.calibration import calibration_of
from reports.tables.leftovers import leftover_sentences
from reports.tables.ranking import leaderboard, write_leaderboard
from reports.tables.table import to_frame

_STAMP = "reports.sha256"


def write_reports(folder: Path) -> list[Path]:
    """Write the leaderboard, the figures and the HTML report of a run folder and return their paths.

    The same records give the same bytes. Raises EnvironmentFault where there are no records or nothing can be
    written, IntegrityError where a record cannot be read.
    """
    return [*write_leaderboard(folder), *write_figures(folder), write_html(folder)]


def digest_of_inputs(folder: Path) -> str:
    """Return a digest of what the reports of a run folder show.

    They depend on the records, the calibrations, the benchmark and the version of the package alone.
    """
    folder = Path(folder)
    found = hashlib.sha256(version("rvaudit").encode())
    shown = (*folder.glob("cells/*"), *folder.glob("calibration/*"), *folder.glob("*.yaml"), *folder.glob("plan.json"))
    for path in sorted(shown):
        found.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return found.hexdigest()


def are_current(folder: Path, digest: str) -> bool:
    """Return whether a run folder holds its reports, and they were written from inputs with this digest."""
    stamp = Path(folder) / _STAMP
    complete = all((Path(folder) / name).exists() for name in ("report.html", "leaderboard.csv", "figures"))
    return complete and stamp.exists() and stamp.read_text(encoding="ascii") == digest


def mark_current(folder: Path, digest: str) -> None:
    """Store that the reports of a run folder were written from inputs with this digest."""
    write_atomically(Path(folder) / _STAMP, digest)


def write_figures(folder: Path) -> list[Path]:
    """Write the figures as PNG and SVG into `figures/` of a run folder and return their paths."""
    table = leaderboard(to_frame(read_records(Path(folder))))
    return save_figures(table, Path(folder), calibration_of([Path(folder)]))


def write_html(folder: Path, other: Path | None = None) -> Path:
    """Write report.html into a run folder and return its path.

    With another run folder the page is comparison.html, and shows the cells that both have side by side first; raises
    UsageError where they share none.
    """
    records, calibration = read_records(Path(folder)), calibration_of([Path(folder)])
    beside = Other(Path(other).resolve().name, read_records(Path(other))) if other else None
    page = render_report(records, calibration, leftover_sentences([Path(folder)]), of_folder(Path(folder)), beside)
    path = Path(folder) / ("comparison.html" if other else "report.html")
    write_atomically(path, page)
    return path
