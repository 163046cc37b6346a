"""Comparison of two runs: paired differences of their cells with intervals, and differences of their identities."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import safetensors.numpy
from scipy import stats

from audit.errors import UsageError
from audit.records import AuditRecord
from reports.text import format_eps, plural

_Z95 = 1.959963984540054
DIRECTION = "Differences are the second run less the first; RV is in nats and an estimate."
Key = tuple[str, str, str, str, float, str]


@dataclass(frozen=True)
class Difference:
    """A mean difference, second less first, with its 95 % interval; `low` and `high` are None where nothing gives one.

    `pairs` is how many seeds, or models, both sides have; `how` says where the interval comes from.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int
    how: str


@dataclass(frozen=True)
class Pair:
    """One cell of both runs: the difference of RV and worst case in nats, of accuracies as fractions."""

    model: str
    dataset: str
    layer: str
    norm: str
    eps: float
    estimator: str
    rv: Difference
    worst_nats: Difference
    natural_accuracy: float
    adversarial_accuracy: float
    differing: tuple[str, ...]


@dataclass(frozen=True)
class Overall:
    """The difference of RV over the models of one layer, radius and estimator: each model counts once."""

    layer: str
    norm: str
    eps: float
    estimator: str
    rv: Difference


@dataclass(frozen=True)
class Comparison:
    """The cells that two runs share, and those that only one has."""

    HEADER: ClassVar[tuple[str, ...]] = (
        "model", "layer", "eps", "estimator", "RV", "95 % interval", "seeds", "natural", "adversarial", "identity",
    )  # fmt: skip

    pairs: tuple[Pair, ...]
    overall: tuple[Overall, ...]
    only_first: tuple[Key, ...]
    only_second: tuple[Key, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    def shown(self) -> list[tuple[str, ...]]:
        """Return one row a pair, as the terminal shows it."""
        return [
            (
                pair.model, pair.layer, format_eps(pair.eps), pair.estimator, f"{pair.rv.mean:+.3f}",
                _interval(pair.rv), str(pair.rv.pairs), f"{pair.natural_accuracy:+.3f}",
                f"{pair.adversarial_accuracy:+.3f}", _short(pair.differing),
            )
            for pair in self.pairs
        ]  # fmt: skip

    def sentences(self) -> list[str]:
        """Return a summary of the pairs, and the unpaired cells."""
        return [*self.summary(), *self.unpaired(), DIRECTION]

    def summary(self) -> list[str]:
        """Return a sentence on the mean difference of every setting with several pairs."""
        return [
            f"Over {plural(each.rv.pairs, 'model')}, {each.layer}, {format_eps(each.eps)}, {each.estimator}: "
            f"RV differs by {each.rv.mean:+.3f} nats, {_interval(each.rv)}"
            for each in self.overall
        ]

    def unpaired(self) -> list[str]:
        """Return a sentence on every cell that only one of the runs has."""
        runs = (("first", self.only_first), ("second", self.only_second))
        return [
            f"only the {name} run has {key[0]}, {key[2]}, {key[3]} {format_eps(key[4])}, {key[5]}"
            for name, keys in runs
            for key in keys
        ]


def compare(first: Iterable[AuditRecord], second: Iterable[AuditRecord]) -> Comparison:
    """Return the cells of two runs in pairs: same model, data set, layer, threat model and estimator.

    Raises UsageError where no cell is in both.
    """
    one, other = _by_key(first), _by_key(second)
    shared = [key for key in one if key in other]
    if not shared:
        raise UsageError("the two runs have no finished cell in common: none of one model, data, layer, eps, estimator")
    pairs = tuple(_paired(key, one[key], other[key]) for key in sorted(shared))
    only = [tuple(sorted(set(a) - set(b))) for a, b in ((one, other), (other, one))]
    return Comparison(pairs, _overall(pairs), only[0], only[1])


def paired(differences: Sequence[float], error: float | None = None) -> Difference:
    """Return the mean of paired differences with Student's interval; of a single one, from a standard error.

    Source: Student 1908. Identical differences have an interval of no width.

    >>> [round(x, 3) for x in (paired([1.0, 2.0, 3.0]).low, paired([1.0, 2.0, 3.0]).high)]
    [-0.484, 4.484]
    """
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))
        return Difference(mean, mean - half, mean + half, n, "paired")
    if error is None:
        return Difference(mean, None, None, n, "one pair gives no interval")
    return Difference(mean, mean - _Z95 * error, mean + _Z95 * error, n, "standard errors, unpaired")


def identity_differences(first: AuditRecord, second: AuditRecord) -> tuple[str, ...]:
    """Return the parts of two records' identities that differ, as dotted names."""
    one, other = (_flat(record.details.get("identity") or {}) for record in (first, second))
    missing = object()
    return tuple(name for name in sorted(one | other) if one.get(name, missing) != other.get(name, missing))


def to_safetensors(table: pd.DataFrame) -> bytes:
    """Return a table as safetensors: numbers as float64 (N,), missing as NaN; texts as JSON in the header."""
    numbers, texts = {}, {}
    for name in map(str, table.columns):
        if pd.api.types.is_numeric_dtype(table[name]):
            numbers[name] = table[name].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
        else:
            texts[name] = json.dumps([None if pd.isna(value) else str(value) for value in table[name]])
    return safetensors.numpy.save(numbers, metadata=texts)


def _by_key(records: Iterable[AuditRecord]) -> dict[Key, AuditRecord]:
    return {
        (record.model, record.dataset, record.layer, record.norm, record.eps, record.estimator): record
        for record in records
        if record.valid
    }


def _paired(key: Key, first: AuditRecord, second: AuditRecord) -> Pair:
    return Pair(
        *key,
        rv=_difference("rv", first, second),
        worst_nats=_difference("worst_nats", first, second),
        natural_accuracy=(second.natural_accuracy or 0.0) - (first.natural_accuracy or 0.0),
        adversarial_accuracy=(second.adversarial_accuracy or 0.0) - (first.adversarial_accuracy or 0.0),
        differing=identity_differences(first, second),
    )


def _difference(name: str, first: AuditRecord, second: AuditRecord) -> Difference:
    """Over the seeds both have; with none in common or one alone, of the means with their standard errors."""
    one, other = _seeds(first, name), _seeds(second, name)
    shared = sorted(set(one) & set(other))
    if len(shared) > 1:
        return paired([other[seed] - one[seed] for seed in shared])
    mean = (getattr(second, name) or 0.0) - (getattr(first, name) or 0.0)
    errors = [getattr(record, f"{name}_se") or 0.0 for record in (first, second)]
    return paired([mean], math.hypot(*errors))


def _seeds(record: AuditRecord, name: str) -> dict[int, float]:
    return {row["seed"]: row[name] for row in record.details.get("per_seed") or []}


def _overall(pairs: Sequence[Pair]) -> tuple[Overall, ...]:
    groups: dict[tuple[str, str, float, str], list[float]] = {}
    for pair in pairs:
        groups.setdefault((pair.layer, pair.norm, pair.eps, pair.estimator), []).append(pair.rv.mean)
    return tuple(Overall(*key, paired(means)) for key, means in groups.items() if len(means) > 1)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    joined = [_flat(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in data.items()]
    return {name: value for part in joined for name, value in part.items()}


def _short(names: Sequence[str]) -> str:
    """Name groups of identity fields: `settings.attack` for all that lies below it."""
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names)) or "same"


def _interval(difference: Difference) -> str:
    if difference.low is None or difference.high is None:
        return difference.how
    return f"[{difference.low:+.3f}, {difference.high:+.3f}]" + ("" if difference.how == "paired" else " unpaired")
