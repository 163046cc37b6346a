"""Moving groups of images, each inside its own ball, until their features are the same vector to the last digits.

A group is one image that goes to a given vector, or two images that go to each other. Signed gradient steps bring the
features near, in float32; Gauss-Newton steps close the gap that a float64 copy of the network measures.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.gradients import input_gradient
from audit.adversary.threat import ThreatModel
from audit.certificate.gauss_newton import Linearised
from audit.types import Features, Images

FeatureMap = Callable[[Tensor], Tensor]
"""Maps images (N, C, H, W) to features (N, D) in the images' own precision."""

_INSIDE = 1 - 1e-9  # the ball is searched a hair inside, so that rounding leaves nobody outside
_PATIENCE = 3  # Jacobians in a row that gain a group less than a tenth
_NEAR = 1e-6  # of the features' length: where float32 is about to become too coarse
_CLOSE = 1e-12  # of the features' length: where Gauss-Newton has nothing left to gain
_MET = 1e-9  # of the features' length: what is shown as converged while the search goes

Watch = Callable[[str, int], None]
"""Hears what a search is at, and how many images have met something so far."""


class Layer(NamedTuple):
    """One layer as it is used, in float32, and a float64 copy of the same network for the last digits."""

    working: FeatureMap
    precise: FeatureMap

    @classmethod
    def of(cls, representation: nn.Module) -> "Layer":
        """Return the layer of a representation, with its float64 copy."""
        return cls(representation, copy.deepcopy(representation).double())


@dataclass(frozen=True)
class SearchEffort:
    """How hard to look. More never makes a certificate wrong, less never does either.

    `sign_steps` and `pair_steps` are signed gradient steps towards a hub and within a pair, `newton_steps` the most
    Jacobians an image may cost, `hubs` how many hubs are tried, `neighbours` how many partners each image left over
    tries, `memory_mib` what the Jacobians of one batch may take.
    """

    sign_steps: int = 4
    pair_steps: int = 4
    newton_steps: int = 20
    relative_step: float = 0.2
    hubs: int = 2
    neighbours: int = 8
    memory_mib: int = 256


class Hub(NamedTuple):
    """A feature vector (D,) to bring images to, and the metric (D, D) in which signed steps go there."""

    target: Features
    metric: Tensor


class Attempt(NamedTuple):
    """Groups of images (G, M), by index, and how far apart (G,) they stayed: from one hub (M = 1) or each other."""

    groups: Tensor
    apart: Tensor


