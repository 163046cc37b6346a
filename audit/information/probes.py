"""Probes: small heads fitted on frozen features, whose cross-fitted log loss bounds the label information."""

from collections.abc import Callable
from itertools import pairwise
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.information.settings import ProbeTraining
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Labels


class Probe(nn.Module):
    """A linear head (`hidden` 0) or one with a hidden layer, on features standardised by the training samples."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: Features, classes: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", features.mean(0))
        spread = features.std(0, correction=0)
        # dividing by the deviation of a constant feature would amplify rounding errors
        self.register_buffer("deviation", torch.where(spread > 1e-7 * features.abs().amax(0), spread, torch.inf))
        widths = [features.shape[1], *([hidden] if hidden else []), classes]
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            bound = (1 / layer.in_features) ** 0.5 if hidden else 0.0
            with torch.no_grad():
                layer.weight.copy_(bound * (2 * torch.rand(layer.weight.shape, generator=generator) - 1))
                layer.bias.zero_()
        self.to(features.device)

    def forward(self, features: Features) -> Tensor:
        """Return logits (N, K) of features (N, D)."""
        values = (features - self.mean) / self.deviation
        *hidden, last = self.layers
        for layer in hidden:
            values = layer(values).relu()
        logits: Tensor = last(values)
        return logits


def fit_linear(features: Features, labels: Labels, classes: int, training: ProbeTraining) -> Probe:
    """Return the logistic regression that minimises log loss + `penalty` / 2N * |weights|^2, fitted by L-BFGS."""
    probe = Probe(features, classes, 0, keyed_generator(0, Purpose.PROBE_WEIGHTS))
    optimiser = torch.optim.LBFGS(probe.parameters(), max_iter=training.steps, line_search_fn="strong_wolfe")
    weight = training.penalty / (2 * len(features))

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(probe(features), labels)
        value = value + weight * sum(p.square().sum() for p in probe.parameters() if p.dim() == 2)
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return probe.requires_grad_(False)


def fit_hidden(features: Features, labels: Labels, classes: int, training: ProbeTraining) -> Probe:
    """Return a probe with one hidden layer, fitted by AdamW on full batches with a linearly decreasing rate."""
    probe = Probe(features, classes, training.hidden, keyed_generator(0, Purpose.PROBE_WEIGHTS))
    optimiser = torch.optim.AdamW(probe.parameters(), 1e-2, weight_decay=0.1)
    with torch.enable_grad():
        for step in range(training.steps):
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * (1 - step / training.steps)
            optimiser.zero_grad()
            F.cross_entropy(probe(features), labels).backward()
            optimiser.step()
    return probe.requires_grad_(False)


FITS: dict[str, Callable[[Features, Labels, int, ProbeTraining], Probe]] = {"linear": fit_linear, "hidden": fit_hidden}


@torch.no_grad()
def label_terms(features: Features, labels: Labels, seed: int, training: ProbeTraining, kind: str) -> Tensor:
    """Return the terms (N,) of H(Y) minus the log loss of a cross-fitted probe, in nats.

    In expectation their mean is at most I(Y; Z), because the expected log loss is at least H(Y | Z).

    Source: Barber & Agakov 2003, the variational lower bound on mutual information.
    """
    _, labels = labels.unique(return_inverse=True)
    classes = int(labels.max()) + 1
    surprise = -(labels.bincount()[labels].to(features) / len(labels)).log()
    order = torch.randperm(len(labels), generator=keyed_generator(seed, Purpose.PROBE_FOLDS)).to(labels.device)
    loss = torch.zeros_like(surprise)
    for held_out in order.chunk(training.folds):
        kept = torch.ones_like(surprise, dtype=torch.bool)
        kept[held_out] = False
        probe = FITS[kind](features[kept], labels[kept], classes, training)
        loss[held_out] = F.cross_entropy(probe(features[held_out]), labels[held_out], reduction="none")
    # logits may be arbitrarily large on unseen samples: the log loss of one sample is limited to ln 10^6
    return surprise - loss.clamp_max(log(1e6))
