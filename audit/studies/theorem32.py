"""Theorem 3.2 on a Gaussian mixture: the corrected bounds, the exact curve, and what estimators say on samples.

Source: Zhu, Zhang & Evans 2020, Theorem 3.2, with its two bounds in the right order (`audit.theory`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from audit.adversary.threat import Linf
from audit.calibration.channels import SPAN, Channel, as_values, channels
from audit.calibration.closed_forms import SignTruth, sign_of_gaussian
from audit.errors import UsageError
from audit.information.estimator import Estimator, Subject, Vulnerability
from audit.information.labels import LabelLevel
from audit.information.sandwich import Sandwich
from audit.studies.rows import write_rows
from audit.theory import vulnerability_range

Watch = Callable[[str, int], None]
_NOISE = 0.1  # the sign is one of two values: noise under which they stay distinct
# mean and spread of w.x: the three mixtures of `audit.calibration.channels` that lie apart by mean / spread
MIXTURES = ((1.0, 1.0), (0.6, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Sweep:
    """Which shifts (eps times the dual norm of w, in units of the spread), how many samples, and which seeds."""

    shifts: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
    samples: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    mixtures: tuple[tuple[float, float], ...] = MIXTURES

    def __post_init__(self) -> None:
        if any(not 0 < shift <= SPAN / 4 for shift in self.shifts):
            raise UsageError(f"shifts {list(self.shifts)} must each be above 0 and at most {SPAN / 4:g}")
        if self.samples < 10 or not self.seeds:
            raise UsageError(f"a sweep needs 10 samples or more and a seed, not {self.samples} and {len(self.seeds)}")


def theorem32(sweep: Sweep, out: Path, watch: Watch = lambda _stage, _done: None) -> list[dict[str, Any]]:
    """Write theorem32.csv into a folder and return its rows: one an estimator, mixture and shift."""
    rows: list[dict[str, Any]] = []
    for mean, spread in sweep.mixtures:
        for shift in sweep.shifts:
            watch(f"mean {mean:g}, shift {shift:g}", len(rows) // 2)
            rows += _rows((mean, spread, shift), sweep)
    write_rows(out / "theorem32.csv", rows)
    return rows


def _rows(mixture: tuple[float, float, float], sweep: Sweep) -> Iterator[dict[str, Any]]:
    mean, spread, shift = mixture
    truth, channel = sign_of_gaussian(*mixture), _channel(*mixture)
    lower, upper = vulnerability_range(truth.adversarial_gap)
    for estimator in (Sandwich(noise=_NOISE, absolute=True), LabelLevel()):
        found = [_found(estimator, channel, sweep.samples, seed) for seed in sweep.seeds]
        gaps = [_gap(channel, sweep.samples, seed, shift) for seed in sweep.seeds]
        yield {
            "mean": mean, "spread": spread, "shift": shift, "exact_gap": truth.adversarial_gap, "exact_rv": truth.rv,
            "lower_bound": lower, "upper_bound": upper, "estimator": estimator.name, "samples": sweep.samples,
            "seeds": len(sweep.seeds), **_with_error("rv", [x.nats for x in found], [x.stderr for x in found]),
            **_with_error("gap", gaps, [_gap_error(truth, sweep.samples)] * len(gaps)),
        }  # fmt: skip


def _channel(mean: float, spread: float, shift: float) -> Channel:
    """The calibration channel of this mixture at another radius: its samples do not depend on the radius."""
    named = f"mean {mean:g}, spread {spread:g}, "
    like = next((c for c in channels() if c.name.startswith("sign") and c.parameters.startswith(named)), None)
    if like is None:
        raise UsageError(f"no channel has mean {mean:g} and spread {spread:g}: see audit.calibration.channels")
    return replace(like, parameters=f"{named}shift {shift:g}", eps=shift / SPAN)


def _found(estimator: Estimator, channel: Channel, samples: int, seed: int) -> Vulnerability:
    images, labels = channel.sample(samples, seed)
    return estimator.vulnerability(Subject(channel.noiseless(), images, labels), Linf(channel.eps), seed)


def _gap(channel: Channel, samples: int, seed: int, shift: float) -> float:
    """How much more often the sign is wrong under the best attack, which moves every sample towards the other side."""
    images, labels = channel.sample(samples, seed)
    margin = as_values(images)[:, 0] * (2 * labels - 1)
    return float(((margin > 0) & (margin <= shift)).float().mean())


def _gap_error(truth: SignTruth, samples: int) -> float:
    return sqrt(truth.adversarial_gap * (1 - truth.adversarial_gap) / samples)


def _with_error(name: str, values: Sequence[float], errors: Sequence[float]) -> dict[str, float]:
    """The mean over seeds and its standard error: the larger of the spread over seeds and of what samples allow."""
    sampled = hypot(*errors) / len(errors)
    spread = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: fmean(values), f"{name}_se": max(sampled, spread)}
