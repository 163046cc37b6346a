"""Audit records: one immutable JSON file per finished cell, and the folder that holds them. Imports no torch.

A record is strict JSON, written atomically (temporary file, fsync, rename); tables, figures and pages derive from it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

from audit.errors import EnvironmentFault, IntegrityError
from audit.flags import FlagCode, code_of
from audit.storage import write_atomically

VERSION = 7  # of the method: increment when a change of the code changes numbers
SCHEMA = "rvaudit.record/1"
CALIBRATION_SCHEMA = "rvaudit.calibration/1"
PLAN_SCHEMA = "rvaudit.plan/1"


@dataclass(frozen=True, kw_only=True)
class AuditRecord:
    """The result of auditing one model at one layer under one threat model.

    MI values are in nats, accuracies and bounds are fractions in [0, 1], `eps` is in pixel units of images in
    [0, 1]. A field that was not measured is None; `reason` explains a "failed" `status`. `timing` is no result.
    """

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

    # method; `quantity` is the estimated quantity, `ranks` whether the estimator may rank models
    estimator: str
    quantity: str = "I(X; g(X))"
    ranks: bool = True
    attack: str
    seeds: int
    images: int
    critic_images: int | None = None
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
    natural_head: str = ""  # of an encoder: the head with its natural accuracy, trained on the layer
    adversarial_head: str = ""
    worst_probe_accuracy: float | None = None  # of the best classifier fitted on features of worst-case images
    worst_probe_accuracy_low: float | None = None
    worst_probe_accuracy_high: float | None = None
    certified_bound: float | None = None
    certified_bound_population: float | None = None
    certified_tier: str = ""
    best_head: str = ""
    best_head_accuracy: float | None = None
    proved_share: float | None = None  # of the ledger of images, as are the next three
    not_broken_share: float | None = None
    kept_population_low: float | None = None
    kept_population_high: float | None = None
    flags: tuple[str, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()  # each: number, name, level, passed, figure, ...
    passes: int | None = None
    seconds: float | None = None
    timing: dict[str, dict[str, float | None]] = field(default_factory=dict, compare=False)
    details: dict[str, Any] = field(default_factory=dict)  # identity, per-seed values, curves, notes, versions

    @property
    def valid(self) -> bool:
        """Whether the record holds numbers."""
        return self.status == "valid"

    @property
    def codes(self) -> frozenset[FlagCode]:
        """The codes of the record's flags."""
        return frozenset(code for flag in self.flags if (code := code_of(flag)) is not None)

    @property
    def contradicted(self) -> bool:
        """Whether a measurement contradicts one of the estimates; such a record is shown but never ranked."""
        return FlagCode.CONTRADICTED in self.codes

    @property
    def untrusted(self) -> bool:
        """Whether an attack or a search failed a check: its result is only an upper bound, and is not ranked."""
        return not self.codes.isdisjoint((FlagCode.UNTRUSTED, FlagCode.UNTRUSTED_SEARCH))

    @property
    def gated(self) -> bool:
        """Whether the network failed a sanity check: the record is shown but not ranked."""
        return FlagCode.GATED in self.codes

    def __repr__(self) -> str:
        return f"<AuditRecord {', '.join(f'{name} {value}' for name, value in _main_fields(self).items())}>"

    def _repr_html_(self) -> str:
        cells = (map(escape, item) for item in _main_fields(self).items())
        return f"<table>{''.join('<tr><th>{}</th><td>{}</td></tr>'.format(*each) for each in cells)}</table>"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data, the schema name first."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AuditRecord":
        """Return the record of JSON data; raises IntegrityError for another schema and unknown or missing fields."""
        if data.get("schema") != SCHEMA:
            raise IntegrityError(f"record schema {data.get('schema')!r} is not {SCHEMA!r}, which this version reads")
        values = {name: value for name, value in data.items() if name != "schema"}
        if unknown := set(values) - {f.name for f in fields(cls)}:
            raise IntegrityError(f"record has fields unknown to this version: {', '.join(sorted(unknown))}")
        try:
            return cls(**{**values, **{name: tuple(values.get(name, ())) for name in ("flags", "checks")}})
        except TypeError as error:
            raise IntegrityError(f"record has a missing field: {error}") from error


def _main_fields(record: AuditRecord) -> dict[str, str]:
    """Return what a record is of, its main numbers and the codes of its flags, as text that prints on one line."""
    names = "model dataset layer estimator norm eps normal_nats worst_nats rv fano_accuracy_bound certified_bound "
    names += "natural_accuracy adversarial_accuracy reason"
    shown = {name: getattr(record, name) for name in names.split()} | {"flags": " ".join(sorted(record.codes))}
    texts = {name: f"{each:.3g}" if isinstance(each, float) else str(each or "") for name, each in shown.items()}
    return {name: "".join(c if c.isprintable() else "?" for c in text) for name, text in texts.items() if text}


