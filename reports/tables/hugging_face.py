"""Results of a run as Hugging Face evaluation results, the `model-index` of a model card, one for each model.

Source: https://huggingface.co/docs/hub/model-cards#evaluation-results.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from audit.flags import UNRANKED, FlagCode
from audit.records import AuditRecord
from reports.tables.closing import AUDITED_WITH
from reports.tables.contradictions import cross_check
from reports.text import format_eps, plain_text, short_name

_TASK = {"type": "image-classification", "name": "Image Classification"}


def model_indices(records: Iterable[AuditRecord]) -> dict[str, dict[str, Any]]:
    """Return the `model-index` of every model with a valid record, by a file name without suffix.

    Accuracies and certified bounds are fractions, information is in nats. Estimates that a flag keeps out of the
    ranking are left out; an adversarial accuracy whose attack failed a check is named an upper bound.
    """
    models: dict[str, list[AuditRecord]] = {}
    for record in cross_check(records):
        if record.valid:
            models.setdefault(record.model, []).append(record)
    names = file_names(models)
    return {
        names[model]: {"model-index": [{"name": short_name(model), "results": _results(found)}]}
        for model, found in models.items()
    }


def file_names(models: Iterable[str]) -> dict[str, str]:
    """Return a file name for each model: its short name in ASCII letters, digits, dots, dashes and underscores."""
    found: dict[str, str] = {}
    for model in models:
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", short_name(model)).strip(".-")[:80] or "model"
        used = {name.lower() for name in found.values()}
        number = next(n for n in range(len(found) + 1) if (f"{word}-{n}" if n else word).lower() not in used)
        found[model] = f"{word}-{number}" if number else word
    return found


def _results(records: Sequence[AuditRecord]) -> list[dict[str, Any]]:
    """Return one result for each data set, with all of its metrics, each once."""
    found: list[dict[str, Any]] = []
    for dataset in dict.fromkeys(record.dataset for record in records):
        own = [record for record in records if record.dataset == dataset]
        kind, name = plain_text(dataset.partition("?")[0].rpartition("/")[2] or dataset), short_name(dataset)
        metrics: list[dict[str, Any]] = []
        for metric in (each for record in own for each in _metrics(record)):
            metrics += [] if metric in metrics else [metric]
        found.append(
            {
                "task": dict(_TASK),
                "dataset": {"type": kind, "name": name, "args": {"images": own[0].images}},
                "metrics": metrics,
                "source": {"name": AUDITED_WITH, "url": "https://pypi.org/project/rvaudit/"},
            }
        )
    return found


def _metrics(record: AuditRecord) -> Iterator[dict[str, Any]]:
    threat = {"norm": record.norm, "eps": format_eps(record.eps)}
    attack = {**threat, "attack": plain_text(record.attack)}
    place = {**threat, "layer": plain_text(record.layer)}
    estimate = {**place, "estimator": plain_text(record.estimator)}
    where = f"{record.norm} {format_eps(record.eps)}"
    bound = ", an upper bound: the attack failed a check" if FlagCode.UNTRUSTED in record.codes else ""
    yield from _metric("accuracy", "Natural accuracy", record.natural_accuracy, {})
    yield from _metric(
        "adversarial_accuracy", f"Adversarial accuracy, {where}{bound}", record.adversarial_accuracy, attack
    )
    name = f"Certified bound on any head, {where}, {place['layer']}"
    yield from _metric("certified_accuracy_bound", name, record.certified_bound, place)
    if record.codes.isdisjoint(UNRANKED):
        of = f"{where}, {place['layer']}, {estimate['estimator']}"
        yield from _metric("mutual_information", f"Normal-case information (nats), {of}", record.normal_nats, estimate)
        yield from _metric(
            "worst_case_mutual_information", f"Worst-case information (nats), {of}", record.worst_nats, estimate
        )
        yield from _metric("representation_vulnerability", f"RV (nats), {of}", record.rv, estimate)


def _metric(kind: str, name: str, value: float | None, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    if value is None:
        return []
    return [{"type": kind, "value": value, "name": name, **({"args": arguments} if arguments else {})}]
