"""The maximum number of images that any head classifies correctly, given which images collide.

A head assigns one class to each feature vector, so of the images that collide at one vector it classifies correctly
only those of one class. Choosing the images to keep is a packing problem, and its optimum bounds the adversarial
accuracy of every head on the layer.

Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for pairs of two classes; hubs and
more classes are our extension.
"""

from collections.abc import Sequence
from math import floor
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from audit.certificate.collisions import Collisions, pairs_and_hubs
from audit.errors import UsageError
from audit.types import Labels

BoundKind = Literal["closed form", "matching", "milp", "milp, stopped"]

Indices = NDArray[np.int64]

_SOLVER_TOLERANCE = 1e-6  # added to the solver's floats before rounding down, so that the bound errs upwards


class PackingBound(NamedTuple):
    """Upper bound on how many of `images` any head on the layer classifies correctly under the adversary.

    `kept` is for deterministic heads, `randomised` for heads with random outputs (never less). Both are upper bounds
    even if branch and bound was stopped; `exact` means that some labelling of the collisions attains `kept`. `kind`
    names the method.
    """

    kept: int
    randomised: float
    images: int
    kind: BoundKind
    exact: bool

    @property
    def certified(self) -> float:
        """The bound as an accuracy in [0, 1]."""
        return self.kept / self.images


def collision_bound(collisions: Collisions, labels: Labels, seconds: float) -> PackingBound:
    """Return the bound that collisions give for images with labels (N,); raises what `packing_bound` raises."""
    pairs, hubs = pairs_and_hubs(collisions, labels)
    return packing_bound(labels.tolist(), pairs, hubs, seconds)


def packing_bound(
    labels: ArrayLike, pairs: ArrayLike, hubs: Sequence[ArrayLike], seconds: float = 60.0
) -> PackingBound:
    """Return an upper bound on the number of images that any head classifies correctly.

    labels (N,), pairs (E, 2) of colliding images of different classes, hubs: the members of each. Solves

        max sum_i x_i,  x_i in {0, 1},  x_i + x_j <= 1 for pairs,  x_i <= [y_t = label of i] for members i of hub t

    with one label y_t per hub. One hub: closed form. Two classes: N minus a maximum matching (König). Otherwise the
    linear relaxation and, for at most `seconds`, branch and bound. Raises UsageError for indices out of range and for
    pairs of one class.
    """
    classes = np.asarray(labels, dtype=np.int64)
    edges = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    members = [np.unique(np.asarray(hub, dtype=np.int64)) for hub in hubs]
    _check(classes, edges, members)
    # a hub of one class constrains nothing
    members = [hub for hub in members if len(np.unique(classes[hub])) > 1]
    count, constrained = len(classes), np.unique(np.concatenate([edges.ravel(), *members]))
    if len(edges) == 0 and len(members) <= 1:
        kept = count - sum(len(hub) - int(np.bincount(classes[hub]).max()) for hub in members)
        return PackingBound(kept, float(kept), count, "closed form", exact=True)
    if len(np.unique(classes[constrained])) == 2:
        kept = count - _maximum_matching(classes, edges, members)
        return PackingBound(kept, float(kept), count, "matching", exact=True)
    return _integer_bound(classes, edges, members, seconds)


def _check(classes: Indices, edges: Indices, members: Sequence[Indices]) -> None:
    count = len(classes)
    if count == 0:
        raise UsageError("a bound needs at least one image, not none")
    used = np.concatenate([edges.ravel(), *members])
    wrong = used[(used < 0) | (used >= count)]
    if len(wrong):
        raise UsageError(f"image index {wrong[0]} is out of range for {count} images: legal are 0 to {count - 1}")
    same = edges[classes[edges[:, 0]] == classes[edges[:, 1]]]
    if len(same):
        first, second = same[0]
        raise UsageError(
            f"images {first} and {second} are both of class {classes[first]}: a pair needs two classes, "
            "since one head may classify both of these correctly"
        )


