"""Train networks that score (image, label hypothesis) pairs, by variational objectives of those scores.

Joint pairs are images with their true labels. Product pairs are all images of the batch with all K labels, so labels
are uniform whatever their frequencies in the data.

Source: Zhu, An & Niu 2020, "Guess First to Enable Better Compression and Adversarial Robustness".
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import InvalidModelError, MismatchError, UnknownNameError, UsageError
from audit.hashing import tensors_sha256, weights_sha256
from audit.information.bounds import Pairs, donsker_varadhan_of, energy_of, jensen_shannon_of
from audit.random_keys import Purpose, keyed_generator
from audit.training.checkpoints import Checkpoint, Stateful
from audit.training.mmd import information_elimination
from audit.training.mutual_information import EpochProgress
from audit.types import Images, Labels

MAX_EPOCHS = 200


def label_pairs(scores: Tensor, labels: Labels) -> Pairs:
    """Return the joint pairs (N,) and product pairs (N, K) among scores (N, K) of all hypotheses."""
    return Pairs(scores.gather(1, labels[:, None]).squeeze(1), scores)


def jensen_shannon(scores: Tensor, labels: Labels) -> Tensor:
    """Return the Jensen-Shannon objective () in nats, maximal at T = the log density ratio."""
    return jensen_shannon_of(label_pairs(scores, labels))


def donsker_varadhan(scores: Tensor, labels: Labels) -> Tensor:
    """Return the Donsker-Varadhan bound () in nats, maximal at T = the log density ratio plus a constant.

    The logarithm of a batch mean is biased, and so are gradients of small batches.
    """
    return donsker_varadhan_of(label_pairs(scores, labels))


def energy(scores: Tensor, labels: Labels) -> Tensor:
    """Return the energy-based objective () in nats: ln K minus the cross-entropy of softmax(T)."""
    return energy_of(label_pairs(scores, labels))


def cross_entropy(scores: Tensor, labels: Labels) -> Tensor:
    """Return the negative cross-entropy () of softmax(T) in nats, the objective of the baselines."""
    return -F.cross_entropy(scores, labels)


OBJECTIVES: dict[str, Callable[[Tensor, Labels], Tensor]] = {
    "jensen-shannon": jensen_shannon,
    "donsker-varadhan": donsker_varadhan,
    "energy": energy,
    "cross-entropy": cross_entropy,
}
"""Objectives of scores (N, K) and labels (N,) by name; all are maximised."""


@runtime_checkable
class HypothesisConditioned(Protocol):
    """A network whose hypothesis enters after a convolutional front, as information elimination requires."""

    front: nn.Module

    def all_scores(self, flat: Tensor, /) -> Tensor:
        """Return the scores (N, K) of the front's features (N, F) under all hypotheses."""

    def representation(self, flat: Tensor, hypotheses: Tensor, /) -> Tensor:
        """Return the second dense layer (N, H, D) of the front's features (N, F) under hypotheses (N, H)."""


class StochasticOutput(Protocol):
    """Logits (N, K) from a sampled representation, and its KL divergence () from the prior in nats."""

    @property
    def logits(self) -> Tensor:
        """Return the logits."""

    @property
    def kl_nats(self) -> Tensor:
        """Return the KL divergence."""


@runtime_checkable
class StochasticEncoder(Protocol):
    """A network with a stochastic encoder, as the variational information bottleneck requires."""

    def sample(self, images: Images, generator: torch.Generator, /) -> StochasticOutput:
        """Return logits and KL divergence of one sample for each image."""


@dataclass(frozen=True)
class HypothesisTraining:
    """Settings of `train_hypothesis`: Adam at a constant learning rate.

    `elimination` is the weight of information elimination and `kl_weight` that of a stochastic encoder's divergence
    from its prior. Elimination starts after the fraction `warm_up` of the epochs, because from the start it can keep
    the representation constant. Raises UnknownNameError or UsageError for illegal values.

    Source: Zhu, An & Niu 2020, section 4: Adam, 1e-3, batches of 250, 200 epochs.
    """

    objective: str = "jensen-shannon"
    elimination: float = 0.0
    kl_weight: float = 0.0
    warm_up: float = 0.0
    epochs: int = MAX_EPOCHS
    batch_size: int = 250
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UnknownNameError("objective", self.objective, OBJECTIVES)
        if not 1 <= self.epochs <= MAX_EPOCHS:
            raise UsageError(f"epochs {self.epochs!r} must be between 1 and {MAX_EPOCHS}")
        if self.batch_size < 2:
            raise UsageError(f"batch size {self.batch_size!r} must be at least 2 for batch norm")
        for name in ("elimination", "kl_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} {getattr(self, name)!r} must be finite and at least 0")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"warm_up {self.warm_up!r} must be a fraction of the epochs, at least 0 and below 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning rate {self.learning_rate!r} must be finite and above 0")


