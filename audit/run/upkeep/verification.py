"""Is a run what it says: ids follow from identities, numbers from one another, and nothing impossible stands in it.

Reads records alone and imports no torch; recomputing cells is the command's part.
"""

import json
from collections.abc import Iterator, Sequence
from math import hypot, inf, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from audit.config.yaml_source import read_config
from audit.errors import AuditError, ConfigError, IntegrityError
from audit.records import AuditRecord
from audit.storage import digest
from audit.theory import max_accuracy, max_adversarial_accuracy, min_adversarial_risk

_ROUNDING = 1e-9
_SHARES = 1e-6  # of accuracies, which are counts over images


class Violation(NamedTuple):
    """Something that cannot be so: the file it stands in, and what."""

    file: str
    what: str


def check_run(folder: Path) -> tuple[list[AuditRecord], list[Violation]]:
    """Return the records of a run folder that can be read, and everything that is wrong with any of them."""
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
    """Return what is impossible in one record, one sentence each; nothing for a failed one, which holds no numbers."""
    if not record.valid:
        return [] if record.rv is None else ["failed, yet it has an rv"]
    checks = (_identity, _reduced, _limits, _accuracies, _radius, _bounds_shown)
    return [what for check in checks for what in check(record)]


def _wrong(record: AuditRecord, path: Path) -> list[str]:
    try:
        named = [] if path.stem == record.cell_id else [f"has the id {record.cell_id}, which is not its name"]
        return named + check_record(record)
    except (TypeError, ValueError, KeyError, AttributeError, AuditError) as error:
        return [f"holds a value of the wrong kind: {error}"]


def _stamp(folder: Path) -> list[Violation]:
    """The stamp is of the configuration that the folder's copy describes."""
    stamp, copy = folder / "run.sha256", folder / "benchmark.yaml"
    if not stamp.is_file() or not copy.is_file():
        return [Violation(folder.name, "is no run folder: benchmark.yaml or run.sha256 is missing")]
    try:
        said = digest(read_config(copy).canonical())
    except ConfigError as error:
        return [Violation(copy.name, f"is no benchmark: {error.faults[0]}")]
    same = said == stamp.read_text(encoding="utf-8", errors="replace").strip()
    return (
        []
        if same
        else [Violation(copy.name, "is not the configuration that run.sha256 is of, or another version stamped it")]
    )


def _identity(record: AuditRecord) -> Iterator[str]:
    identity = record.details.get("identity")
    if not isinstance(identity, dict):
        yield "has no identity"
        return
    if digest(identity) != record.cell_id:
        yield f"its identity gives the id {digest(identity)}, not {record.cell_id}"
    for name in ("weights_sha256", "layer", "norm", "eps"):
        if identity.get(name) != getattr(record, name):
            yield f"{name} is {getattr(record, name)!r}, its identity says {identity.get(name)!r}"
    seeds = identity.get("settings", {}).get("seeds", [])
    if len(seeds) != record.seeds or seeds != [row["seed"] for row in record.details["per_seed"]]:
        yield f"its seeds are not those of its identity, {seeds}"
    if record.details.get("data_sha256") not in (None, identity.get("data_sha256")):
        yield "data_sha256 is not that of its identity"


def _reduced(record: AuditRecord) -> Iterator[str]:
    """Published values are the means over seeds, their errors what seeds and samples give."""
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
        yield from _told(record, name, fmean(values), "the mean of its seeds")
        yield from _told(record, f"{name}_se", _stderr(values, sampling), "what its seeds give")
    yield from _told(record, "rv", _value(record.normal_nats) - _value(record.worst_nats), "normal - worst")


def _stderr(values: Sequence[float], sampling: Sequence[float]) -> float:
    by_sampling = fmean(sampling) / sqrt(len(values))
    return max(by_sampling, stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0)


def _limits(record: AuditRecord) -> Iterator[str]:
    """Theorem 3.4 and its risk follow from worst_nats; exact Fano also from class shares, which lie in [1/K, 1]."""
    worst, classes = _value(record.worst_nats), record.num_classes
    if record.adversarial_accuracy_bound is None or classes is None:
        return
    yield from _told(record, "adversarial_accuracy_bound", max_adversarial_accuracy(worst, classes), "Theorem 3.4")
    yield from _told(record, "adversarial_risk_bound", min_adversarial_risk(worst, classes), "Theorem 3.4")
    least = max_accuracy(max(0.0, worst), 1 / classes)
    if record.fano_accuracy_bound is None or not least - _ROUNDING <= record.fano_accuracy_bound <= 1:
        yield f"fano_accuracy_bound is {record.fano_accuracy_bound}, for {classes} classes it is at least {least}"


