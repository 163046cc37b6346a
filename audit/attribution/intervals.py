"""Worst-case information of a scalar feature whose values may each move inside an interval."""

import torch
from torch import Tensor

from audit.information.feature_merging import k_means
from audit.information.gaussian_mixture import mean_shift, plug_in_terms
from audit.random_keys import Purpose, keyed_generator

_QUANTISERS = (2, 4, 8, 16, 32)  # numbers of levels of quantised starts
_REFINED_STARTS = 2


def least_informative_values(
    clean: Tensor, low: Tensor, high: Tensor, shift_steps: int, draws: int, seed: int
) -> Tensor:
    """Return values (N,) inside [low, high] (N,) with little information through unit Gaussian noise, by search.

    Starts are the clean values, quantised values, common values, and the fewest distinct values that the intervals
    allow. The best ones are refined by `shift_steps` of clamped mean shift, which descends the entropy of the Gaussian
    mixture. Candidates are compared on noise draws that no reported value uses. The information of the result is an
    upper bound of the infimum.

    Source: Kolchinsky & Tracey 2017, the plug-in lower bound of MI.
    """

    def nats(values: Tensor) -> float:
        return float(plug_in_terms(values[:, None], keyed_generator(seed, Purpose.INTERVAL_CHOICE), draws)[0].mean())

    clean, low, high = clean.double(), low.double(), high.double()
    if bool((low == high).all()):
        return clean
    starts = [start.clamp(low, high) for start in _starts(clean, low, high, seed)]
    best = sorted(starts, key=nats)[:_REFINED_STARTS]
    return min([*best, *(_clamped_mean_shift(start, low, high, shift_steps, seed) for start in best)], key=nats)


def pierce_intervals(low: Tensor, high: Tensor) -> Tensor:
    """Return a value (N,) inside each interval [low, high] (N,), with as few distinct values as possible.

    Source: greedy interval stabbing at right end points, which is optimal.
    """
    points: list[float] = []
    for left, right in sorted(zip(low.tolist(), high.tolist(), strict=True), key=lambda interval: interval[1]):
        if not points or points[-1] < left:
            points.append(right)
    atoms = torch.tensor(points, dtype=low.dtype, device=low.device)
    last = torch.searchsorted(atoms, high, right=True) - 1  # index of the rightmost atom inside each interval
    return atoms[last]


def _starts(clean: Tensor, low: Tensor, high: Tensor, seed: int) -> list[Tensor]:
    generator = keyed_generator(seed, Purpose.INTERVAL_CENTRES)
    starts = [clean, pierce_intervals(low, high), -pierce_intervals(-high, -low)]
    # common values, which the caller clamps to the intervals
    common = (clean.median(), clean.mean(), (low.max() + high.min()) / 2)
    starts += [torch.full_like(clean, float(value)) for value in common]
    for count in _QUANTISERS:
        centres, nearest = k_means(clean[:, None], count, generator)
        starts.append(centres[nearest][:, 0])
    return starts


def _clamped_mean_shift(start: Tensor, low: Tensor, high: Tensor, steps: int, seed: int) -> Tensor:
    values, generator = start, keyed_generator(seed, Purpose.INTERVAL_SHIFT)
    for _ in range(steps):
        values = (values - mean_shift(values[:, None], generator, 1)[:, 0]).clamp(low, high)
    return values