def _maximum_matching(classes: Indices, edges: Indices, members: Sequence[Indices]) -> int:
    """Return the size of a maximum matching; between two classes a hub equals all of its pairs."""
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


class _IntegerProgram(NamedTuple):
    """Maximise gain^T v subject to A v <= b, v in [0, 1]: v holds x of `images` constrained images, then the y's."""

    matrix: Any
    right: NDArray[np.float64]
    gain: NDArray[np.float64]
    images: int


def _integer_bound(classes: Indices, edges: Indices, members: Sequence[Indices], seconds: float) -> PackingBound:
    program = _integer_program(classes, edges, members)
    free = len(classes) - program.images
    relaxed = _relaxation_bound(program, seconds)
    upper, attained, optimal = _branch_and_bound(program, seconds)
    kept = min(floor(relaxed + _SOLVER_TOLERANCE), upper)
    kind: BoundKind = "milp" if optimal else "milp, stopped"
    return PackingBound(free + kept, free + max(relaxed, float(kept)), len(classes), kind, exact=attained == kept)


def _integer_program(classes: Indices, edges: Indices, members: Sequence[Indices]) -> _IntegerProgram:
    constrained = np.unique(np.concatenate([edges.ravel(), *members]))
    pairs = np.searchsorted(constrained, edges)
    entries = [(np.repeat(np.arange(len(edges)), 2), pairs.ravel(), np.ones(2 * len(edges)))]
    height, width, right = len(edges), len(constrained), [np.ones(len(edges))]
    for hub in members:
        _, class_index = np.unique(classes[hub], return_inverse=True)
        labels = width + np.arange(class_index.max() + 1)
        entries.append((np.full(len(labels), height), labels, np.ones(len(labels))))
        below = height + 1 + np.arange(len(hub))
        entries.append((below, np.searchsorted(constrained, hub), np.ones(len(hub))))
        entries.append((below, labels[class_index], -np.ones(len(hub))))
        right.append(np.concatenate([[1.0], np.zeros(len(hub))]))
        height, width = height + 1 + len(hub), width + len(labels)
    row, column, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    matrix = csr_array(coo_array((value, (row, column)), shape=(height, width)))
    gain = (np.arange(width) < len(constrained)).astype(float)
    return _IntegerProgram(matrix, np.concatenate(right), gain, len(constrained))


def _relaxation_bound(program: _IntegerProgram, seconds: float) -> float:
    """Return an upper bound on the linear relaxation by weak duality, valid for any multipliers of the solver."""
    solved = linprog(
        -program.gain,
        A_ub=program.matrix,
        b_ub=program.right,
        bounds=(0, 1),
        method="highs",
        options={"time_limit": seconds},
    )
    if solved.status != 0:
        return float(program.images)
    multipliers = np.maximum(-solved.ineqlin.marginals, 0)
    reduced_gain = np.maximum(program.gain - program.matrix.T @ multipliers, 0)
    value = multipliers @ program.right + reduced_gain.sum()
    return min(float(program.images), float(value) * (1 + 1e-12))


def _branch_and_bound(program: _IntegerProgram, seconds: float) -> tuple[int, int, bool]:
    """Return an upper bound on the images kept, how many the best solution found keeps, and whether it is optimal."""
    solved = milp(
        -program.gain,
        constraints=LinearConstraint(program.matrix, -np.inf, program.right),
        integrality=np.ones(len(program.gain)),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    attained = -1 if solved.x is None else _attained(program, np.round(solved.x))
    dual = solved.mip_dual_bound
    # a search stopped early may have no dual bound
    upper = floor(-dual + _SOLVER_TOLERANCE) if dual is not None and np.isfinite(dual) else program.images
    return min(upper, program.images), attained, solved.status == 0


def _attained(program: _IntegerProgram, solution: NDArray[np.float64]) -> int:
    feasible = bool((program.matrix @ solution <= program.right).all())
    return int(program.gain @ solution) if feasible else -1
