"""The section of a model card, in Markdown, that states the audit of one model."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from audit.errors import UnknownNameError, UsageError
from audit.flags import MEANINGS
from audit.records import AuditRecord
from reports.tables.closing import AUDITED_WITH, PROVENANCE
from reports.tables.contradictions import cross_check
from reports.text import format_eps, format_norm, layer_place, plain_text, short_name

_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~"})


def card_section(records: Iterable[AuditRecord], model: str | None = None) -> str:
    """Return the Markdown section of one model: accuracies, information of each layer, flags and provenance.

    A run of several models needs `model`, a name or reference. Raises UnknownNameError for a name without a valid
    record, UsageError without a name where there are several models, or without any valid record.
    """
    valid = [record for record in cross_check(records) if record.valid]
    names = dict.fromkeys(record.model for record in valid)
    if not names:
        raise UsageError("the run holds no valid record, so there is nothing to state on a card")
    if model is None and len(names) > 1:
        raise UsageError(f"the run holds {len(names)} models: add --model, one of {', '.join(map(short_name, names))}")
    own = [record for record in valid if model in (None, record.model, short_name(record.model))]
    if not own:
        raise UnknownNameError("model of the run", str(model), map(short_name, names))
    own.sort(key=lambda each: (each.dataset, each.norm, each.eps, layer_place(each.layer), each.estimator))
    parts = [
        f"## Robustness of {_text(short_name(own[0].model))}, audited with {AUDITED_WITH}",
        _table(_ACCURACIES, own),
        _table(_INFORMATION, own),
        "Accuracies are measured, with 95 % Wilson intervals. Information is in nats; it, RV and the Fano bound on the "
        "adversarial accuracy of any head on the layer are estimates, not guarantees. A certified bound is proved on "
        "these images.",
        *_flags(own),
        f"Weights sha256 `{own[0].weights_sha256}`, {own[0].images} images.",
    ]
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return plain_text(text).translate(_MARKS)


def _share(value: float | None, low: float | None = None, high: float | None = None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _nats(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


_Cells = Mapping[str, Callable[[AuditRecord], str]]
_SETTING: _Cells = {
    "data set": lambda each: _text(short_name(each.dataset)),
    "threat": lambda each: f"{format_norm(each.norm)} {format_eps(each.eps)}",
}
_ACCURACIES: _Cells = {
    **_SETTING,
    "natural accuracy": lambda each: _share(
        each.natural_accuracy, each.natural_accuracy_low, each.natural_accuracy_high
    ),
    "adversarial accuracy": lambda each: _share(
        each.adversarial_accuracy, each.adversarial_accuracy_low, each.adversarial_accuracy_high
    ),
    "attack": lambda each: _text(each.attack),
}
_INFORMATION: _Cells = {
    **_SETTING,
    "layer": lambda each: _text(each.layer),
    "estimator": lambda each: _text(each.estimator),
    "normal nats": lambda each: _nats(each.normal_nats, each.normal_nats_se),
    "worst nats": lambda each: _nats(each.worst_nats, each.worst_nats_se),
    "RV": lambda each: _nats(each.rv, each.rv_se),
    "Fano bound": lambda each: _share(each.fano_accuracy_bound),
    "certified bound": lambda each: _share(each.certified_bound),
    "flags": lambda each: ", ".join(sorted(code for code in each.codes if code not in PROVENANCE)),
}


def _table(columns: _Cells, records: Sequence[AuditRecord]) -> str:
    """Return a Markdown table, every different row once; columns without a value are left out."""
    cells = {name: [cell(record) for record in records] for name, cell in columns.items()}
    filled = {name: column for name, column in cells.items() if any(column)}
    rows = dict.fromkeys(zip(*filled.values(), strict=True))
    lines = [tuple(filled), ("---",) * len(filled), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _flags(records: Sequence[AuditRecord]) -> list[str]:
    """Return a list of what every flag of the records means."""
    codes = sorted({code for record in records for code in record.codes})
    return ["\n".join(f"- `{code}`: {MEANINGS[code]}" for code in codes)] if codes else []