@dataclass
class Search:
    """Clean images (N, C, H, W), what may be done to them, and the layer they are to meet at.

    `scale` is the features' typical length, measured where it is not given. `passes` counts forward+backward passes
    of single images, a forward or a backward alone as a half. `attempts` are what was tried, one entry a hub.
    """

    layer: Layer
    clean: Images
    threat: ThreatModel
    effort: SearchEffort = field(default_factory=SearchEffort)
    batch_size: int = 128
    scale: float = 0.0
    watch: Watch = field(default=lambda _stage, _converged: None)
    passes: float = field(default=0.0, init=False)
    attempts: list[Attempt] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._met = torch.zeros(len(self.clean), dtype=torch.bool, device=self.clean.device)
        self.encoded = self.features(self.clean, self.layer.working)
        self.scale = self.scale or float(self.encoded.double().square().sum(1).mean().sqrt())
        start, eps = self.clean.double(), self.threat.eps * _INSIDE
        self.low = (start - eps).clamp_min(self.threat.pixel_range[0])
        self.high = (start + eps).clamp_max(self.threat.pixel_range[1])

    @torch.no_grad()
    def features(self, images: Images, of: FeatureMap) -> Features:
        """Return the features (N, D) of images (N, C, H, W), batch by batch."""
        self.passes += len(images) / 2
        return torch.cat([of(batch) for batch in images.split(self.batch_size)])

    def meet(self, groups: Tensor, hub: Hub, steps: int) -> tuple[Tensor, Tensor]:
        """Return where groups of images (G, M) got to, (G, M, C, H, W) float64, and how far apart (G,) they stayed.

        M = 1: every image goes to the hub's target. M = 2: the two go to each other, and the target is not used.
        """
        moved, apart = [], []
        for batch in groups.split(max(1, self.batch_size // groups.shape[1])):
            near = self.approach(batch, hub, steps)
            for rows in torch.arange(len(batch), device=batch.device).split(self._room(hub, batch)):
                images, left = self._finish(batch[rows], hub.target, near[rows])
                moved.append(images)
                apart.append(left)
                self._tell(batch[rows], left)
        self.attempts.append(Attempt(groups, torch.cat(apart)))
        return torch.cat(moved), torch.cat(apart)

    def _tell(self, groups: Tensor, apart: Tensor) -> None:
        self._met[groups[apart <= _MET * self.scale].flatten()] = True
        self.watch("hubs" if groups.shape[1] == 1 else "pairs", int(self._met.sum()))

    def _room(self, hub: Hub, groups: Tensor) -> int:
        """Return how many groups' Jacobians fit the memory: at most three in float32 at a time."""
        entries = len(hub.target) * groups.shape[1] * self.clean[0].numel()
        return max(1, self.effort.memory_mib * 2**20 // (12 * entries))

    def approach(self, groups: Tensor, hub: Hub, steps: int) -> Tensor:
        """Take signed steps in float32 down the squared distance, in the hub's metric."""
        low, high = self.low[groups], self.high[groups]
        moved, kind = self.clean[groups].double(), self.clean.dtype
        target, metric = hub.target.to(kind), hub.metric.to(kind)
        for done in range(steps):
            leaf = moved.to(kind).flatten(0, 1).requires_grad_()
            features = self.layer.working(leaf)
            residual = _residual(features.detach(), target, groups.shape) @ metric
            direction = torch.stack([residual, -residual], 1)[:, : groups.shape[1]].flatten(0, 1)
            gradient = input_gradient(features, leaf, direction)
            size = self.threat.eps * self.effort.relative_step * (1 - 0.9 * done / steps)
            moved = (moved - size * gradient.sign().view_as(moved)).clamp(low, high)
            self.passes += len(leaf)
        return moved

    def _finish(self, groups: Tensor, target: Features, near: Tensor) -> tuple[Tensor, Tensor]:
        """Take Gauss-Newton steps; groups that met or that gain too little are left alone."""
        moved, low, high = near.clone(), self.low[groups], self.high[groups]
        apart = self._apart(moved, target)
        close = _CLOSE * self.scale
        going = (apart.norm(dim=1) > close).nonzero().flatten()
        damping = torch.full((len(groups),), 1e-6).to(moved)
        slow = torch.zeros(len(groups), dtype=torch.int64, device=moved.device)
        for _ in range(self.effort.newton_steps):
            if len(going) == 0:
                break
            held = Linearised.of(self._jacobian(moved[going]), low[going], high[going], damping[going])
            start = held.effort(apart[going])
            moved[going], apart[going] = self._chords(held, moved[going], apart[going], target, close)
            gained = held.effort(apart[going]) / start
            damping[going] = torch.where(gained < 0.95, damping[going] / 10, damping[going] * 10).clamp(1e-8, 1e-2)
            slow[going] = torch.where(gained > 0.9, slow[going] + 1, 0)
            going = going[(apart[going].norm(dim=1) > close) & (slow[going] < _PATIENCE)]
        return moved, apart.norm(dim=1)

    def _chords(
        self, held: Linearised, moved: Tensor, apart: Tensor, target: Features, close: float
    ) -> tuple[Tensor, Tensor]:
        """Use one Jacobian as long as it serves: the network is nearly linear close to a meeting."""
        moved, apart = moved.clone(), apart.clone()
        open_ = torch.arange(len(moved), device=moved.device)
        for _ in range(4):
            part, before = held.of_groups(open_), held.effort(apart, open_)
            step = part.step(moved[open_], apart[open_])
            moved[open_], apart[open_] = self._searched(step, moved[open_], apart[open_], target, part)
            halved = held.effort(apart, open_) < 0.5 * before
            open_ = open_[halved & (apart[open_].norm(dim=1) > close)]
            if len(open_) == 0:
                break
        return moved, apart

    def _searched(
        self, step: Tensor, moved: Tensor, apart: Tensor, target: Features, held: Linearised
    ) -> tuple[Tensor, Tensor]:
        """Go 1, 1/2, 1/4 or 1/8 of a step, the first that brings a group nearer; else stay."""
        open_ = torch.arange(len(moved), device=moved.device)
        moved, apart, before = moved.clone(), apart.clone(), held.effort(apart)
        for length in (1.0, 0.5, 0.25, 0.125):
            part = held.of_groups(open_)
            tried = (moved[open_] + length * step[open_]).clamp(part.low, part.high)
            left = self._apart(tried, target, part)
            better = part.effort(left) < (1 - 0.1 * length) * before[open_]
            moved[open_[better]], apart[open_[better]] = tried[better], left[better]
            open_ = open_[~better]
            if len(open_) == 0:
                break
        return moved, apart

    def _apart(self, moved: Tensor, target: Features, held: Linearised | None = None) -> Tensor:
        """Return how far groups are from meeting, (G, D); in float64 where float32 could hide the rest of the way."""
        apart = self._gap(moved, target, precise=False)
        near = apart.norm(dim=1) <= _NEAR * self.scale
        if held is not None:
            near |= held.effort(apart) <= _NEAR * self.scale * held.stiffness()
        apart[near] = self._gap(moved[near], target, precise=True)
        return apart

    def _gap(self, moved: Tensor, target: Features, *, precise: bool) -> Tensor:
        if len(moved) == 0:
            return target.new_empty(0, len(target), dtype=torch.float64)
        of, kind = (self.layer.precise, torch.float64) if precise else (self.layer.working, self.clean.dtype)
        features = self.features(moved.flatten(0, 1).to(kind), of)
        return _residual(features.double(), target.double(), moved.shape[:2])

    def _jacobian(self, moved: Tensor) -> Tensor:
        """Return d residual / d pixels (G, D, M * P), in the float32 network's precision."""
        shape = moved.shape[:2]
        leaf = moved.to(self.clean.dtype).flatten(0, 1).requires_grad_()
        features = self.layer.working(leaf)
        width = features.shape[1]
        rows = [
            input_gradient(features, leaf, _unit(features, k), keep=k + 1 < width).unflatten(0, shape)
            for k in range(width)
        ]
        self.passes += len(leaf) * (1 + width) / 2
        jacobian = torch.stack(rows, 1)
        if shape[1] == 2:
            jacobian[:, :, 1] *= -1
        return jacobian.flatten(2)


def _residual(features: Features, target: Features, groups: tuple[int, ...]) -> Tensor:
    """Return how far groups (G, M) are from meeting, (G, D), from the features (G * M, D) of their images."""
    grouped = features.unflatten(0, groups)
    return grouped[:, 0] - (target if groups[1] == 1 else grouped[:, 1])


def _unit(features: Features, column: int) -> Tensor:
    return torch.zeros_like(features).index_fill(1, torch.tensor(column, device=features.device), 1.0)
