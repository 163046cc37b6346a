"""Verify the records of a run folder: ids against identities, numbers against each other and against theory.

Reads records only and imports no torch; the command recomputes cells.
"""

import json
from collections.abc import Iterator
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from audit.adversary.norms import eps_fault
from audit.config.yaml_source import read_config
from audit.errors import AuditError, ConfigError, IntegrityError
from audit.records import AuditRecord
from audit.storage import digest
from audit.theory import adversarial_accuracy_bound, adversarial_risk_bound, fano_accuracy_bound

_ROUNDING = 1e-9
_SHARES = 1e-6  # tolerance of accuracies, which are counts over images


class Violation(NamedTuple):
    """An inconsistency: the file it is in, and its description."""

    file: str
    what: str


def check_run(folder: Path) -> tuple[list[AuditRecord], list[Violation]]:
    """Return the readable records of a run folder, and every violation found in it."""
    records, found = [], _stamp(Path(folder))
    for path in sorted((Path(folder) / "cells").glob("*.json")):
        try:
            record = AuditRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, AttributeError, IntegrityError) as error:
            found.append(Violation(path.name, f"is not a record: {error}"))
            continue
        records.append(record)
        found += [Violation(path.name, what) for what in _wrong(record, path)]
    return records, found


def check_record(record: AuditRecord) -> list[str]:
    """Return the inconsistencies of one record, one sentence each; a failed record must hold no numbers."""
    if not record.valid:
        return [] if record.rv is None else ["failed, but has an rv"]
    checks = (_identity, _reduced, _limits, _accuracies, _radius, _bounds_shown)
    return [what for check in checks for what in check(record)]


def _wrong(record: AuditRecord, path: Path) -> list[str]:
    try:
        named = [] if path.stem == record.cell_id else [f"has the id {record.cell_id}, which is not its file name"]
        return named + check_record(record)
    except (TypeError, ValueError, KeyError, AttributeError, AuditError) as error:
        return [f"holds a value of the wrong kind: {error}"]


def _stamp(folder: Path) -> list[Violation]:
    """Check that run.sha256 is the digest of the configuration in benchmark.yaml."""
    stamp, copy = folder / "run.sha256", folder / "benchmark.yaml"
    if not stamp.is_file() or not copy.is_file():
        return [Violation(folder.name, "is no run folder: benchmark.yaml or run.sha256 is missing")]
    try:
        expected = digest(read_config(copy).canonical())
    except ConfigError as error:
        return [Violation(copy.name, f"is not a benchmark: {error.faults[0]}")]
    if expected == stamp.read_text(encoding="utf-8", errors="replace").strip():
        return []
    return [Violation(copy.name, "does not match run.sha256: it was edited, or another version wrote it")]


def _identity(record: AuditRecord) -> Iterator[str]:
    identity = record.details.get("identity")
    if not isinstance(identity, dict):
        yield "has no identity"
        return
    if digest(identity) != record.cell_id:
        yield f"the digest of its identity is {digest(identity)}, not {record.cell_id}"
    for name in ("weights_sha256", "layer", "norm", "eps"):
        if identity.get(name) != getattr(record, name):
            yield f"{name} is {getattr(record, name)!r}, but {identity.get(name)!r} in its identity"
    seeds = identity.get("settings", {}).get("seeds", [])
    if len(seeds) != record.seeds or seeds != [row["seed"] for row in record.details["per_seed"]]:
        yield f"its seeds are not those of its identity, {seeds}"
    if record.details.get("data_sha256") not in (None, identity.get("data_sha256")):
        yield "data_sha256 is not that of its identity"


def _reduced(record: AuditRecord) -> Iterator[str]:
    """Check means and standard errors over seeds."""
    seeds = record.details["per_seed"]
    for row in seeds:
        if not _near(row["rv"], row["normal_nats"] - row["worst_nats"]):
            yield f"rv of seed {row['seed']} is {row['rv']}, normal - worst is {row['normal_nats'] - row['worst_nats']}"
    errors = {
        "normal_nats": [row["normal_nats_se"] for row in seeds],
        "worst_nats": [row["worst_nats_se"] for row in seeds],
        "rv": [hypot(row["normal_nats_se"], row["worst_nats_se"]) for row in seeds],
    }
    for name, sampling in errors.items():
        values = [row[name] for row in seeds]
        by_seeds = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
        yield from _deviation(record, name, fmean(values), "the mean of its seeds")
        stderr = hypot(by_seeds, fmean(sampling))
        yield from _deviation(record, f"{name}_se", stderr, "the standard error of its seeds and images")
    yield from _deviation(record, "rv", _value(record.normal_nats) - _value(record.worst_nats), "normal - worst")


def _limits(record: AuditRecord) -> Iterator[str]:
    """Check Theorem 3.4 and its risk, functions of worst_nats, and exact Fano for class shares in [1/K, 1]."""
    worst, classes = _value(record.worst_nats), record.num_classes
    if record.adversarial_accuracy_bound is None or classes is None:
        return
    bound = adversarial_accuracy_bound(worst, classes)
    yield from _deviation(record, "adversarial_accuracy_bound", bound, "Theorem 3.4")
    yield from _deviation(record, "adversarial_risk_bound", adversarial_risk_bound(worst, classes), "Theorem 3.4")
    least = fano_accuracy_bound(max(0.0, worst), 1 / classes)
    if record.fano_accuracy_bound is None or not least - _ROUNDING <= record.fano_accuracy_bound <= 1:
        yield f"fano_accuracy_bound is {record.fano_accuracy_bound}, for {classes} classes it is at least {least}"


