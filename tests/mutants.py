"""Ten networks that only seem robust: honest ones with a defect that misleads attacks, and the checks that catch it.

Loaded from its file, as `tests/audit/test_checks.py` does: test folders are no packages.
"""

from collections.abc import Callable
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

EPS = 0.2
"""The l-inf radius that a mutant defends at, unless told otherwise: that of the bundled robust networks."""


class _Mutant(nn.Module):
    """An honest network with a defect: in `before` what enters it, in `after` what leaves it."""

    def __init__(self, network: nn.Module, eps: float = EPS) -> None:
        super().__init__()
        self.network = network
        self.eps = eps

    def before(self, images: Tensor) -> Tensor:
        return images

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, images: Tensor) -> Tensor:
        return self.after(self.network(self.before(images)))


class InputRounding(_Mutant):
    """Pixels rounded to multiples of eps / 4: the gradient of rounding is zero everywhere."""

    def before(self, images: Tensor) -> Tensor:
        grain = self.eps / 4
        return (images / grain).round() * grain


class ZeroGradient(_Mutant):
    """The honest logits with a gradient of exactly zero."""

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).detach() + 0 * images.flatten(1).sum(1, keepdim=True)


class _NoiseBackwards(torch.autograd.Function):
    """The identity, whose gradient is noise of the true gradient's size."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.randn_like(gradient) * gradient.std()


class RandomGradient(_Mutant):
    """The honest logits with noise for a gradient."""

    def before(self, images: Tensor) -> Tensor:
        noisy: Tensor = _NoiseBackwards.apply(images)
        return noisy


class LogitsTimes1000(_Mutant):
    """Logits so large that the cross-entropy is exactly zero, and its gradient too."""

    def after(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class SoftmaxOutput(_Mutant):
    """Probabilities where logits are expected: a softmax is taken twice."""

    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class SharpSoftmax(_Mutant):
    """Probabilities at a temperature so low that they are zero and one exactly."""

    def after(self, logits: Tensor) -> Tensor:
        return (1000 * logits).softmax(1)


class NoisyLogits(_Mutant):
    """Fresh noise on the logits of every forward pass, half as large as their spread."""

    def after(self, logits: Tensor) -> Tensor:
        return logits + 0.5 * logits.detach().std(1, keepdim=True) * torch.randn_like(logits)


class NoisyInput(_Mutant):
    """Fresh noise on the pixels of every forward pass, of standard deviation eps / 2."""

    def before(self, images: Tensor) -> Tensor:
        return images + self.eps / 2 * torch.randn_like(images)


class Sine(_Mutant):
    """A fast sine on the pixels: the gradient is right, and tells nothing a small step away.

    The wave is eps / 3.2 long (1/16 at eps 0.2) and eps / 4 high: its slope is 5 where the image's own is 1. Pixels
    at multiples of 1/16 do not move by it at eps 0.2.
    """

    def before(self, images: Tensor) -> Tensor:
        return images + self.eps / 4 * (2 * pi * 3.2 / self.eps * images).sin()


class NoGrad(_Mutant):
    """The honest logits, cut off from autograd."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(images)


MUTANTS: dict[str, Callable[..., nn.Module]] = {
    "input rounding": InputRounding,
    "zero gradient": ZeroGradient,
    "random gradient": RandomGradient,
    "logits x 1000": LogitsTimes1000,
    "softmax output": SoftmaxOutput,
    "sharp softmax": SharpSoftmax,
    "noisy logits": NoisyLogits,
    "noisy input": NoisyInput,
    "sine": Sine,
    "no_grad": NoGrad,
}
"""From a mutant's name to what makes one of an honest network, and of an eps."""

CAUGHT_BY: dict[str, set[int]] = {
    "input rounding": {2, 3, 4, 5},
    "zero gradient": {2, 3, 4, 5},
    "random gradient": {3, 4, 5},
    "logits x 1000": {2},
    "softmax output": {7},
    "sharp softmax": {2, 3, 4, 5},
    "noisy logits": {3, 8},
    "noisy input": {3, 8},
    "sine": {4, 5},
    "no_grad": {1},
}
"""The checks that must catch each mutant; others may too."""
