"""Folders in which a run found the files that its references name by relative paths. Imports no torch."""

import json
import os
from pathlib import Path
from typing import Any

from audit.storage import write_atomically

_NAME = "folders.json"


def write_start_folders(run: Path, base: Path | None) -> None:
    """Store the working folder and the folder of the benchmark file, in the order in which a run looks into them.

    Each is stored as an absolute path and as one from the run folder, since either may be moved. Raises
    EnvironmentFault where the run folder cannot be written to.
    """
    found = dict.fromkeys(folder.resolve() for folder in (Path.cwd(), base) if folder is not None)
    rows = [{"path": str(folder), "from_run": _from(run.resolve(), folder)} for folder in found]
    write_atomically(run / _NAME, json.dumps({"folders": rows}, indent=1) + "\n")


def start_folders(run: Path) -> tuple[Path, ...]:
    """Return the folders of `write_start_folders` that exist, () for a run that stored none."""
    found = (_existing(run, row) for row in _rows(run))
    return tuple(dict.fromkeys(folder for folder in found if folder is not None))


def stated_folders(run: Path) -> list[str]:
    """Return the folders of `write_start_folders` as they were stored, whether they exist or not."""
    return [row["path"] for row in _rows(run)]


def _rows(run: Path) -> list[dict[str, str]]:
    try:
        found: Any = json.loads((run / _NAME).read_text(encoding="utf-8"))["folders"]
        return [{key: str(row[key]) for key in ("path", "from_run")} for row in found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # of an older version, or edited
        return []


def _existing(run: Path, row: dict[str, str]) -> Path | None:
    options = [Path(row["path"])] if Path(row["path"]).is_absolute() else []
    options += [(run / row["from_run"]).resolve()] if row["from_run"] else []
    return next((folder for folder in options if folder.is_dir()), None)


def _from(run: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(folder, run)).as_posix()
    except ValueError:  # on another drive
        return ""
