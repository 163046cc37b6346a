"""Accuracies of a run in the fields of RobustBench's `model_info` files, one file for each model and threat model.

Source: Croce et al. 2021, "RobustBench: a standardized adversarial robustness benchmark", and its `model_info` folder.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from audit.flags import FlagCode
from audit.records import AuditRecord
from reports.text import format_eps, plain_text, short_name

_THREATS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


class Claim(NamedTuple):
    """The claim of one model: its file's path without suffix, its fields, and the record it comes from."""

    path: str
    fields: dict[str, Any]
    record: AuditRecord


def claims(records: Iterable[AuditRecord]) -> list[Claim]:
    """Return the claims of the valid records of a run, sorted by path.

    Layers and estimators share the accuracies of a model under a threat model. The record whose images are kept, if
    there is one, stands for the others.
    """
    found: dict[tuple[object, ...], AuditRecord] = {}
    for record in records:
        if record.valid:
            hashes = (record.weights_sha256, record.details.get("data_sha256"))
            key = (record.model, record.dataset, record.norm, record.eps, record.attack, *hashes)
            if key not in found or _rank(record) < _rank(found[key]):
                found[key] = record
    chosen = list(found.values())
    return sorted(
        (Claim(path, _fields(record), record) for path, record in zip(_paths(chosen), chosen, strict=True)),
        key=lambda claim: claim.path,
    )


def _rank(record: AuditRecord) -> tuple[bool, str]:
    return not record.details.get("images"), record.cell_id


def _fields(record: AuditRecord) -> dict[str, Any]:
    """Return the fields of one claim: accuracies in percent, as text; what a record does not know is None."""
    notes = record.details.get("notes") or {}
    link = str(notes.get("reference") or "")
    robust = _percent(record.adversarial_accuracy)
    return {
        "link": plain_text(link) if link.startswith(("https://", "http://")) else None,
        "name": plain_text(record.model),
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": _dataset(record.dataset),
        "venue": None,
        "architecture": plain_text(record.family),
        "eps": format_eps(record.eps),
        "clean_acc": _percent(record.natural_accuracy),
        "reported": None,
        **({"autoattack_acc": robust} if "autoattack" in record.attack else {}),
        "external": robust,
        "unreliable": record.gated or FlagCode.UNTRUSTED in record.codes,
        "footnote": f"Measured by rvaudit on {record.images} images under {record.attack}.",
        "rvaudit": {
            "cell_id": record.cell_id,
            "threat_model": _THREATS[record.norm],
            "attack": record.attack,
            "weights_sha256": record.weights_sha256,
            "data_sha256": record.details.get("data_sha256"),
            "images": record.images,
            "clean_correct": _count(record.natural_accuracy, record.images),
            "robust_correct": _count(record.adversarial_accuracy, record.images),
        },
    }


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.2f}"


def _count(share: float | None, images: int) -> int | None:
    return None if share is None else round(share * images)


def _dataset(reference: str) -> str:
    """Return RobustBench's name of a data set, or the short name of one that it does not have."""
    return "imagenet" if reference.partition(":")[0] == "imagenet" else short_name(reference)


def _paths(records: Sequence[AuditRecord]) -> list[str]:
    """Return paths `<data set>/<threat model>/<model>`, with radius and cell id where others would have the same."""
    forms = (
        [_stem(record) for record in records],
        [f"{_stem(record)}_eps-{_word(format_eps(record.eps))}" for record in records],
        [f"{_stem(record)}_eps-{_word(format_eps(record.eps))}_{record.cell_id[:8]}" for record in records],
    )
    found = []
    for place in range(len(records)):
        unique = (form[place] for form in forms if _lower(form).count(form[place].lower()) == 1)
        found.append(next(unique, forms[-1][place]))
    return found


def _lower(paths: Sequence[str]) -> list[str]:
    """Return paths as file systems compare them that do not tell case."""
    return [path.lower() for path in paths]


def _stem(record: AuditRecord) -> str:
    return f"{_word(_dataset(record.dataset))}/{_THREATS[record.norm]}/{_word(short_name(record.model))}"


def _word(text: str) -> str:
    """Return a text as a file name: ASCII letters, digits, dots, dashes and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:80] or "model"
