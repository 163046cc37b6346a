"""What features tell of something else, by a kernel between the features themselves; differentiable in them.

Opponents that are fitted between rounds of a search are late: images pass what these have learnt and tell the same on
its other side. A kernel estimate is renewed in every step at the cost of distances between features.

Source: Terrell & Scott 1992, "Variable Kernel Density Estimation"; Fukunaga & Hostetler 1975, gradients of densities.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from audit.information.probing.neighbours import RIDGE, principal_directions, standard_units
from audit.types import Features

_MOST_KNOWN = 2000  # features that are compared with: all pairs of more would cost more than the passes
_REFRESH = 5  # steps between two choices of principal directions, which change slowly


@dataclass
class KernelDependence:
    """Dependence of features (N, D) on what `weights` describe, renewed from the features of the last pass.

    Distances are measured in whitened principal components, at most `components`. The kernel is
    exp(-`sharpness` d^2 / mean d^2): a narrow one leaves images in islands. `features` holds the last known ones.
    """

    features: Features
    sharpness: float
    components: int = 64
    known: Tensor = field(init=False)
    _steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        count = len(self.features)
        self.known = torch.arange(0, count, -(-count // _MOST_KNOWN), device=self.features.device)

    def renew(self) -> None:
        """Compare with the features as they are now; called before each step."""
        if self._steps % _REFRESH == 0:
            self._mean, self._deviation = standard_units(self.features)
            values = (self.features - self._mean) / self._deviation
            directions, sizes = principal_directions(values, self.components)
            self._rotation = directions / (sizes + RIDGE)
        self._points, self._steps = self._rotated(self.features[self.known]), self._steps + 1

    def told(self, features: Features, index: Tensor, weights: Tensor) -> Tensor:
        """Return ln p(w | z) - ln p(w) (M,) of features (M, D) with these indices, from all other known ones.

        `weights` (M, K) say how alike each image and the K known ones are in what is told; rows have the mean 1.
        """
        self.features[index] = features.detach()
        points = self._rotated(features)
        squares = points.square().sum(1, keepdim=True) + self._points.square().sum(1) - 2 * points @ self._points.T
        spread = squares.detach().mean(1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
        kernel = (-self.sharpness * squares / spread).exp().masked_fill(index[:, None] == self.known, 0)
        return (kernel * weights).sum(1).clamp_min(1e-12).log() - kernel.sum(1).clamp_min(1e-12).log()

    def _rotated(self, features: Features) -> Features:
        return ((features - self._mean) / self._deviation) @ self._rotation
