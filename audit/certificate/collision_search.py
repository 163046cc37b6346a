"""Search for collisions: move groups of images, each inside its own ball, until their features coincide.

A group is one image with a given target vector, or two images that move towards each other. Signed gradient steps in
float32 reduce the distance of the features; Gauss-Newton steps, with residuals in float64, close what is left.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.memory.counting import PassCount
from audit.adversary.memory.limit import allowed
from audit.adversary.passes import input_gradient
from audit.adversary.threat import ThreatModel
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.gauss_newton import LinearisedGroups, step_in_ball
from audit.types import FeatureMap, Features, Images

_EPS_MARGIN = 1 - 1e-9  # the search ball is slightly smaller, so that rounding leaves no image outside the ball
# distances relative to the scale of the features
_FLOAT64_BELOW = 1e-6  # residuals below are measured in float64
_CONVERGED = 1e-12  # Gauss-Newton steps stop
_REPORTED = 1e-9  # counted as collided in progress reports

SearchProgress = Callable[[str, int], None]
"""Called with the stage of a search and the number of images that have collided so far."""


@dataclass(frozen=True)
class SearchEffort:
    """Budget of a search. It affects only how tight a certificate is, never whether it is valid.

    `sign_steps` and `pair_steps` are signed gradient steps towards a hub and within a pair; `newton_steps` the maximum
    number of Jacobians of a group; `relative_step` the first signed step in units of eps; `hubs` the maximum number of
    hubs; `neighbours` the number of partners tried for each remaining image; `memory_mib` the memory for the Jacobians
    of one batch. A finite `pair_passes` limits the forward+backward passes per image that are spent on pairs, which are
    then tried in rounds, until one finds nothing. If none of `probe` images reaches a hub, no other tries it. A group
    is given up after `patience` consecutive Jacobians with an improvement below 10 %.
    """

    sign_steps: int = 4
    pair_steps: int = 4
    newton_steps: int = 20
    relative_step: float = 0.2
    hubs: int = 2
    neighbours: int = 8
    pair_passes: float = inf
    probe: int = 0
    patience: int = 3
    memory_mib: int = 256


class HubTarget(NamedTuple):
    """A feature vector (D,) at which many images may collide, and the metric (D, D) of the signed steps towards it."""

    target: Features
    metric: Tensor


class GroupDistances(NamedTuple):
    """Indices of groups of images (G, M), and their final feature distances (G,): to a hub (M = 1) or in a pair."""

    groups: Tensor
    distance: Tensor


@dataclass
class SearchLog(PassCount):
    """Cost and results of a search so far.

    `collided` (N,) marks images of a collision; `passes` counts forward+backward passes of single images, a forward or
    a backward alone as one half; `attempts` has one entry for each call of `CollisionSearch.collide`.
    """

    collided: Tensor
    attempts: list[GroupDistances] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class CollisionSearch:
    """Clean images (N, C, H, W), their threat model, and the layer at which they are to collide.

    `reference_scale` replaces the measured scale of the features.
    """

    layer: DualPrecisionLayer
    clean: Images
    threat: ThreatModel
    effort: SearchEffort = field(default_factory=SearchEffort)
    batch_size: int = 128
    reference_scale: float | None = None
    on_progress: SearchProgress = lambda _stage, _collided: None

    @cached_property
    def log(self) -> SearchLog:
        """Cost and results so far."""
        return SearchLog(torch.zeros(len(self.clean), dtype=torch.bool, device=self.clean.device))

    @cached_property
    def encoded(self) -> Features:
        """The features (N, D) of the clean images in working precision."""
        return self.features(self.clean, self.layer.working)

    @cached_property
    def scale(self) -> float:
        """The root mean square norm of the clean features, or the reference scale."""
        return self.reference_scale or float(self.encoded.double().square().sum(1).mean().sqrt())

    @cached_property
    def low(self) -> Images:
        """The least legal pixels (N, C, H, W), float64."""
        return (self.clean.double() - self.threat.eps * _EPS_MARGIN).clamp_min(self.threat.pixel_range[0])

    @cached_property
    def high(self) -> Images:
        """The largest legal pixels (N, C, H, W), float64."""
        return (self.clean.double() + self.threat.eps * _EPS_MARGIN).clamp_max(self.threat.pixel_range[1])

    @cached_property
    def ball(self) -> ThreatModel:
        """The threat model with a slightly smaller radius."""
        return replace(self.threat, eps=self.threat.eps * _EPS_MARGIN)

    @property
    def _in_a_batch(self) -> int:
        return min(self.batch_size, allowed(self.batch_size))

    @torch.no_grad()
    def features(self, images: Images, feature_map: FeatureMap) -> Features:
        """Return the features (N, D) of images (N, C, H, W), batch by batch."""
        self.log.spend(len(images) / 2)
        return torch.cat([feature_map(batch) for batch in images.split(self._in_a_batch)])

    def collide(self, groups: Tensor, hub: HubTarget, steps: int) -> tuple[Tensor, Tensor]:
        """Move groups of images (G, M) together; return the images (G, M, C, H, W) float64 and their distances (G,).

        With M = 1 every image moves to the hub's target. With M = 2 the two images move towards each other, and the
        target only sets the scale of the features.
        """
        moved, distance = [], []
        refinement = _GaussNewtonRefinement(self, hub.target)
        for batch in groups.split(max(1, self._in_a_batch // groups.shape[1])):
            start = self.approach(batch, hub, steps)
            for rows in torch.arange(len(batch), device=batch.device).split(self._groups_in_memory(hub, batch)):
                images, remaining = refinement.run(batch[rows], start[rows])
                moved.append(images)
                distance.append(remaining)
                self._report(batch[rows], remaining)
        self.log.attempts.append(GroupDistances(groups, torch.cat(distance)))
        return torch.cat(moved), torch.cat(distance)

    def approach(self, groups: Tensor, hub: HubTarget, steps: int) -> Tensor:
        """Take signed gradient steps in float32 on the squared distance, in the hub's metric."""
        low, high = self.low[groups], self.high[groups]
        moved, dtype = self.clean[groups].double(), self.clean.dtype
        target, metric = hub.target.to(dtype), hub.metric.to(dtype)
        for done in range(steps):
            leaf = moved.to(dtype).flatten(0, 1).requires_grad_()
            features = self.layer.working(leaf)
            residual = _residual(features.detach(), target, groups.shape) @ metric
            direction = torch.stack([residual, -residual], 1)[:, : groups.shape[1]].flatten(0, 1)
            gradient = input_gradient(features, leaf, direction)
            size = self.threat.eps * self.effort.relative_step * (1 - 0.9 * done / steps)
            if self.threat.norm == "linf":
                moved = (moved - size * gradient.sign().view_as(moved)).clamp(low, high)
            else:
                clean, downhill = self.clean[groups].double().flatten(0, 1), gradient.double()
                moved = self.ball.step(moved.flatten(0, 1), downhill, clean, size).view_as(moved)
            self.log.spend(len(leaf))
        return moved

    def _groups_in_memory(self, hub: HubTarget, groups: Tensor) -> int:
        """Return how many groups' Jacobians fit into memory, counting three float32 copies."""
        entries = len(hub.target) * groups.shape[1] * self.clean[0].numel()
        return max(1, self.effort.memory_mib * 2**20 // (12 * entries))

    def _report(self, groups: Tensor, distance: Tensor) -> None:
        self.log.collided[groups[distance <= _REPORTED * self.scale].flatten()] = True
        self.on_progress("hubs" if groups.shape[1] == 1 else "pairs", int(self.log.collided.sum()))


@dataclass(frozen=True, eq=False)
class _GaussNewtonRefinement:
    """Gauss-Newton steps that bring groups of one search to a target (D,), or the images of pairs together."""

    search: CollisionSearch
    target: Features

    def run(self, groups: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (G, M, C, H, W) and distances (G,); groups that converged or stalled are not moved further."""
        moved, low, high = start.clone(), self.search.low[groups], self.search.high[groups]
        residual = self._residual(moved)
        active = (residual.norm(dim=1) > self._converged).nonzero().flatten()
        damping = torch.full((len(groups),), 1e-6).to(moved)
        patience, stalled = self.search.effort.patience, torch.zeros(len(groups), dtype=torch.int64).to(moved.device)
        for _ in range(self.search.effort.newton_steps):
            if len(active) == 0:
                break
            linear = LinearisedGroups.of(self._jacobian(moved[active]), low[active], high[active], damping[active])
            before = linear.pixel_distance(residual[active])
            moved[active], residual[active] = self._chord_steps(linear, moved[active], residual[active], groups[active])
            ratio = linear.pixel_distance(residual[active]) / before
            damping[active] = torch.where(ratio < 0.95, damping[active] / 10, damping[active] * 10).clamp(1e-8, 1e-2)
            stalled[active] = torch.where(ratio > 0.9, stalled[active] + 1, 0)
            active = active[(residual[active].norm(dim=1) > self._converged) & (stalled[active] < patience)]
        return moved, residual.norm(dim=1)

    @property
    def _converged(self) -> float:
        return _CONVERGED * self.search.scale

    def _chord_steps(
        self, linear: LinearisedGroups, moved: Tensor, residual: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take up to four steps with one Jacobian, as long as each halves the residual."""
        moved, residual = moved.clone(), residual.clone()
        active = torch.arange(len(moved), device=moved.device)
        for _ in range(4):
            part, before = linear.select(active), linear.pixel_distance(residual, active)
            step = self._step(part, moved[active], residual[active], groups[active])
            moved[active], residual[active] = self._line_search(step, moved[active], residual[active], part)
            halved = linear.pixel_distance(residual, active) < 0.5 * before
            active = active[halved & (residual[active].norm(dim=1) > self._converged)]
            if len(active) == 0:
                break
        return moved, residual

    def _step(self, linear: LinearisedGroups, moved: Tensor, residual: Tensor, groups: Tensor) -> Tensor:
        """Return the steps of groups of images (G, M, C, H, W) that stay inside the balls of these images."""
        if self.search.threat.norm == "linf":
            return linear.step(moved, residual)
        return step_in_ball(linear, moved, residual, self.search.clean[groups].double(), self.search.ball)

    def _line_search(
        self, step: Tensor, moved: Tensor, residual: Tensor, linear: LinearisedGroups
    ) -> tuple[Tensor, Tensor]:
        """Take the longest of 1, 1/2, 1/4, 1/8 of a step with sufficient decrease; without one, do not move."""
        active = torch.arange(len(moved), device=moved.device)
        moved, residual, before = moved.clone(), residual.clone(), linear.pixel_distance(residual)
        for length in (1.0, 0.5, 0.25, 0.125):
            part = linear.select(active)
            trial = (moved[active] + length * step[active]).clamp(part.low, part.high)
            remaining = self._residual(trial, part)
            better = part.pixel_distance(remaining) < (1 - 0.1 * length) * before[active]
            moved[active[better]], residual[active[better]] = trial[better], remaining[better]
            active = active[~better]
            if len(active) == 0:
                break
        return moved, residual

    def _residual(self, moved: Tensor, linear: LinearisedGroups | None = None) -> Tensor:
        """Return the residuals (G, D) of groups, in float64 where float32 is too coarse to measure them."""
        scale = self.search.scale
        residual = self._evaluate(moved, precise=False)
        small = residual.norm(dim=1) <= _FLOAT64_BELOW * scale
        if linear is not None:
            small |= linear.pixel_distance(residual) <= _FLOAT64_BELOW * scale * linear.stiffness()
        residual[small] = self._evaluate(moved[small], precise=True)
        return residual

    def _evaluate(self, moved: Tensor, *, precise: bool) -> Tensor:
        if len(moved) == 0:
            return self.target.new_empty(0, len(self.target), dtype=torch.float64)
        layer, images = self.search.layer, moved.flatten(0, 1)
        if precise:
            features = self.search.features(images, layer.precise)
        else:
            features = self.search.features(images.to(self.search.clean.dtype), layer.working)
        return _residual(features.double(), self.target.double(), moved.shape[:2])

    def _jacobian(self, moved: Tensor) -> Tensor:
        """Return d residual / d pixels (G, D, M * P) in working precision."""
        shape = moved.shape[:2]
        leaf = moved.to(self.search.clean.dtype).flatten(0, 1).requires_grad_()
        features = self.search.layer.working(leaf)
        dimension = features.shape[1]
        rows = [
            input_gradient(features, leaf, _unit(features, k), keep=k + 1 < dimension).unflatten(0, shape)
            for k in range(dimension)
        ]
        self.search.log.spend(len(leaf) * (1 + dimension) / 2)
        jacobian = torch.stack(rows, 1)
        if shape[1] == 2:
            jacobian[:, :, 1] *= -1
        return jacobian.flatten(2)


def _residual(features: Features, target: Features, groups: tuple[int, ...]) -> Tensor:
    """Return the residuals (G, D) of groups of the shape (G, M), from the features (G * M, D) of their images."""
    grouped = features.unflatten(0, groups)
    return grouped[:, 0] - (target if groups[1] == 1 else grouped[:, 1])


def _unit(features: Features, column: int) -> Tensor:
    return torch.zeros_like(features).index_fill(1, torch.tensor(column, device=features.device), 1.0)