@dataclass(frozen=True, kw_only=True)
class CalibrationRow:
    """Estimates of one estimator and true values on one synthetic channel, in nats.

    A tolerance is the largest |estimate - truth| that passes, None without a verdict; unknown true values are None.
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
        """Whether all errors are within their tolerances."""
        return _within(self.normal_nats, self.true_normal_nats, self.normal_tolerance) and _within(
            self.worst_nats, self.true_worst_nats, self.worst_tolerance
        )


def _within(value: float | None, truth: float | None, tolerance: float | None) -> bool:
    return tolerance is None or truth is None or value is None or abs(value - truth) <= tolerance


def write_calibration(folder: Path, key: str, rows: Sequence[CalibrationRow]) -> Path:
    """Store the rows of one estimator's settings as `calibration/<key>.json` of a run folder; return the path."""
    path = Path(folder) / "calibration" / f"{key}.json"
    data = {"schema": CALIBRATION_SCHEMA, "rows": [asdict(row) for row in rows]}
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return path


def is_calibrated(folder: Path, key: str) -> bool:
    """Return whether a run folder holds the calibration of the settings with this key."""
    return (Path(folder) / "calibration" / f"{key}.json").exists()


def read_calibration(folder: Path, key: str = "*") -> list[CalibrationRow]:
    """Return the calibration rows of a run folder, of all settings or of one key; an empty list if there are none.

    Raises IntegrityError for a file that is not a calibration.
    """
    rows: list[CalibrationRow] = []
    for path in sorted((Path(folder) / "calibration").glob(f"{key}.json")):
        try:
            data = json.loads(path.read_text())
            if data["schema"] != CALIBRATION_SCHEMA:
                raise IntegrityError(f"{path}: schema {data['schema']!r} is not {CALIBRATION_SCHEMA!r}")
            rows += [CalibrationRow(**row) for row in data["rows"]]
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{path} is not a calibration: {error}") from error
    return rows


class RecordStore:
    """The records of a run folder: one file per cell in `cells/`, named by the cell's id.

    `plan.json` lists the cells of the run as it was started last. Other records stay in the folder where weights,
    images or code have changed since, and are not shown as results of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def path(self, cell_id: str) -> Path:
        """Return the path of a cell's record."""
        return self.folder / "cells" / f"{cell_id}.json"

    def write(self, record: AuditRecord) -> Path:
        """Store a record and return its path."""
        path = self.path(record.cell_id)
        write_atomically(path, json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    def holds_records(self) -> bool:
        """Return whether there is any record."""
        return any((self.folder / "cells").glob("*.json"))

    def read(self, cell_id: str) -> AuditRecord | None:
        """Return a cell's record, or None if it has none. Raises IntegrityError for a file that is not a record."""
        path = self.path(cell_id)
        return _read(path) if path.exists() else None

    def write_plan(self, cell_ids: Iterable[str]) -> None:
        """Store the cell ids of the present run, of its failures too."""
        data = {"schema": PLAN_SCHEMA, "cells": sorted(set(cell_ids))}
        write_atomically(self.folder / "plan.json", json.dumps(data, indent=1) + "\n")

    def plan(self) -> frozenset[str] | None:
        """Return the cell ids of the present run; None for a folder of a version that stored no plan.

        Raises IntegrityError for a file that is not a plan.
        """
        if not (path := self.folder / "plan.json").exists():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != PLAN_SCHEMA:
                raise IntegrityError(f"{path}: schema {data['schema']!r} is not {PLAN_SCHEMA!r}")
            return frozenset(map(str, data["cells"]))
        except (ValueError, TypeError, KeyError) as error:
            raise IntegrityError(f"{path} is not a plan: {error}") from error

    def present(self) -> list[AuditRecord]:
        """Return the records of the present run, in the order of file names."""
        plan = self.plan()
        return [record for record in self if plan is None or record.cell_id in plan]

    def others(self) -> list[AuditRecord]:
        """Return the records that are not of the present run, in the order of file names."""
        return [] if (plan := self.plan()) is None else [record for record in self if record.cell_id not in plan]

    def __iter__(self) -> Iterator[AuditRecord]:
        """Yield every record, in the order of file names. Raises IntegrityError for a file that is not a record."""
        for path in sorted((self.folder / "cells").glob("*.json")):
            yield _read(path)


def read_records(*folders: Path) -> list[AuditRecord]:
    """Return the records of the present plans of run folders; raises EnvironmentFault if a folder has none."""
    records: list[AuditRecord] = []
    for folder in folders:
        found = (store := RecordStore(folder)).present()
        if not found and store.holds_records():
            raise EnvironmentFault(f"{folder} holds records of earlier runs only: none of its present plan is done")
        if not found:
            raise EnvironmentFault(f"{folder} holds no records (expected {folder}/cells/*.json)")
        records.extend(found)
    return records


def _read(path: Path) -> AuditRecord:
    try:
        return AuditRecord.from_dict(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not a record: {error}") from error
