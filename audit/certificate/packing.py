"""The most images that any head keeps right, given which of them can be brought to the same feature vector.

A head names one class per feature vector, so of images that meet in one vector it keeps those of one class. What is
left is a small optimisation over which images are kept, and its value bounds every head on the layer.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs of two classes; hubs and
several classes are ours.
"""

from collections.abc import Sequence
from math import floor
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from audit.errors import UsageError

BoundKind = Literal["closed form", "matching", "milp", "milp, stopped"]

Indices = NDArray[np.int64]

_SLACK = 1e-6  # what the solver's floats are granted before a count is rounded down: upwards, the safe side


class Bound(NamedTuple):
    """The most of `images` that any head on the layer keeps right under the adversary.

    `kept` is for deterministic heads, `randomised` for heads that draw their answer (never less). Both are upper
    bounds even where the search for them was stopped; `exact` tells whether `kept` is attained by some choice of
    labels at the meetings.
    """

    kept: int
    randomised: float
    images: int
    kind: BoundKind
    exact: bool

    @property
    def certified(self) -> float:
        """Return the bound as an accuracy in [0, 1]."""
        return self.kept / self.images


def kept_at_most(labels: ArrayLike, pairs: ArrayLike, hubs: Sequence[ArrayLike], seconds: float = 60.0) -> Bound:
    """Return the most images that any head keeps right.

    labels (N,), pairs (E, 2) of images of different classes that meet, hubs: the members of each. Maximises the sum
    of x_i in {0, 1} subject to x_i + x_j <= 1 on every pair and, with one label y_t per hub t, x_i <= [y_t = label
    of i] for its members. Two classes: N less a maximum matching (König). Otherwise the linear relaxation and then,
    for at most `seconds`, branch and bound. Raises UsageError for indices that name no image and for pairs of one
    class.
    """
    classes = np.asarray(labels, dtype=np.int64)
    edges = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    members = [np.unique(np.asarray(hub, dtype=np.int64)) for hub in hubs]
    _check(classes, edges, members)
    # a hub of one class asks nothing of a head
    members = [hub for hub in members if len(np.unique(classes[hub])) > 1]
    count, touched = len(classes), np.unique(np.concatenate([edges.ravel(), *members]))
    if len(edges) == 0 and len(members) <= 1:
        kept = count - sum(len(hub) - int(np.bincount(classes[hub]).max()) for hub in members)
        return Bound(kept, float(kept), count, "closed form", exact=True)
    if len(np.unique(classes[touched])) == 2:
        kept = count - _matching(classes, edges, members)
        return Bound(kept, float(kept), count, "matching", exact=True)
    return _programme(classes, edges, members, seconds)


def _check(classes: Indices, edges: Indices, members: Sequence[Indices]) -> None:
    count = len(classes)
    if count == 0:
        raise UsageError("a bound needs at least one image, not none")
    named = np.concatenate([edges.ravel(), *members])
    wrong = named[(named < 0) | (named >= count)]
    if len(wrong):
        raise UsageError(f"image {wrong[0]} is none of the {count} images: legal are 0 to {count - 1}")
    same = edges[classes[edges[:, 0]] == classes[edges[:, 1]]]
    if len(same):
        first, second = same[0]
        raise UsageError(
            f"images {first} and {second} are both of class {classes[first]}: a pair needs two classes, "
            "since one answer may be right for both of these"
        )


