"""Guess first, then classify: objectives on the scores of (image, label hypothesis) pairs, and training by them.

A joint pair is an image with its true label; the product pairs are every image of the batch with all K labels, its
own included, each once: labels uniform whatever their shares in the data.

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
from audit.training.checkpoints import Checkpoint
from audit.training.mmd import information_elimination
from audit.types import Images, Labels

MOST_EPOCHS = 200


def true_pairs(scores: Tensor, labels: Labels) -> Pairs:
    """Return the joint and product pairs in scores (N, K) of every hypothesis: (N,) and (N, K)."""
    return Pairs(scores.gather(1, labels[:, None]).squeeze(1), scores)


def jensen_shannon(scores: Tensor, labels: Labels) -> Tensor:
    """Return the convex-conjugate Jensen-Shannon value () in nats: largest where T is the log density ratio."""
    return jensen_shannon_of(true_pairs(scores, labels))


def donsker_varadhan(scores: Tensor, labels: Labels) -> Tensor:
    """Return the Donsker-Varadhan value () in nats: largest where T is the log density ratio up to a constant.

    The logarithm of a batch's mean is biased, so gradients of small batches are not those of the whole set.
    """
    return donsker_varadhan_of(true_pairs(scores, labels))


def energy(scores: Tensor, labels: Labels) -> Tensor:
    """Return the energy-based value () in nats: ln K less the cross-entropy of softmax(T)."""
    return energy_of(true_pairs(scores, labels))


def cross_entropy(scores: Tensor, labels: Labels) -> Tensor:
    """Return minus the cross-entropy () of softmax(T) in nats: what the baselines make large."""
    return -F.cross_entropy(scores, labels)


OBJECTIVES: dict[str, Callable[[Tensor, Labels], Tensor]] = {
    "jensen-shannon": jensen_shannon,
    "donsker-varadhan": donsker_varadhan,
    "energy": energy,
    "cross-entropy": cross_entropy,
}
"""What a network's scores (N, K) and labels (N,) are worth, by name: all are to be made large."""


@runtime_checkable
class Conditioned(Protocol):
    """A network whose hypothesis enters after a front: what information elimination needs of it."""

    front: nn.Module

    def all_scores(self, flat: Tensor, /) -> Tensor:
        """Return scores (N, K) of the front's features (N, F) under all hypotheses."""

    def representation(self, flat: Tensor, hypotheses: Tensor, /) -> Tensor:
        """Return the second layer (N, H, D) of the front's features (N, F) under hypotheses (N, H)."""


class Drawn(Protocol):
    """Logits (N, K) through a drawn representation, and its divergence from the prior () in nats."""

    @property
    def logits(self) -> Tensor:
        """Return the logits."""

    @property
    def kl_nats(self) -> Tensor:
        """Return the divergence."""


@runtime_checkable
class Stochastic(Protocol):
    """A network with a stochastic encoder: what the information bottleneck's loss needs of it."""

    def sample(self, images: Images, generator: torch.Generator, /) -> Drawn:
        """Return logits and divergence of one draw for each image."""


@dataclass(frozen=True)
class HypothesisTraining:
    """How a network on hypotheses, or a baseline of the same trunk, is trained: Adam at a constant learning rate.

    `elimination` weighs information elimination, `kl_weight` a stochastic encoder's divergence from its prior.
    Elimination begins after `warm_up` of the epochs: a representation that says nothing yet would stay like that.
    Raises UnknownNameError or UsageError for what is not legal.

    Source: Zhu, An & Niu 2020, section 4: Adam, 1e-3, batches of 250, 200 epochs.
    """

    objective: str = "jensen-shannon"
    elimination: float = 0.0
    kl_weight: float = 0.0
    warm_up: float = 0.0
    epochs: int = MOST_EPOCHS
    batch_size: int = 250
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UnknownNameError("objective", self.objective, OBJECTIVES)
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise UsageError(f"{self.epochs} epochs are asked for: legal are 1 to {MOST_EPOCHS}")
        if self.batch_size < 2:
            raise UsageError(f"batch size {self.batch_size} is too small: batch norm needs at least 2 images")
        for name in ("elimination", "kl_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{name} {getattr(self, name)!r} is not a weight: it must be finite and at least 0")
        if not 0 <= self.warm_up < 1:
            raise UsageError(f"warm_up {self.warm_up!r} is not a share of the epochs: legal are 0 to below 1")
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning rate {self.learning_rate!r} must be finite and above 0")


