"""One sentence of verdict on a model: what limits heads on a layer under a threat, and what the model itself keeps."""

from collections.abc import Sequence

from audit.flags import FlagCode
from audit.records import AuditRecord
from reports.estimators import curve_of, place
from reports.page.cells import with_error, with_interval
from reports.text import format_eps, format_norm, plain_text

_NO_LIMIT = 0.9995  # a bound that rounds to one says nothing
_ENDS = {"logits": 2, "penultimate": 1}
_DOUBTS = (
    (FlagCode.GATED, "the network failed a sanity check"),
    (FlagCode.UNTRUSTED_SEARCH, "the worst-case search failed a trust check"),
    (FlagCode.SATURATED, "the estimate is saturated"),
)


def verdict(records: Sequence[AuditRecord]) -> str:
    """Return the verdict on one model from its records: that of the certified setting, else of the layer nearest to
    the output under the largest radius.
    """
    valid = [record for record in records if record.valid]
    if not valid:
        reasons = dict.fromkeys(plain_text(record.reason or record.status) for record in records)
        return f"No verdict: the audit failed ({'; '.join(reasons)})."
    leading = max(valid, key=_importance)
    same = [record for record in valid if _setting(record) == _setting(leading)]
    threat = f"{format_norm(leading.norm)} {format_eps(leading.eps)}"
    return f"Under {threat}, {_limit(same)}; {_proved(same)}{_kept(leading)}."


def _importance(record: AuditRecord) -> tuple[bool, int, float]:
    certified = record.certified_bound is not None or record.proved_share is not None
    return certified, _ENDS.get(record.layer, 0), record.eps


def _setting(record: AuditRecord) -> tuple[str, str, str, float]:
    return record.dataset, record.layer, record.norm, record.eps


def _limit(records: Sequence[AuditRecord]) -> str:
    """Return the clause on heads: certified where a certificate was made, else the estimated bound, or why none."""
    layer = plain_text(records[0].layer)
    where = f"these {layer}" if layer == "logits" else f"the layer {layer}"
    certified = next((r for r in records if r.certified_bound is not None), None)
    if certified is not None:
        told = f"certified, {plain_text(certified.certified_tier)}, {certified.images} images"
        return f"no head on {where} can exceed {with_error(certified.certified_bound or 0.0, None)} ({told})"
    limiting = [r for r in records if r.fano_accuracy_bound is not None and curve_of(r.estimator, r.quantity)]
    for record in sorted(limiting, key=lambda r: (_in_doubt(r) != "", place(r.estimator))):
        bound, doubt = record.fano_accuracy_bound or 0.0, _in_doubt(record)
        name = plain_text(record.estimator)
        if doubt:
            return f"no bound on heads on {where} can be relied on: {doubt} ({name})"
        if bound < _NO_LIMIT:
            return f"no head on {where} should exceed {with_error(bound, None)} (estimated bound, exact Fano, {name})"
    few = next((r for r in records if FlagCode.TOO_FEW_IMAGES in r.codes), None)
    if few is not None:
        return f"no bound on heads on {where} is stated: too few images a class ({plain_text(few.estimator)})"
    return f"heads on {where} are not limited by what was estimated"


def _proved(records: Sequence[AuditRecord]) -> str:
    """Return the clause on what the network itself provably keeps; "" without a ledger of images."""
    found = next((r for r in records if r.proved_share is not None and r.not_broken_share is not None), None)
    if found is None:
        return ""
    low, high = (with_error(share or 0.0, None) for share in (found.proved_share, found.not_broken_share))
    share = low if low == high else f"between {low} and {high}"
    return f"{share} of the images stay right, proved ({found.images} images); "


def _in_doubt(record: AuditRecord) -> str:
    """Return why the bound of a record must not be used; "" where nothing speaks against it."""
    if record.contradicted:
        return "the estimate is contradicted by a measurement"
    return next((told for code, told in _DOUBTS if code in record.codes), "")


def _kept(record: AuditRecord) -> str:
    adversarial, natural = record.adversarial_accuracy, record.natural_accuracy
    if adversarial is None:
        return "its own accuracy under attack was not measured"
    ends = [getattr(record, f"adversarial_accuracy_{end}") for end in ("low", "high")]
    low, high = (float("nan") if end is None else end for end in ends)
    how = "an upper bound: the attack failed a trust check" if FlagCode.UNTRUSTED in record.codes else "measured"
    head = record.adversarial_head  # of an encoder, which has no answers of its own
    other = f" ({plain_text(record.natural_head)})" if record.natural_head != head else ""  # heads may differ
    clean = "" if natural is None else f", {natural:.3f} without attack{other}"
    whose = f"the best linear head found ({plain_text(head)}) keeps" if head else "its own answers keep"
    return f"{whose} {with_interval(adversarial, low, high)} under attack ({how}){clean}"
