"""How each estimator is calibrated: the channels, the number of samples and the tolerances.

A new estimator needs one entry in `PLANS`, under its name in `audit.information.registry`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from audit.calibration.channels import Channel
from audit.errors import UsageError
from audit.information.estimator import ESTIMATORS, Estimator
from audit.information.sandwich import Sandwich

BRIEF_CHANNELS = (
    "two points",
    "three points",
    "Gaussian",
    "projection of 8x8 images",
    "sign of a Gaussian mixture",
    "2 noiseless bits",
    "labels of two Gaussians",
    "labels by the mean of 16 pixels",
    "8 bits on 100 features, fitted noise",
)
_OF_CRITICS = ("Gaussian", "projection of 8x8 images")
_NOISE_WITHOUT_CHANNEL_NOISE = 0.1  # atoms at distance 1 stay distinct to nine digits


def _is_about_images(channel: Channel) -> bool:
    return channel.target == "image"


def _is_about_answers(channel: Channel) -> bool:
    return channel.target == "image" and channel.classes > 0


def _is_about_images_and_smoothed_ones(channel: Channel) -> bool:
    return channel.target in ("image", "smoothed image")


def _set_channel_noise(estimator: Estimator, channel: Channel) -> Estimator:
    assert isinstance(estimator, Sandwich)
    if channel.at_noise:
        return replace(estimator, noise=None, absolute=False)
    return replace(estimator, noise=channel.sigma or _NOISE_WITHOUT_CHANNEL_NOISE, absolute=True)


@dataclass(frozen=True)
class CalibrationPlan:
    """Samples for each channel, the tolerances in nats, and the channels that an estimator applies to.

    Errors are compared with the tolerances on channels of at most `max_nats` and `max_dimensions`; other channels, and
    values without a tolerance, are reported without a verdict. `with_noise` returns the estimator for a channel whose
    noise it adds itself; without it, the encoder adds the noise. The channels `brief` are those of every run.
    """

    samples: int
    normal_tolerance: float | None
    worst_tolerance: float | None
    max_nats: float = 3.0
    max_dimensions: int = 10
    applies: Callable[[Channel], bool] = _is_about_images
    with_noise: Callable[[Estimator, Channel], Estimator] | None = None
    brief: tuple[str, ...] = BRIEF_CHANNELS


# the critics of the released code need images with two spatial axes
_RELEASED = CalibrationPlan(1000, None, None, applies=lambda channel: channel.name.startswith("projection"))

PLANS: dict[str, CalibrationPlan] = {
    "sandwich": CalibrationPlan(
        2000, 0.05, 0.03, applies=_is_about_images_and_smoothed_ones, with_noise=_set_channel_noise
    ),
    "mine": CalibrationPlan(5000, 0.1, None, max_nats=2.0, max_dimensions=5, brief=_OF_CRITICS),
    "label-level": CalibrationPlan(5000, 0.01, 0.01, applies=_is_about_answers),
    "label-information": CalibrationPlan(2000, 0.05, 0.05, applies=lambda channel: channel.target == "label"),
    "ref-local": _RELEASED,
    "ref-mean": _RELEASED,
}


def plan_of(estimator: Estimator) -> CalibrationPlan:
    """Return the plan of an estimator, with any settings, or of the registered estimator that it is an instance of.

    Raises UsageError if there is none.
    """
    named = (name for name in PLANS if name == estimator.name)
    of_type = (name for name in PLANS if name in ESTIMATORS and isinstance(estimator, type(ESTIMATORS[name])))
    name = next(named, None) or next(of_type, None)
    if name is None:
        raise UsageError(f"estimator {estimator.name!r} has no calibration plan; plans exist for {', '.join(PLANS)}")
    return PLANS[name]