def train_hypothesis(
    network: nn.Module,
    images: Images,
    labels: Labels,
    training: HypothesisTraining,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
    checkpoint_path: Path | None = None,
) -> None:
    """Train a network in place on images (N, C, H, W) in [0, 1] and leave it in eval mode.

    `progress` hears the epoch and its mean loss. With `checkpoint_path` the state is kept after every epoch and taken
    up again by a call with the same network, images and settings; the file is the caller's to delete. Raises
    MismatchError for a network that the settings do not fit, InvalidModelError where the loss is not finite.
    """
    _check_fit(network, training)
    order, noise = (
        keyed_generator(training.seed, Purpose.HYPOTHESIS_ORDER),
        keyed_generator(training.seed, Purpose.HYPOTHESIS_NOISE),
    )
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimiser = torch.optim.Adam(trained, training.learning_rate)
    checkpoint = Checkpoint(
        checkpoint_path, _identity(network, images, labels, training) if checkpoint_path else {},
        {"network": network, "optimiser": optimiser}, {"order": order, "noise": noise},
    )  # fmt: skip
    for epoch in range(checkpoint.restore(), training.epochs):
        network.train()
        total = 0.0
        now = training if epoch >= training.warm_up * training.epochs else replace(training, elimination=0.0)
        for chosen in _batches(len(images), training.batch_size, order):
            where = chosen.to(images.device)
            value = training_loss(network, images[where], labels[where], now, noise)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            total += float(value.detach()) * len(chosen)
        if not isfinite(total):
            advice = "look for pixels that are not finite, or take a smaller learning rate"
            raise InvalidModelError(f"the loss of epoch {epoch + 1} is {total}: {advice}")
        checkpoint.save(epoch + 1)
        progress(epoch, total / len(images))
    network.eval()


def training_loss(
    network: nn.Module, images: Images, labels: Labels, training: HypothesisTraining, noise: torch.Generator
) -> Tensor:
    """Return what one step makes small (): minus the objective, and the penalties that the settings weigh.

    Elimination reads the front's features detached and stops at the second layer: its gradient reaches the first and
    second dense layers alone.
    """
    worth = OBJECTIVES[training.objective]
    if training.kl_weight and isinstance(network, Stochastic):
        drawn = network.sample(images, noise)
        return training.kl_weight * drawn.kl_nats - worth(drawn.logits, labels)
    if training.elimination and isinstance(network, Conditioned):
        flat = network.front(images)
        told = information_elimination(network.representation(flat.detach(), labels[:, None]).flatten(1), labels)
        return training.elimination * told - worth(network.all_scores(flat), labels)
    return -worth(network(images), labels)


def _check_fit(network: nn.Module, training: HypothesisTraining) -> None:
    name = type(network).__name__
    if training.elimination and not isinstance(network, Conditioned):
        raise MismatchError(f"{name} takes no label hypothesis: information elimination must be 0")
    if training.kl_weight and not isinstance(network, Stochastic):
        raise MismatchError(f"{name} has no stochastic encoder: kl_weight must be 0")
    if training.kl_weight and training.elimination:
        raise MismatchError("elimination and kl_weight are of different networks: one of them must be 0")


def _batches(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffled indices in equal parts of `size` or a little more: no small rest that upsets batch norm."""
    return torch.randperm(count, generator=generator).tensor_split(max(1, count // size))


def _identity(network: nn.Module, images: Images, labels: Labels, training: HypothesisTraining) -> dict[str, Any]:
    return {
        "training": asdict(training),
        "network": type(network).__name__,
        "weights_sha256": weights_sha256(network),
        "data_sha256": tensors_sha256(images, labels),
    }
