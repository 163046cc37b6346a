"""Estimates that the number of images limits: how far apart the plug-in pair is, and how many images would do."""

from math import exp, expm1, log

from audit.flags import FlagCode, flag

_SATURATED_PAIR, _WIDE_PAIR = 0.5, 0.2  # nats between the two plug-in estimates
_AT_CEILING = 0.1  # nats under ln n
_MANY = 1e9


def pair_flags(lower: float, upper: float, images: int) -> tuple[str, ...]:
    """Return the flag of a plug-in pair in nats that lies far apart, if it does."""
    apart = upper - lower
    if apart <= _WIDE_PAIR:
        return ()
    if apart <= _SATURATED_PAIR:
        told = f"the plug-in pair is {apart:.1f} nats apart: more images would raise the estimate"
        return (flag(FlagCode.FEW_IMAGES, told),)
    told = f"the plug-in pair is {apart:.1f} nats apart: {images_needed(_log_odds(apart, images), _SATURATED_PAIR)}"
    return (flag(FlagCode.SATURATED, told),)


def ceiling_flags(worst: float, ceiling: float) -> list[str]:
    """Return the flag of a worst case in nats that lies within 0.1 of its ceiling ln n, if it does."""
    if worst <= ceiling - _AT_CEILING:
        return []
    missing = max(ceiling - worst, 1e-12)  # an estimate can round to its ceiling
    # ceiling - value = ln(1 + (n - 1) e^-u) for terms equal to u
    told = images_needed(log(expm1(ceiling) / expm1(missing)), _SATURATED_PAIR)
    at = f"worst_nats {worst:.2f} is within {_AT_CEILING} of its ceiling ln(images) = {ceiling:.2f}: {told}"
    return [flag(FlagCode.SATURATED, at)]


def images_needed(log_odds: float, apart: float) -> str:
    """Return in words the number of images at which a pair lies `apart` nats apart.

    With terms equal to u, n images have a pair ln(1 + e^u / (n - 1)) nats apart. `log_odds` is u.

    >>> images_needed(log(1000), 0.5), images_needed(50.0, 0.5)
    ('it would take about 1,500 images', 'it would take over a billion images')
    """
    if log_odds - log(expm1(apart)) > log(_MANY):
        return "it would take over a billion images"
    wanted = exp(log_odds) / expm1(apart) + 1
    digits = 10 ** max(0, len(str(int(wanted))) - 2)
    return f"it would take about {round(wanted / digits) * digits:,} images"


def _log_odds(apart: float, images: int) -> float:
    return log(max(1, images - 1)) + (log(expm1(apart)) if apart < 30 else apart)