def _matching(classes: Indices, edges: Indices, members: Sequence[Indices]) -> int:
    """Return the size of a maximum matching; between two classes a hub is all its pairs at once."""
    one = classes[edges[0, 0]] if len(edges) else classes[members[0][0]]
    forward = (classes[edges[:, 0]] == one)[:, None]
    ordered = np.where(forward, edges, edges[:, ::-1])
    sides: list[tuple[Indices, Indices]] = [(ordered[:, 0], ordered[:, 1])]
    for hub in members:
        left, right = hub[classes[hub] == one], hub[classes[hub] != one]
        sides.append((np.repeat(left, len(right)), np.tile(right, len(left))))
    rows, columns = (np.concatenate(side) for side in zip(*sides, strict=True))
    graph = csr_array((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(len(classes), len(classes)))
    return int((maximum_bipartite_matching(graph, perm_type="column") >= 0).sum())


class _Rows(NamedTuple):
    """Constraints A v <= b over v in [0, 1]: first one x for each of `images` constrained images, then the y's."""

    matrix: Any
    right: NDArray[np.float64]
    gain: NDArray[np.float64]
    images: int


def _programme(classes: Indices, edges: Indices, members: Sequence[Indices], seconds: float) -> Bound:
    rows = _rows(classes, edges, members)
    free = len(classes) - rows.images
    relaxed = _relaxation(rows, seconds)
    ceiling, attained, optimal = _branch_and_bound(rows, seconds)
    kept = min(floor(relaxed + _SLACK), ceiling)
    kind: BoundKind = "milp" if optimal else "milp, stopped"
    return Bound(free + kept, free + max(relaxed, float(kept)), len(classes), kind, exact=attained == kept)


def _rows(classes: Indices, edges: Indices, members: Sequence[Indices]) -> _Rows:
    touched = np.unique(np.concatenate([edges.ravel(), *members]))
    pairs = np.searchsorted(touched, edges)
    entries = [(np.repeat(np.arange(len(edges)), 2), pairs.ravel(), np.ones(2 * len(edges)))]
    height, width, right = len(edges), len(touched), [np.ones(len(edges))]
    for hub in members:
        _, which = np.unique(classes[hub], return_inverse=True)
        answers = width + np.arange(which.max() + 1)
        entries.append((np.full(len(answers), height), answers, np.ones(len(answers))))
        below = height + 1 + np.arange(len(hub))
        entries.append((below, np.searchsorted(touched, hub), np.ones(len(hub))))
        entries.append((below, answers[which], -np.ones(len(hub))))
        right.append(np.concatenate([[1.0], np.zeros(len(hub))]))
        height, width = height + 1 + len(hub), width + len(answers)
    at, variable, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    matrix = csr_array(coo_array((value, (at, variable)), shape=(height, width)))
    return _Rows(matrix, np.concatenate(right), (np.arange(width) < len(touched)).astype(float), len(touched))


def _relaxation(rows: _Rows, seconds: float) -> float:
    """Return an upper bound of the linear relaxation by weak duality: valid for any multipliers, however rough."""
    solved = linprog(
        -rows.gain, A_ub=rows.matrix, b_ub=rows.right, bounds=(0, 1), method="highs", options={"time_limit": seconds}
    )
    if solved.status != 0:
        return float(rows.images)
    multipliers = np.maximum(-solved.ineqlin.marginals, 0)
    value = multipliers @ rows.right + np.maximum(rows.gain - rows.matrix.T @ multipliers, 0).sum()
    return min(float(rows.images), float(value) * (1 + 1e-12))


def _branch_and_bound(rows: _Rows, seconds: float) -> tuple[int, int, bool]:
    """Return an upper bound of the images kept, how many a choice found keeps, and whether the search ended."""
    solved = milp(
        -rows.gain,
        constraints=LinearConstraint(rows.matrix, -np.inf, rows.right),
        integrality=np.ones(len(rows.gain)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    attained = -1 if solved.x is None else _attained(rows, np.round(solved.x))
    dual = solved.mip_dual_bound
    # a search stopped early may know no bound at all
    ceiling = floor(-dual + _SLACK) if dual is not None and np.isfinite(dual) else rows.images
    return min(ceiling, rows.images), attained, solved.status == 0


def _attained(rows: _Rows, choice: NDArray[np.float64]) -> int:
    legal = bool((rows.matrix @ choice <= rows.right).all())
    return int(rows.gain @ choice) if legal else -1