def _accuracies(record: AuditRecord) -> Iterator[str]:
    natural, adversarial = _value(record.natural_accuracy), _value(record.adversarial_accuracy)
    if adversarial > natural:
        yield f"adversarial accuracy {adversarial} is above the natural one, {natural}"
    yield from _told(record, "adversarial_gap", natural - adversarial, "natural - adversarial")
    for name, value in (("natural_accuracy", natural), ("adversarial_accuracy", adversarial)):
        low, high = _value(getattr(record, f"{name}_low")), _value(getattr(record, f"{name}_high"))
        if not 0 <= low <= value + _ROUNDING or not value - _ROUNDING <= high <= 1:
            yield f"{name} {value} is outside its interval [{low}, {high}]"
        if abs(value * record.images - round(value * record.images)) > _SHARES * record.images:
            yield f"{name} {value} is no share of {record.images} images"


def _radius(record: AuditRecord) -> Iterator[str]:
    if not 0 <= record.eps < inf or (record.norm == "linf" and record.eps > 1):
        yield f"eps {record.eps} is no legal {record.norm} radius"


def _bounds_shown(record: AuditRecord) -> Iterator[str]:
    """An estimate that a measurement refutes may stand there, but must say so; a certificate cannot be refuted."""
    certified, best = record.certified_bound, record.best_head_accuracy
    if certified is not None and best is not None and best > certified + _ROUNDING:
        yield f"its best head keeps {best}, more than the certified {certified}"
    worst, normal = _value(record.worst_nats), _value(record.normal_nats)
    doubt = 2 * (_value(record.worst_nats_se) + _value(record.normal_nats_se))
    if record.contradicted:
        return
    if worst > normal + doubt + _ROUNDING:
        yield f"worst_nats {worst} is above normal_nats {normal}, and no flag says so"
    bound, low = record.fano_accuracy_bound, _value(record.adversarial_accuracy_low)
    if bound is not None and bound < low - _ROUNDING:
        yield f"its bound {bound} is under the measured adversarial accuracy's {low}, and no flag says so"


def _told(record: AuditRecord, name: str, expected: float, source: str) -> Iterator[str]:
    if not _near(_value(getattr(record, name)), expected):
        yield f"{name} is {getattr(record, name)}, {source} is {expected}"


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _ROUNDING * max(1.0, abs(one), abs(other))


def _value(number: float | None) -> float:
    if number is None or isinstance(number, bool) or not isinstance(number, int | float):
        raise ValueError(f"{number!r} stands where a number is needed")
    return number


_DEVIATIONS = ("normal_nats", "worst_nats", "rv")
_SAME_NATS, _SAME_IMAGES = 1e-3, 2  # one device computes the same up to the order of sums


def differences(stored: AuditRecord, again: AuditRecord) -> list[str]:
    """Return where a cell computed again disagrees with its record, one sentence each.

    On the same device with the same packages values agree up to the order of sums; elsewhere within their doubt.
    """
    if not again.valid:
        return [f"it fails when computed again: {again.reason}"]
    if stored.cell_id != again.cell_id:
        return [f"computed again it is the cell {again.cell_id}: weights, images or settings are others"]
    same = _provenance(stored) == _provenance(again)
    found = []
    for name in _DEVIATIONS:
        one, other = _value(getattr(stored, name)), _value(getattr(again, name))
        allowed = _SAME_NATS + (0.0 if same else 3 * hypot(_error(stored, name), _error(again, name)))
        if abs(one - other) > allowed:
            found.append(f"{name} is {one}, computed again {other}")
    for name in ("natural_accuracy", "adversarial_accuracy"):
        one, other = _value(getattr(stored, name)), _value(getattr(again, name))
        width = _value(getattr(stored, f"{name}_high")) - _value(getattr(stored, f"{name}_low"))
        if abs(one - other) > (_SAME_IMAGES / stored.images if same else width) + _ROUNDING:
            found.append(f"{name} is {one}, computed again {other}")
    return found


def _provenance(record: AuditRecord) -> Any:
    return record.details.get("provenance")


def _error(record: AuditRecord, name: str) -> float:
    return _value(getattr(record, f"{name}_se"))
