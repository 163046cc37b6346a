"""One immutable record per finished cell, and the folder that holds them. Imports no torch.

A record is strict JSON, written atomically (temporary file, fsync, rename): everything people look at -
leaderboards, figures, reports - is derived from records and can be rebuilt from them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from audit.errors import EnvironmentFault, IntegrityError
from audit.storage import write_atomically

VERSION = 5  # of the method: raised by hand when a change changes numbers
SCHEMA = "rvaudit.record/1"
CALIBRATION_SCHEMA = "rvaudit.calibration/1"


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """What came of auditing one model at one layer under one threat model.

    MI values are in nats, accuracies and bounds are fractions in [0, 1], `eps` is in pixel units of images in
    [0, 1]. A field that could not be measured is None; `status` is "valid" or "failed", and `reason` says why.
    """

    # what was audited
    cell_id: str
    model: str
    source: str
    family: str
    training: str
    trained_eps: float
    dataset: str
    layer: str
    dimension: int | None = None
    norm: str
    eps: float
    num_classes: int | None = None
    weights_sha256: str
    weights_pinned: bool = False
    code_trusted: bool = False

    # how; `quantity` is what the nats are nats of, `ranks` whether the estimator claims to rank models
    estimator: str
    quantity: str = "I(X; g(X))"
    ranks: bool = True
    attack: str
    seeds: int
    images: int
    critic_images: int | None = None

    # what came of it
    status: str = "valid"
    reason: str = ""
    normal_nats: float | None = None
    normal_nats_se: float | None = None
    worst_nats: float | None = None
    worst_nats_se: float | None = None
    rv: float | None = None
    rv_se: float | None = None
    ceiling_nats: float | None = None
    floor_nats: float | None = None
    adversarial_accuracy_bound: float | None = None
    fano_accuracy_bound: float | None = None
    adversarial_risk_bound: float | None = None
    natural_accuracy: float | None = None
    natural_accuracy_low: float | None = None
    natural_accuracy_high: float | None = None
    adversarial_accuracy: float | None = None
    adversarial_accuracy_low: float | None = None
    adversarial_accuracy_high: float | None = None
    adversarial_gap: float | None = None
    certified_bound: float | None = None
    certified_bound_population: float | None = None
    certified_tier: str = ""
    best_head: str = ""
    best_head_accuracy: float | None = None
    flags: tuple[str, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()  # is it to be believed: number, name, level, passed, figure...
    passes: int | None = None
    seconds: float | None = None

    # everything else a reader may want: identity, per-seed values, curves, notes, versions
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """Whether the record holds numbers."""
        return self.status == "valid"

    @property
    def contradicted(self) -> bool:
        """Whether a measurement refutes one of the estimates; such a record is shown but never ranked."""
        return any(flag.startswith("contradicted") for flag in self.flags)

    @property
    def untrusted(self) -> bool:
        """Whether an attack or a search failed a trust check: its number is an upper bound, and is not ranked."""
        return any(flag.startswith("untrusted") for flag in self.flags)

    @property
    def gated(self) -> bool:
        """Whether the network failed a gate: it is broken or not what it seems, is shown, and is not ranked."""
        return any(flag.startswith("gated") for flag in self.flags)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, the schema name first."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AuditRecord":
        """Rebuild a record; raises IntegrityError for another schema or unknown and missing fields."""
        if data.get("schema") != SCHEMA:
            raise IntegrityError(f"record schema {data.get('schema')!r} is not {SCHEMA!r}, the one this version reads")
        values = {name: value for name, value in data.items() if name != "schema"}
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise IntegrityError(f"record has fields this version does not know: {', '.join(sorted(unknown))}")
        try:
            return cls(**{**values, **{name: tuple(values.get(name, ())) for name in ("flags", "checks")}})
        except TypeError as error:
            raise IntegrityError(f"record lacks a field: {error}") from error


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """An estimator beside the truth on one channel, nats throughout.

    `tolerance` is the largest |estimate - truth| that passes; None where the channel is shown without a verdict.
    A truth that is not known in closed form is None.
    """

    channel: str
    parameters: str
    estimator: str
    samples: int
    true_normal_nats: float
    normal_nats: float
    normal_nats_se: float
    true_worst_nats: float | None = None
    worst_nats: float | None = None
    worst_nats_se: float | None = None
    normal_tolerance: float | None = None
    worst_tolerance: float | None = None

    @property
    def passed(self) -> bool:
        """Whether no error is beyond its tolerance."""
        return _within(self.normal_nats, self.true_normal_nats, self.normal_tolerance) and _within(
            self.worst_nats, self.true_worst_nats, self.worst_tolerance
        )


def _within(value: float | None, truth: float | None, tolerance: float | None) -> bool:
    return tolerance is None or truth is None or value is None or abs(value - truth) <= tolerance


def write_calibration(folder: Path, key: str, rows: Sequence[CalibrationRow]) -> Path:
    """Store the rows of one estimator's settings, named by `key`, under `calibration/` of a run folder."""
    path = Path(folder) / "calibration" / f"{key}.json"
    data = {"schema": CALIBRATION_SCHEMA, "rows": [asdict(row) for row in rows]}
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return path


def is_calibrated(folder: Path, key: str) -> bool:
    """Return whether a run folder holds the calibration of these settings."""
    return (Path(folder) / "calibration" / f"{key}.json").exists()


def read_calibration(folder: Path, key: str = "*") -> list[CalibrationRow]:
    """Return the calibration rows of a folder, of all settings or of one; none where there are none.

    Raises IntegrityError for a file that holds something else.
    """
    rows: list[CalibrationRow] = []
    for path in sorted((Path(folder) / "calibration").glob(f"{key}.json")):
        try:
            data = json.loads(path.read_text())
            if data["schema"] != CALIBRATION_SCHEMA:
                raise IntegrityError(f"{path}: schema {data['schema']!r} is not {CALIBRATION_SCHEMA!r}")
            rows += [CalibrationRow(**row) for row in data["rows"]]
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{path} holds no calibration: {error}") from error
    return rows


class RecordStore:
    """A run folder's records: one file per cell under `cells/`, named by the cell's id."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, cell_id: str) -> Path:
        """Return where the record of a cell lies."""
        return self.folder / "cells" / f"{cell_id}.json"

    def write(self, record: AuditRecord) -> Path:
        """Store a record and return its path."""
        path = self.path(record.cell_id)
        write_atomically(path, json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    def read(self, cell_id: str) -> AuditRecord | None:
        """Return a cell's record, or None where the cell has none yet."""
        path = self.path(cell_id)
        return _read(path) if path.exists() else None

    def __iter__(self) -> Iterator[AuditRecord]:
        """Yield every record, in the order of their file names."""
        for path in sorted((self.folder / "cells").glob("*.json")):
            yield _read(path)


def read_records(*folders: Path) -> list[AuditRecord]:
    """Return the records of one or more run folders; raises EnvironmentFault where a folder has none."""
    records: list[AuditRecord] = []
    for folder in folders:
        found = list(RecordStore(folder))
        if not found:
            raise EnvironmentFault(f"{folder} holds no records (expected {folder}/cells/*.json)")
        records.extend(found)
    return records


def _read(path: Path) -> AuditRecord:
    try:
        return AuditRecord.from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not a record: {error}") from error
