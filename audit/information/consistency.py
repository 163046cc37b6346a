"""Flags of one record: an estimate contradicts a measurement or another estimate, or a search is not trusted.

Accuracies are measured; information, RV and the bounds computed from them are estimated. If they contradict each
other, the measurement holds: the estimate is flagged as contradicted, shown, and not ranked.
"""

from collections.abc import Iterable
from typing import NamedTuple

from audit.adversary.attack_checks import Check, failed, verdict
from audit.flags import FlagCode, flag
from audit.information.floors import InformationFloors
from audit.information.smoothing.saturation import ceiling_flags


class SeedMean(NamedTuple):
    """Mean of an estimate over seeds and its standard error, in nats."""

    nats: float
    stderr: float


def estimate_flags(normal: SeedMean, worst: SeedMean, floors: InformationFloors | None, ceiling: float) -> list[str]:
    """Return the flags of one record's estimates, the most serious first; `ceiling` is ln(images) in nats."""
    flags: list[str] = []
    if floors is not None:
        flags += _contradiction("normal_nats", normal, floors.normal, floors.slack)
        flags += _contradiction("worst_nats", worst, floors.worst, floors.slack)
    if worst.nats > normal.nats + 2 * (worst.stderr + normal.stderr):
        flags.append(flag(FlagCode.CONTRADICTED, f"worst_nats {worst.nats:.2f} is above normal_nats {normal.nats:.2f}"))
    flags += ceiling_flags(worst.nats, ceiling)
    if normal.nats > ceiling - 0.2:
        particulars = f"normal_nats {normal.nats:.2f} is at its ceiling ln(images) = {ceiling:.2f}"
        flags.append(flag(FlagCode.FEW_IMAGES, particulars))
    flags += [
        flag(FlagCode.NEGATIVE, f"{name} {mean.nats:.2f} is below zero beyond its standard error")
        for name, mean in (("normal_nats", normal), ("worst_nats", worst))
        if mean.nats < -2 * mean.stderr
    ]
    return flags


def bound_flags(bound: float, adversarial_low: float, measured: str = "the measured adversarial accuracy") -> list[str]:
    """Return the flag of an estimated bound on the heads of a layer below the interval of one head's accuracy.

    The head must read that layer alone: the network itself is one only where its logits are a function of the layer.
    """
    if bound >= adversarial_low:
        return []
    particulars = f"the bound {bound:.3f} is below {measured}'s {adversarial_low:.3f}"
    return [flag(FlagCode.CONTRADICTED, particulars)]


def certificate_flags(bound: float, certified: float) -> list[str]:
    """Return the flag of an estimated accuracy bound above a certified one on the same images."""
    if certified >= bound:
        return []
    particulars = (
        f"the certified bound {certified:.3f} is below the estimated one {bound:.3f}: the search missed images"
    )
    return [flag(FlagCode.CERTIFICATE_TIGHTER, particulars)]


def distrust_flags(checks: Iterable[Check]) -> list[str]:
    """Return the flag of an attack that failed a trust check, with `attack_checks.verdict`."""
    checks = tuple(checks)
    names = _names(failed(checks))
    return [flag(FlagCode.UNTRUSTED, f"the adversarial accuracy ({verdict(checks)}) failed {names}")] if names else []


def search_distrust_flags(checks: Iterable[Check]) -> list[str]:
    """Return the flag of a worst-case search that failed a trust check: its result is only an upper bound."""
    names = _names(failed(checks))
    particulars = f"the worst-case search failed {names}, so the worst-case information is an upper bound"
    return [flag(FlagCode.UNTRUSTED_SEARCH, particulars)] if names else []


def _names(checks: Iterable[Check]) -> str:
    return ", ".join(check.name for check in checks)


def _contradiction(name: str, mean: SeedMean, floor: float, slack: float) -> list[str]:
    missing = floor - mean.nats
    if missing <= 2 * mean.stderr + slack:
        return []
    particulars = f"{name} {mean.nats:.2f} is below its measured floor {floor:.2f} by {missing:.2f} nats"
    return [flag(FlagCode.CONTRADICTED, particulars)]