def _not_measured(record: AuditRecord) -> bool:
    """Return whether a record says that no head of an encoder could be measured, and states no accuracy."""
    said = isinstance(heads := record.details.get("heads"), dict) and bool(heads.get("reason"))
    return said and record.natural_accuracy is None and record.adversarial_accuracy is None


def _accuracies(record: AuditRecord) -> Iterator[str]:
    if _not_measured(record):
        return
    natural, adversarial = _value(record.natural_accuracy), _value(record.adversarial_accuracy)
    if adversarial > natural:
        yield f"adversarial accuracy {adversarial} is above the clean accuracy {natural}"
    yield from _deviation(record, "adversarial_gap", natural - adversarial, "natural - adversarial")
    for name, value in (("natural_accuracy", natural), ("adversarial_accuracy", adversarial)):
        low, high = _value(getattr(record, f"{name}_low")), _value(getattr(record, f"{name}_high"))
        if not 0 <= low <= value + _ROUNDING or not value - _ROUNDING <= high <= 1:
            yield f"{name} {value} is outside its interval [{low}, {high}]"
        if abs(value * record.images - round(value * record.images)) > _SHARES * record.images:
            yield f"{name} {value} is not a fraction of {record.images} images"


def _radius(record: AuditRecord) -> Iterator[str]:
    if eps_fault(record.eps, record.norm):
        yield f"eps {record.eps} is not a legal {record.norm} radius"


def _bounds_shown(record: AuditRecord) -> Iterator[str]:
    """Check that estimates refuted by a measurement are flagged, and that no measurement exceeds a certificate."""
    certified, best = record.certified_bound, record.best_head_accuracy
    if certified is not None and best is not None and best > certified + _ROUNDING:
        yield f"its best head reaches {best}, above the certified bound {certified}"
    proved, kept = record.proved_share, record.not_broken_share
    if proved is not None and kept is not None and proved > kept + _ROUNDING:
        yield f"its proved share {proved} is above {kept}, the share not broken"
    measured = record.adversarial_accuracy
    if proved is not None and measured is not None and measured < proved - _ROUNDING:
        yield f"its adversarial accuracy {measured} is below {proved}, the share proved to stay right"
    worst, normal = _value(record.worst_nats), _value(record.normal_nats)
    margin = 2 * (_value(record.worst_nats_se) + _value(record.normal_nats_se))
    if record.contradicted:
        return
    if worst > normal + margin + _ROUNDING:
        yield f"worst_nats {worst} is above normal_nats {normal} without a flag"
    if _not_measured(record):
        return
    bound, low = record.fano_accuracy_bound, _value(record.adversarial_accuracy_low)
    # elsewhere the network is no head on the layer, so that its accuracy refutes nothing
    if record.details.get("determines_logits", True) and bound is not None and bound < low - _ROUNDING:
        yield f"its bound {bound} is below {low}, the low end of the measured adversarial accuracy, without a flag"


def _deviation(record: AuditRecord, name: str, expected: float, source: str) -> Iterator[str]:
    if not _near(_value(getattr(record, name)), expected):
        yield f"{name} is {getattr(record, name)}, {source} is {expected}"


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDING * max(1.0, abs(one), abs(other))


def _value(number: float | None) -> float:
    if number is None or isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{number!r} is not a number")
    return number


_COMPARED = ("normal_nats", "worst_nats", "rv")
_SAME_NATS, _SAME_IMAGES = 1e-3, 2  # on one device, where only the order of sums differs


def differences(stored: AuditRecord, again: AuditRecord) -> list[str]:
    """Return the differences of a recomputed cell to its record, one sentence each.

    On the same device with the same packages values agree up to the order of sums; elsewhere within their errors.
    """
    if not again.valid:
        return [f"it fails when recomputed: {again.reason}"]
    if stored.cell_id != again.cell_id:
        return [f"recomputed it is the cell {again.cell_id}: weights, images or settings differ"]
    same = _provenance(stored) == _provenance(again)
    found = []
    for name in _COMPARED:
        one, other = _value(getattr(stored, name)), _value(getattr(again, name))
        allowed = _SAME_NATS + (0.0 if same else 3 * hypot(_error(stored, name), _error(again, name)))
        if abs(one - other) > allowed:
            found.append(f"{name} is {one}, recomputed {other}")
    if _not_measured(stored) and _not_measured(again):
        return found
    for name in ("natural_accuracy", "adversarial_accuracy"):
        one, other = _value(getattr(stored, name)), _value(getattr(again, name))
        width = _value(getattr(stored, f"{name}_high")) - _value(getattr(stored, f"{name}_low"))
        if abs(one - other) > (_SAME_IMAGES / stored.images if same else width) + _ROUNDING:
            found.append(f"{name} is {one}, recomputed {other}")
    return found


def _provenance(record: AuditRecord) -> Any:
    return record.details.get("provenance")


def _error(record: AuditRecord, name: str) -> float:
    return _value(getattr(record, f"{name}_se"))
