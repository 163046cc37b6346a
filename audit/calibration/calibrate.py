"""Compare estimators, with the settings of a benchmark, with channels whose information is known in closed form."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import hypot, log
from statistics import fmean
from typing import Literal

from audit.adversary.threat import Linf
from audit.calibration.catalogue import all_channels
from audit.calibration.channels import Channel
from audit.calibration.plans import CalibrationPlan, plan_of
from audit.information.estimator import Estimator, EstimatorInputs, MIEstimate, Vulnerability
from audit.records import VERSION, CalibrationRow
from audit.storage import digest

Extent = Literal["brief", "default", "full"]
"""The channels of a calibration: one radius of a few with half of the samples, as in every run, those that tell most
about errors, or all."""

TELLING_CHANNELS = frozenset(
    {
        # large and small shifts, a search that must find a change of sign, and one that must find nothing
        "sign of a Gaussian mixture, mean 0.6, spread 1, shift 0.5",
        "sign of a Gaussian mixture, mean 1, spread 1, shift 2",
        "sign of a Gaussian mixture, mean 0, spread 1, shift 0.5",
        # atoms that merge in pairs or all at once, and ones that hardly move
        "two points, sigma 0.5, shift 0.25",
        "two points, sigma 0.25, shift 1",
        "three points, sigma 0.25, shift 0.4",
        "three points, sigma 1, shift 0.25",
        # reals: soft thresholding at low and at high noise
        "Gaussian, sigma 1, shift 0.25",
        "Gaussian, sigma 0.25, shift 1",
        "uniform, sigma 0.5, shift 0.25",
        "uniform, sigma 0.25, shift 0.75",
        # many dimensions and much information: bias
        "2-d Gaussian, sigma 0.3956",
        "5-d Gaussian, sigma 1.426",
        # ends of the scale
        "constant, eps 0",
        "3 noiseless bits, eps 0",
        # gradients through pixels
        "projection of 8x8 images, sigma 0.25, shift 0.5",
        # noise that the estimator fits
        "10-d Gaussian, fitted noise, 500 samples",
        "8 bits on 10 features, fitted noise, shift 0.25",
        # labels: pairs, a chain, a cycle of odd length, all at once, label noise, curvature
        "labels of two Gaussians, sigma 0.5, shift 0.5",
        "labels by the mean of 16 pixels, eps 1.5 x distance",
        "5 classes on a circle, network, eps 0.27",
        "4 classes on a simplex, network, eps 0.14, label noise 0.3",
    }
)
ChannelProgress = Callable[[str, int], None]
"""Receives a description of the next channel and the number of channels done."""


def calibrate(
    estimator: Estimator,
    *,
    extent: Extent = "default",
    progress: ChannelProgress = lambda _channel, _done: None,
) -> list[CalibrationRow]:
    """Return one row for each applicable channel of an extent."""
    rows = list[CalibrationRow]()
    for done, channel in enumerate(applicable_channels(estimator, extent)):
        progress(channel.title, done)
        rows.append(calibrate_channel(estimator, channel, extent))
    return rows


def applicable_channels(estimator: Estimator, extent: Extent = "default") -> list[Channel]:
    """Return the channels of an extent with known values of the quantity that an estimator estimates."""
    plan = plan_of(estimator)
    applicable = [channel for channel in all_channels() if plan.applies(channel)]
    if extent == "full":
        return applicable
    brief = list(_brief(applicable, plan.brief))
    if extent == "brief":
        return brief
    chosen = {channel.title for channel in brief} | TELLING_CHANNELS
    return [channel for channel in applicable if channel.title in chosen]


def calibration_key(estimator: Estimator, extent: Extent) -> str:
    """Return a key of settings, versions and channels: a calibration under it need not be repeated."""
    plan = plan_of(estimator)
    made = [(each.title, _samples(each, plan, extent), each.repeats) for each in applicable_channels(estimator, extent)]
    limits = (plan.normal_tolerance, plan.worst_tolerance, plan.max_nats, plan.max_dimensions)
    return f"{settings_key(estimator)}-{extent}-{digest({'channels': made, 'limits': limits})[:12]}"


def settings_key(estimator: Estimator) -> str:
    """Return a key of an estimator's settings and the versions: equal keys have equal calibrations."""
    versions = {"version": VERSION, "estimator_version": estimator.version}
    return f"{estimator.name}-{digest({**versions, **asdict(estimator)})[:12]}"


def _brief(candidates: Sequence[Channel], names: Sequence[str]) -> Iterator[Channel]:
    seen: set[str] = set()
    for channel in candidates:
        medium_radius = channel.eps == 0 or any(radius in channel.parameters for radius in ("shift 0.5", "eps 2 x"))
        if channel.name in names and channel.name not in seen and medium_radius and channel.sigma <= 0.5:
            seen.add(channel.name)
            yield channel


def _samples(channel: Channel, plan: CalibrationPlan, extent: Extent) -> int:
    return channel.samples or (plan.samples // 2 if extent == "brief" else plan.samples)


def calibrate_channel(estimator: Estimator, channel: Channel, extent: Extent) -> CalibrationRow:
    """Return the row of one channel of an extent."""
    plan = plan_of(estimator)
    samples = _samples(channel, plan, extent)
    estimates = [_estimate(estimator, channel, samples, seed) for seed in range(channel.repeats)]
    normal, normal_error = _mean([each.normal for each in estimates])
    worst, worst_error = _mean([each.worst for each in estimates]) if channel.eps else (None, None)
    true_normal, true_worst = _truth(channel, estimates)
    small = channel.at_noise is not None or _dimension(channel) <= plan.max_dimensions
    judged = true_normal <= min(plan.max_nats, log(samples)) and small
    worst_known = true_worst is not None and channel.worst_is_exact
    return CalibrationRow(
        channel=channel.name,
        parameters=channel.parameters,
        estimator=estimator.name,
        samples=samples,
        true_normal_nats=true_normal,
        normal_nats=normal,
        normal_nats_se=normal_error,
        true_worst_nats=true_worst,
        worst_nats=worst,
        worst_nats_se=worst_error,
        normal_tolerance=plan.normal_tolerance if judged else None,
        worst_tolerance=plan.worst_tolerance if judged and worst_known else None,
    )


def _truth(channel: Channel, estimates: Sequence[Vulnerability]) -> tuple[float, float | None]:
    """Return the true values, at the noise that was fitted if the channel has one for every noise."""
    if channel.at_noise is None:
        return channel.normal_nats, channel.worst_nats
    exact = [channel.at_noise(each.normal.parts["noise"]) for each in estimates]
    worst = fmean(each.worst for each in exact) if channel.worst_nats is not None else None
    return fmean(each.normal for each in exact), worst


def _estimate(estimator: Estimator, channel: Channel, samples: int, seed: int) -> Vulnerability:
    sample, plan = channel.sample(samples, seed), plan_of(estimator)
    encoder = channel.noisy_encoder(seed)
    if plan.with_noise is not None:
        encoder, estimator = channel.noiseless_encoder(), plan.with_noise(estimator, channel)
    return estimator.vulnerability(EstimatorInputs(encoder, sample.images, sample.labels), Linf(channel.eps), seed)


def _mean(estimates: list[MIEstimate]) -> tuple[float, float]:
    """Return the mean of estimates on independent samples and its standard error, in nats."""
    return fmean(each.nats for each in estimates), hypot(*(each.stderr for each in estimates)) / len(estimates)


def _dimension(channel: Channel) -> int:
    return channel.features(channel.sample(8, 0).images).shape[1]
