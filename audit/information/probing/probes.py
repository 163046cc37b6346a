"""Probes: small heads fitted on frozen features, linear or with one hidden layer."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.information.probing.neighbours import standard_units
from audit.information.probing.settings import ProbeTraining
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Labels


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
    """Return a probe with one hidden layer, fitted by AdamW on full batches with a linearly decreasing rate."""
    probe = Probe(features, classes, training.hidden, keyed_generator(0, Purpose.PROBE_WEIGHTS))
    optimiser, values = torch.optim.AdamW(probe.parameters(), 1e-2, weight_decay=0.1), probe.standardised(features)
    with torch.enable_grad():
        for step in range(training.steps):
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * (1 - step / training.steps)
            optimiser.zero_grad()
            F.cross_entropy(probe.head(values), labels).backward()
            optimiser.step()
    return probe.requires_grad_(False)
