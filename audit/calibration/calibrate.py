"""Estimators beside channels whose information is known: how far off is each, with exactly a benchmark's settings?"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import hypot, log
from statistics import fmean

from audit.adversary.threat import Linf
from audit.calibration.channels import Channel, channels
from audit.information.estimator import Estimator, MIEstimate, Subject, Vulnerability
from audit.information.labels import LabelInformation, LabelLevel
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich
from audit.records import VERSION, CalibrationRow
from audit.storage import digest

_NOISELESS = 0.1  # the noise under which atoms one apart stay distinct to nine digits


@dataclass(frozen=True)
class Calibration:
    """How an estimator is held against the channels: samples of each, and the errors that pass, in nats.

    Errors pass on channels of at most `most_nats` and `most_dimensions`; the others are shown without a verdict.
    Without a tolerance a case is shown, never judged.
    """

    samples: int
    normal_tolerance: float | None
    worst_tolerance: float | None
    most_nats: float = 3.0
    most_dimensions: int = 10


PLANS: dict[type[Estimator], Calibration] = {
    Sandwich: Calibration(2000, 0.05, 0.03),
    Mine: Calibration(5000, 0.1, None, most_nats=2.0, most_dimensions=5),
    LabelLevel: Calibration(5000, 0.01, 0.01),
    LabelInformation: Calibration(5000, 0.05, 0.05),
    Reference: Calibration(1000, None, None),
}
BRIEF = ("two points", "three points", "Gaussian", "projection of 8x8 images", "sign of a Gaussian mixture",
         "2 noiseless bits", "labels of two Gaussians")  # fmt: skip
Watch = Callable[[str, int], None]


def calibrate(
    estimator: Estimator, brief: bool = False, watch: Watch = lambda _channel, _done: None
) -> list[CalibrationRow]:
    """Return one row for each applicable channel; `watch` is told the channel and how many are done."""
    plan = _plan(estimator)
    rows = []
    for number, channel in enumerate(applicable(estimator, brief)):
        watch(f"{channel.name}, {channel.parameters}", number)
        rows.append(_row(estimator, channel, plan))
    return rows


def applicable(estimator: Estimator, brief: bool = False) -> list[Channel]:
    """Return the channels whose truth is what the estimator estimates; `brief`: one radius of the plainest few."""
    found = [channel for channel in channels() if _fits(estimator, channel)]
    return list(_plainest(found)) if brief else found


def _fits(estimator: Estimator, channel: Channel) -> bool:
    if isinstance(estimator, LabelInformation):
        return channel.tells == "label"
    if isinstance(estimator, LabelLevel):
        return channel.classes > 0
    if isinstance(estimator, Reference):
        return channel.name.startswith("projection")  # its critic sees pictures only
    return channel.tells == "image"


def settings_key(estimator: Estimator) -> str:
    """Return a name for an estimator's settings: the same settings of the same version calibrate the same."""
    return f"{estimator.name}-{digest({'version': VERSION, **asdict(estimator)})[:12]}"


def _plainest(found: list[Channel]) -> Iterator[Channel]:
    seen: set[str] = set()
    for channel in found:
        middling = channel.eps == 0 or "shift 0.5" in channel.parameters
        if channel.name in BRIEF and channel.name not in seen and middling and channel.sigma <= 0.5:
            seen.add(channel.name)
            yield channel


def _row(estimator: Estimator, channel: Channel, plan: Calibration) -> CalibrationRow:
    found = [_found(estimator, channel, plan.samples, seed) for seed in range(channel.repeats)]
    normal, normal_error = _mean([each.normal for each in found])
    worst, worst_error = _mean([each.worst for each in found]) if channel.eps else (None, None)
    judged = (
        channel.normal_nats <= min(plan.most_nats, log(plan.samples)) and _dimension(channel) <= plan.most_dimensions
    )
    worst_known = channel.worst_nats is not None and channel.exact
    return CalibrationRow(
        channel=channel.name, parameters=channel.parameters, estimator=estimator.name, samples=plan.samples,
        true_normal_nats=channel.normal_nats, normal_nats=normal, normal_nats_se=normal_error,
        true_worst_nats=channel.worst_nats, worst_nats=worst, worst_nats_se=worst_error,
        normal_tolerance=plan.normal_tolerance if judged else None,
        worst_tolerance=plan.worst_tolerance if judged and worst_known else None,
    )  # fmt: skip


def _found(estimator: Estimator, channel: Channel, samples: int, seed: int) -> Vulnerability:
    sample = channel.sample(samples, seed)
    encoder = channel.noisy(seed)
    if isinstance(estimator, Sandwich):  # it brings the channel's noise itself
        encoder, estimator = channel.noiseless(), replace(estimator, noise=channel.sigma or _NOISELESS, absolute=True)
    return estimator.vulnerability(Subject(encoder, sample.images, sample.labels), Linf(channel.eps), seed)


def _mean(estimates: list[MIEstimate]) -> tuple[float, float]:
    """Return the mean of estimates on independent samples and its standard error, in nats."""
    return fmean(each.nats for each in estimates), hypot(*(each.stderr for each in estimates)) / len(estimates)


def _dimension(channel: Channel) -> int:
    return channel.features(channel.sample(8, 0).images).shape[1]


def _plan(estimator: Estimator) -> Calibration:
    return next(plan for kind, plan in PLANS.items() if isinstance(estimator, kind))
