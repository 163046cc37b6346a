"""Evaluations of a curve of `convergence.py`, and its columns: smoothed values, final value, and convergence marks."""

from statistics import fmean, median
from typing import Any, NamedTuple

TOLERANCE, WINDOW = 0.05, 5


class Evaluation(NamedTuple):
    """The estimate in nats after a number of steps (collapse and rounds, or critic steps) and passes."""

    step: int
    passes: float
    nats: float


def curve(evaluations: list[Evaluation]) -> list[dict[str, Any]]:
    """Return the columns of a complete curve: smoothed values, final value, and distance from the final value."""
    half, quarter = WINDOW // 2, max(1, len(evaluations) // 4)
    nats = [evaluation.nats for evaluation in evaluations]
    smoothed = [median(nats[max(0, i - half) : i + half + 1]) for i in range(len(nats))]
    converged = fmean(nats[-quarter:])
    drift = converged - fmean(nats[-2 * quarter : -quarter])
    near = [abs(value - converged) <= TOLERANCE for value in smoothed]
    first = near.index(True) if any(near) else len(near)
    stays = len(near) - next((i for i, inside in enumerate(reversed(near)) if not inside), len(near))
    return [
        {
            "step": evaluation.step,
            "passes": f"{evaluation.passes:.0f}",
            "nats": f"{evaluation.nats:.4f}",
            "smoothed": f"{smoothed[i]:.4f}",
            "converged": f"{converged:.4f}",
            "drift": f"{drift:.4f}",
            "reached": i >= first,
            "within": i >= stays,
        }
        for i, evaluation in enumerate(evaluations)
    ]
