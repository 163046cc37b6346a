"""Theorem 3.2 on a Gaussian mixture: the corrected bounds, the exact curve, and estimates on samples.

Source: Zhu, Zhang & Evans 2020, Theorem 3.2, with its two bounds in the right order (`audit.theory`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from audit.adversary.threat import Linf
from audit.calibration.catalogue import all_channels
from audit.calibration.channels import SPAN, Channel, as_values
from audit.calibration.closed_forms import ExactSignInformation, sign_of_gaussian
from audit.errors import UsageError
from audit.information.estimator import Estimator, EstimatorInputs, Vulnerability
from audit.information.label_entropy import LabelEntropy
from audit.information.sandwich import Sandwich
from audit.studies.rows import write_rows
from audit.theory import vulnerability_range

Progress = Callable[[str, int], None]
_NOISE = 0.1  # small enough to keep the two values of the sign apart
# mean and standard deviation of w.x: three mixtures of `audit.calibration.catalogue` with distinct ratios
MIXTURES = ((1.0, 1.0), (0.6, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Sweep:
    """Shifts (eps times the dual norm of w, in standard deviations), number of samples, seeds, and mixtures."""

    shifts: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
    samples: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)
    mixtures: tuple[tuple[float, float], ...] = MIXTURES

    def __post_init__(self) -> None:
        if any(not 0 < shift <= SPAN / 4 for shift in self.shifts):
            raise UsageError(f"shifts {list(self.shifts)} must each be above 0 and at most {SPAN / 4:g}")
        if self.samples < 10 or not self.seeds:
            raise UsageError(f"a sweep needs at least 10 samples and a seed, not {self.samples} and {len(self.seeds)}")


def theorem32(sweep: Sweep, out: Path, progress: Progress = lambda _stage, _done: None) -> list[dict[str, Any]]:
    """Write theorem32.csv into `out` and return its rows, one per estimator, mixture and shift."""
    rows: list[dict[str, Any]] = []
    for mean, spread in sweep.mixtures:
        for shift in sweep.shifts:
            progress(f"mean {mean:g}, shift {shift:g}", len(rows) // 2)
            rows += _rows((mean, spread, shift), sweep)
    write_rows(out / "theorem32.csv", rows)
    return rows


def _rows(mixture: tuple[float, float, float], sweep: Sweep) -> Iterator[dict[str, Any]]:
    mean, spread, shift = mixture
    truth, channel = sign_of_gaussian(*mixture), _channel(*mixture)
    lower, upper = vulnerability_range(truth.adversarial_gap)
    for estimator in (Sandwich(noise=_NOISE, absolute=True), LabelEntropy()):
        found = [_estimate(estimator, channel, sweep.samples, seed) for seed in sweep.seeds]
        gaps = [_gap(channel, sweep.samples, seed, shift) for seed in sweep.seeds]
        yield {
            "mean": mean,
            "spread": spread,
            "shift": shift,
            "exact_gap": truth.adversarial_gap,
            "exact_rv": truth.rv,
            "lower_bound": lower,
            "upper_bound": upper,
            "estimator": estimator.name,
            "samples": sweep.samples,
            "seeds": len(sweep.seeds),
            **_mean_and_error("rv", [x.nats for x in found], [x.stderr for x in found]),
            **_mean_and_error("gap", gaps, [_gap_error(truth, sweep.samples)] * len(gaps)),
        }


def _channel(mean: float, spread: float, shift: float) -> Channel:
    """Return the calibration channel of a mixture at another radius; its samples do not depend on the radius."""
    prefix = f"mean {mean:g}, spread {spread:g}, "
    template = next((c for c in all_channels() if c.name.startswith("sign") and c.parameters.startswith(prefix)), None)
    if template is None:
        raise UsageError(f"no channel has mean {mean:g} and spread {spread:g}: see audit.calibration.catalogue")
    return replace(template, parameters=f"{prefix}shift {shift:g}", eps=shift / SPAN)


def _estimate(estimator: Estimator, channel: Channel, samples: int, seed: int) -> Vulnerability:
    images, labels = channel.sample(samples, seed)
    return estimator.vulnerability(
        EstimatorInputs(channel.noiseless_encoder(), images, labels), Linf(channel.eps), seed
    )


def _gap(channel: Channel, samples: int, seed: int, shift: float) -> float:
    """Return the adversarial gap of the sign under the optimal attack, which moves every sample to the other side."""
    images, labels = channel.sample(samples, seed)
    margin = as_values(images)[:, 0] * (2 * labels - 1)
    return float(((margin > 0) & (margin <= shift)).float().mean())


def _gap_error(truth: ExactSignInformation, samples: int) -> float:
    return sqrt(truth.adversarial_gap * (1 - truth.adversarial_gap) / samples)


def _mean_and_error(name: str, values: Sequence[float], errors: Sequence[float]) -> dict[str, float]:
    """Return the mean over seeds and its standard error: the larger of the between-seed and the sampling error."""
    sampling_error = hypot(*errors) / len(errors)
    seed_error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: fmean(values), f"{name}_se": max(sampling_error, seed_error)}
