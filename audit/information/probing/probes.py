"""Probes: small heads fitted on frozen features, linear or with one hidden layer."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.information.probing.neighbours import standard_units
from audit.information.probing.settings import ProbeTraining
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Labels

_RATE, _DECAY, _BETAS, _EPSILON = 1e-2, 0.1, (0.9, 0.999), 1e-8  # of AdamW


class Probe(nn.Module):
    """A linear head (`hidden` 0) or one with a hidden layer, on features standardised by the training samples."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Features, classes: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        mean, deviation = standard_units(features)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        widths = [features.shape[1], *([hidden] if hidden else []), classes]
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = (1 / layer.in_features) ** 0.5 if hidden else 0.0
            with torch.no_grad():
                layer.weight.copy_(bound * (2 * torch.rand(layer.weight.shape, generator=generator) - 1))
                layer.bias.zero_()
        self.to(features)

    def forward(self, features: Features) -> Tensor:
        """Return logits (N, K) of features (N, D)."""
        return self.head(self.standardised(features))

    def standardised(self, features: Features) -> Features:
        """Return features (N, D) in units of the training samples."""
        return (features - self.mean) / self.deviation

    def head(self, values: Features) -> Tensor:
        """Return logits (N, K) of standardised features (N, D)."""
        *hidden, last = self.layers
        for layer in hidden:
            values = layer(values).relu()
        logits: Tensor = last(values)
        return logits


def fit_linear(
    features: Features, labels: Labels, classes: int, training: ProbeTraining, *, standardise: bool = True
) -> Probe:
    """Return the logistic regression that minimises log loss + `penalty` / 2N * |weights|^2, fitted by L-BFGS.

    Without `standardise`, the penalty applies to weights of the features in their own units.
    """
    probe = Probe(features, classes, 0, keyed_generator(0, Purpose.PROBE_WEIGHTS))
    if not standardise:
        probe.deviation.fill_(1.0)
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=training.steps, line_search_fn="strong_wolfe")
    values, weight = probe.standardised(features), training.penalty / (2 * len(features))

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(probe.head(values), labels)
        value = value + weight * sum(p.square().sum() for p in probe.parameters() if p.dim() == 2)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return probe.requires_grad_(False)


def fit_hidden(features: Features, labels: Labels, classes: int, training: ProbeTraining) -> Probe:
    """Return a probe with one hidden layer, fitted by AdamW on full batches with a linearly decreasing rate.

    The layers are small, so that an automatic gradient and an optimiser of many tensors would take most of the time:
    the gradient is written out here, and all weights are updated as one vector.

    Source: Loshchilov & Hutter 2019, Algorithm 2.
    """
    probe = Probe(features, classes, training.hidden, keyed_generator(0, Purpose.PROBE_WEIGHTS)).requires_grad_(False)
    weights = torch.cat([each.flatten() for each in probe.parameters()])
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    layers = _HiddenLayers(probe.standardised(features), F.one_hot(labels, classes), probe, weights)
    for step in range(training.steps):
        rate = _RATE * (1 - step / training.steps)
        gradient = layers.gradient()
        mean.lerp_(gradient, 1 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        first, second = (1 - beta ** (step + 1) for beta in _BETAS)
        deviation = square.sqrt().div_(second**0.5).add_(_EPSILON)
        weights.mul_(1 - rate * _DECAY).addcdiv_(mean, deviation, value=-rate / first)
    layers.copy_to(probe)
    return probe


class _HiddenLayers:
    """Weights of a probe with one hidden layer as views of one vector, and the gradient of its mean log loss."""

    def __init__(self, values: Features, one_hot: Tensor, probe: Probe, weights: Tensor) -> None:
        shapes = [each.shape for each in probe.parameters()]
        sizes = [shape.numel() for shape in shapes]
        self._values, self._one_hot = values, one_hot.to(values)
        self._share = 1 / len(values)
        self._gradient = torch.empty_like(weights)
        self._weights, self._gradients = (
            [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
            for vector in (weights, self._gradient)
        )

    def gradient(self) -> Tensor:
        """Return the gradient at the present weights, one vector that the next call overwrites."""
        first, first_bias, last, last_bias = self._weights
        of_first, of_first_bias, of_last, of_last_bias = self._gradients
        active = torch.addmm(first_bias, self._values, first.T).relu_()
        errors = torch.addmm(last_bias, active, last.T).softmax(1).sub_(self._one_hot).mul_(self._share)
        torch.mm(errors.T, active, out=of_last)
        torch.sum(errors, 0, out=of_last_bias)
        back = (errors @ last).mul_(active.sign())
        torch.mm(back.T, self._values, out=of_first)
        torch.sum(back, 0, out=of_first_bias)
        return self._gradient

    def copy_to(self, probe: Probe) -> None:
        """Write the weights into a probe."""
        for parameter, weights in zip(probe.parameters(), self._weights, strict=True):
            parameter.copy_(weights)
