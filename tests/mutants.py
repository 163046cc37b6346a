"""Ten networks with masked gradients: correct networks with one defect each, and the checks that detect it.

Loaded from its file, as in `tests/audit/adversary/test_attack_checks.py`: test folders are no packages.
"""

from collections.abc import Callable
from math import pi
from typing import Any

import torch
from torch import Tensor, nn

EPS = 0.2
"""Default l-inf radius of the mutants: that of the bundled robust networks."""


class _Mutant(nn.Module):
    """A network with a defect: `before` changes its inputs, `after` its outputs."""

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
    """Unchanged logits with a gradient of exactly zero."""

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
    """Unchanged logits with a random gradient."""

    def before(self, images: Tensor) -> Tensor:
        noisy: Tensor = _NoiseBackwards.apply(images)
        return noisy


class LogitsTimes1000(_Mutant):
    """Logits so large that the cross-entropy and its gradient are exactly zero."""

    def after(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class SoftmaxOutput(_Mutant):
    """Probabilities instead of logits, so that softmax is applied twice."""

    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)


class SharpSoftmax(_Mutant):
    """Probabilities at a temperature so low that they are exactly zero and one."""

    def after(self, logits: Tensor) -> Tensor:
        return (1000 * logits).softmax(1)


class NoisyLogits(_Mutant):
    """Random noise on the logits in every forward pass, of half their standard deviation."""

    def after(self, logits: Tensor) -> Tensor:
        return logits + 0.5 * logits.detach().std(1, keepdim=True) * torch.randn_like(logits)


class NoisyInput(_Mutant):
    """Random noise on the pixels in every forward pass, of standard deviation eps / 2."""

    def before(self, images: Tensor) -> Tensor:
        return images + self.eps / 2 * torch.randn_like(images)


class Sine(_Mutant):
    """A sine of high frequency on the pixels: the gradient is exact, but does not predict the loss a small step away.

    The sine has wavelength eps / 3.2 (1/16 at eps 0.2) and amplitude eps / 4, so that its slope is 5 times that of the
    image. At eps 0.2, it is zero at pixels that are multiples of 1/16.
    """

    def before(self, images: Tensor) -> Tensor:
        return images + self.eps / 4 * (2 * pi * 3.2 / self.eps * images).sin()


class NoGrad(_Mutant):
    """Unchanged logits without a graph."""

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
"""Constructors by name, of a network and optionally an eps."""

_MASKED = {
    "zero_margin_gradient",
    "zero_cross_entropy_gradient",
    "gradient_slope",
    "local_linearity",
    "unbounded_attack",
}

CAUGHT_BY: dict[str, set[str]] = {
    "input rounding": _MASKED,
    "zero gradient": _MASKED,
    "random gradient": {"gradient_slope", "local_linearity", "unbounded_attack"},
    "logits x 1000": {"zero_cross_entropy_gradient"},
    "softmax output": {"logit_outputs"},
    "sharp softmax": _MASKED,
    "noisy logits": {"gradient_slope", "determinism"},
    "noisy input": {"gradient_slope", "determinism"},
    "sine": {"local_linearity", "unbounded_attack"},
    "no_grad": {"gradient"},
}
"""Identifiers of the checks that must fail for each mutant; others may fail, too."""
