"""Where numbers that may each move in an interval tell least of which one is which: the worst case on the line."""

import torch
from torch import Tensor

from audit.information.feature_merging import k_means
from audit.information.gaussian_mixture import mean_shift, plug_in_terms
from audit.random_keys import Purpose, keyed_generator

_QUANTISERS = (2, 4, 8, 16, 32)
_KEPT = 2


def least_telling(clean: Tensor, low: Tensor, high: Tensor, settle: int, draws: int, seed: int) -> Tensor:
    """Return values (N,) inside [low, high] (N,) that tell little through noise of deviation one, by search.

    Starts are the clean values, quantised ones, one common value, and the fewest atoms that the intervals allow; mean
    shift ends the best of them. Chosen among by noise draws of its own. What is found limits the infimum from above.

    Source: Kolchinsky & Tracey 2017 for the value; clamped mean shift descends the entropy of the mixture.
    """

    def value(values: Tensor) -> float:
        return float(plug_in_terms(values[:, None], keyed_generator(seed, Purpose.INTERVAL_CHOICE), draws)[0].mean())

    clean, low, high = clean.double(), low.double(), high.double()
    if bool((low == high).all()):
        return clean
    starts = [start.clamp(low, high) for start in _starts(clean, low, high, seed)]
    best = sorted(starts, key=value)[:_KEPT]
    return min([*best, *(_settled(start, low, high, settle, seed) for start in best)], key=value)


def stabbed(low: Tensor, high: Tensor) -> Tensor:
    """Return one value an interval [low, high] (N,), of the fewest different values that any choice can have.

    Source: the greedy piercing of intervals by their right ends, which is optimal on the line.
    """
    points: list[float] = []
    for left, right in sorted(zip(low.tolist(), high.tolist(), strict=True), key=lambda interval: interval[1]):
        if not points or points[-1] < left:
            points.append(right)
    atoms = torch.tensor(points, dtype=low.dtype, device=low.device)
    last = torch.searchsorted(atoms, high, right=True) - 1  # the rightmost atom inside each interval
    return atoms[last]


def _starts(clean: Tensor, low: Tensor, high: Tensor, seed: int) -> list[Tensor]:
    generator = keyed_generator(seed, Purpose.INTERVAL_CENTRES)
    found = [clean, stabbed(low, high), -stabbed(-high, -low)]
    # one value that all come as near to as they can: where most intervals reach
    found += [torch.full_like(clean, float(at)) for at in (clean.median(), clean.mean(), (low.max() + high.min()) / 2)]
    for count in _QUANTISERS:
        centres, nearest = k_means(clean[:, None], count, generator)
        found.append(centres[nearest][:, 0])
    return found


def _settled(start: Tensor, low: Tensor, high: Tensor, steps: int, seed: int) -> Tensor:
    values, draws = start, keyed_generator(seed, Purpose.INTERVAL_SHIFT)
    for _ in range(steps):
        values = (values - mean_shift(values[:, None], draws, 1)[:, 0]).clamp(low, high)
    return values