def train_hypothesis(
    network: nn.Module,
    images: Images,
    labels: Labels,
    training: HypothesisTraining,
    progress: EpochProgress = lambda _epoch, _loss: None,
    checkpoint_path: Path | None = None,
) -> None:
    """Train a network in place on images (N, C, H, W) in [0, 1] and leave it in eval mode.

    `progress` receives the epoch and its mean loss. With `checkpoint_path` the state is written after every epoch, and
    a call with the same network, images and settings resumes; the caller deletes the file. Raises MismatchError for
    settings that the network does not support, InvalidModelError if the loss is not finite.
    """
    _check_supported(network, training)
    order = keyed_generator(training.seed, Purpose.HYPOTHESIS_ORDER)
    noise = keyed_generator(training.seed, Purpose.HYPOTHESIS_NOISE)
    trainable = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(trainable, training.learning_rate)
    identity = _identity(network, images, labels, training) if checkpoint_path else {}
    parts: dict[str, Stateful] = {"network": network, "optimiser": optimiser}
    checkpoint = Checkpoint(checkpoint_path, identity, parts, {"order": order, "noise": noise})
    for epoch in range(checkpoint.restore(), training.epochs):
        network.train()
        total = 0.0
        current = training if epoch >= training.warm_up * training.epochs else replace(training, elimination=0.0)
        for batch in _batches(len(images), training.batch_size, order):
            index = batch.to(images.device)
            loss = training_loss(network, images[index], labels[index], current, noise)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(batch)
        if not isfinite(total):
            advice = "check the images for non-finite pixels, or lower the learning rate"
            raise InvalidModelError(f"the loss of epoch {epoch + 1} is {total}: {advice}")
        checkpoint.save(epoch + 1)
        progress(epoch, total / len(images))
    network.eval()


def training_loss(
    network: nn.Module, images: Images, labels: Labels, training: HypothesisTraining, noise: torch.Generator
) -> Tensor:
    """Return the loss () of one step: the negative objective plus the weighted penalties.

    Information elimination uses detached features of the front, so its gradient reaches only the first and second
    dense layers.
    """
    objective = OBJECTIVES[training.objective]
    if training.kl_weight and isinstance(network, StochasticEncoder):
        output = network.sample(images, noise)
        return training.kl_weight * output.kl_nats - objective(output.logits, labels)
    if training.elimination and isinstance(network, HypothesisConditioned):
        flat = network.front(images)
        penalty = information_elimination(network.representation(flat.detach(), labels[:, None]).flatten(1), labels)
        return training.elimination * penalty - objective(network.all_scores(flat), labels)
    return -objective(network(images), labels)


def _check_supported(network: nn.Module, training: HypothesisTraining) -> None:
    name = type(network).__name__
    if training.elimination and not isinstance(network, HypothesisConditioned):
        raise MismatchError(f"{name} takes no label hypothesis: information elimination must be 0")
    if training.kl_weight and not isinstance(network, StochasticEncoder):
        raise MismatchError(f"{name} has no stochastic encoder: kl_weight must be 0")
    if training.kl_weight and training.elimination:
        raise MismatchError("elimination and kl_weight belong to different networks: one of them must be 0")


def _batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Return shuffled indices in equal batches of at least `size`: a small last batch would destabilise batch norm."""
    return torch.randperm(count, generator=generator).tensor_split(max(1, count // size))


def _identity(network: nn.Module, images: Images, labels: Labels, training: HypothesisTraining) -> dict[str, Any]:
    return {
        "training": asdict(training),
        "network": type(network).__name__,
        "weights_sha256": weights_sha256(network),
        "data_sha256": tensors_sha256(images, labels),
    }
