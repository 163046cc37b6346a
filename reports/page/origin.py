"""Where a report comes from: the date of the records, the command that repeats the run, and the versions it ran on."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from audit.records import AuditRecord
from reports.text import plain_text

_SHOWN = {"rvaudit": "rvaudit", "python": "Python", "torch": "torch", "torchvision": "torchvision", "timm": "timm",
          "robustbench": "robustbench", "numpy": "NumPy", "device": "on"}  # fmt: skip
_MOST = 3  # differing values that are listed


def of_folder(folder: Path) -> list[tuple[str, str]]:
    """Return the date of the newest record of a run folder (UTC) and the command that repeats the run, as facts."""
    times = [path.stat().st_mtime for path in (Path(folder) / "cells").glob("*.json")]
    facts = [("date", datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d"))] if times else []
    if (Path(folder) / "benchmark.yaml").exists():
        facts.append(("command", "rvaudit run benchmark.yaml"))
    return facts


def versions(records: Sequence[AuditRecord]) -> list[tuple[str, str]]:
    """Return the versions and hardware that records were made with as one fact; none where no record tells.

    Where records differ, the values are listed.
    """
    told = [made for record in records if isinstance(made := record.details.get("provenance"), Mapping)]
    found = {name: list(dict.fromkeys(str(made[name]) for made in told if name in made)) for name in _SHOWN}
    parts = [f"{_SHOWN[name]} {_listed(values)}" for name, values in found.items() if values]
    return [("versions", plain_text(", ".join(parts)))] if parts else []


def _listed(values: Sequence[str]) -> str:
    return " or ".join(values[:_MOST]) + (" or others" if len(values) > _MOST else "")
