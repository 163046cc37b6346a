"""Train encoders by maximising mutual information, in the normal case, the worst case, or a mixture of both.

Encoder and critic share one optimiser. Before each step PGD moves the batch inside its balls to minimise the critic's
value, unless the worst case has no weight.

Source: Zhu, Zhang & Evans 2020, section 5.1, equations 5.2 to 5.4; for beta = 0 Hjelm et al. 2019.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import ThreatModel
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.training.augmentation import Shifts, draw_shifts
from audit.training.checkpoints import Checkpoint, Stateful
from audit.training.objectives import ObjectiveSettings, VariationalObjective
from audit.types import FeatureMap, Features, Images, ObjectiveValue

_STANDARDISATION_IMAGES = 1024  # images for the mean and deviation that critics standardise by

PRECISIONS = ("float32", "bf16")
IMAGE_BRANCHES = ("detached", "followed", "cached")

EpochProgress = Callable[[int, float], None]
"""Receives the epoch, from 0, and the mean objective or loss of its steps."""


@dataclass(frozen=True)
class MITraining:
    """Settings of a training run that maximises I(X; g(X)) - beta RV = (1 - beta) I_normal + beta I_worst.

    `beta` 0 is the normal case and never searches; above 0 a `threat` is needed. The search keeps the iterate with the
    smallest value of the whole batch. Its `image_branch` is `detached` to follow the gradient through the features
    alone, as the released code does, `followed` to follow it through both inputs of the critic, or `cached` to score
    perturbed features against the clean images, with one pass of the image branch a batch instead of one a step.
    `remembered` starts each search from the image's last perturbation.

    Each image is shifted by up to `shift` pixels and, with `flip`, mirrored with probability 1/2. `bf16` runs encoder
    and image branch in mixed precision; scores and bounds stay in float32. A checkpoint is written after each epoch
    and, if `every` is not 0, after every `every` steps.
    """

    beta: float = 1.0
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.32, random_start=False))
    critic: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    image_branch: Literal["detached", "followed", "cached"] = "detached"
    remembered: bool = False
    epochs: int = 500
    batch_size: int = 128
    learning_rate: float = 1e-4
    shift: int = 0
    flip: bool = False
    precision: Literal["float32", "bf16"] = "float32"
    every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < inf:
            raise UsageError(f"beta {self.beta!r} must be at least 0 and finite")
        if self.beta > 0 and self.threat is None:
            raise UsageError(f"beta {self.beta!r} needs a threat model: only beta 0 has no worst case")
        if not 0 < self.learning_rate < inf:
            raise UsageError(f"MI training learning_rate {self.learning_rate!r} must be above 0 and finite")
        for name, least in (("epochs", 1), ("batch_size", 2), ("shift", 0), ("every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"MI training {name} {getattr(self, name)!r} must be at least {least}")
        for name, legal in (("precision", PRECISIONS), ("image_branch", IMAGE_BRANCHES)):
            if getattr(self, name) not in legal:
                raise UnknownNameError(name, getattr(self, name), legal)

    def identity(self) -> dict[str, Any]:
        """Return the settings as plain values, with the name of the norm."""
        return asdict(self) | {"norm": self.threat.norm if self.threat else ""}


def train_representation(
    encoder: nn.Module,
    images: Images,
    training: MITraining,
    progress: EpochProgress = lambda _epoch, _nats: None,
    checkpoint_path: Path | None = None,
) -> VariationalObjective:
    """Train an encoder in place on images (M, C, H, W) in [0, 1], leave it in eval mode and return its objective.

    The encoder is any module that maps images to features (N, D), such as a `Representation` of a backbone's layer.
    Only parameters that require a gradient are trained; modules without any stay in eval mode, batch statistics
    included. The search runs in eval mode. `progress` receives the epoch and the mean objective in nats. Random draws
    are keyed by seed and step, so a resumed run gives the weights of an uninterrupted one, bit for bit on the CPU.

    Raises UsageError if no parameter is trainable or there are fewer than two images, InvalidModelError if the
    objective is not finite.
    """
    trainer = _Trainer(encoder, images, training, checkpoint_path)
    trainer.train(progress)
    return trainer.critic


def mi_objective(
    encode: FeatureMap, critic: VariationalObjective, clean: Images, adversarial: Images, beta: float
) -> Tensor:
    """Return (1 - beta) I(x; g(x)) + beta I(x'; g(x')), () in nats, for images x and x' (N, C, H, W).

    A term of weight 0 is not computed. For beta > 1 the normal case has negative weight, so the shared critic no longer
    maximises it. Source: Zhu, Zhang & Evans 2020, equation 5.2.
    """
    if beta == 0:
        return critic(clean, encode(clean))
    worst: Tensor = critic(adversarial, encode(adversarial))
    if beta == 1:
        return worst
    normal: Tensor = critic(clean, encode(clean))
    return (1 - beta) * normal + beta * worst


def find_worst_case(
    encode: FeatureMap,
    critic: VariationalObjective,
    clean: Images,
    training: MITraining,
    generator: torch.Generator,
    start: Images | None = None,
) -> Images:
    """Return images (N, C, H, W) inside the balls of `clean` that minimise the critic's value of the whole batch.

    Every image is assigned the value of the batch, so the best iterate is one batch and not a mixture of several.
    `training.image_branch` selects the path of the gradient.
    """
    assert training.threat is not None
    with torch.no_grad():
        cached = critic.embed_images(clean) if training.image_branch == "cached" else None

    kind = clean.device.type
    enabled = torch.is_autocast_enabled(kind)
    precision = torch.autocast(kind, torch.get_autocast_dtype(kind)) if enabled else nullcontext()

    def batch_value(images: Images, index: Tensor) -> ObjectiveValue:
        with precision:  # that of the caller, which searches leave otherwise
            features = encode(images)
            with torch.set_grad_enabled(torch.is_grad_enabled() and training.image_branch == "followed"):
                embedded = critic.embed_images(images) if cached is None else _rows(cached, index)
            nats = critic.value(embedded, features)
        return ObjectiveValue(
            nats.expand(len(images)), torch.zeros(len(images), dtype=torch.bool, device=images.device)
        )

    pgd = replace(training.pgd, batch_size=max(len(clean), training.pgd.batch_size))
    return minimise(batch_value, clean, training.threat, pgd, generator, start).images


def set_training_mode(encoder: nn.Module) -> None:
    """Put an encoder into training mode, and modules whose parameters are all frozen into eval mode."""
    encoder.train()
    for module in encoder.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


class _Trainer:
    """State of one training run: encoder, critic, optimiser and remembered perturbations."""

    def __init__(self, encoder: nn.Module, images: Images, training: MITraining, path: Path | None) -> None:
        if len(images) < 2:
            raise UsageError(f"an encoder cannot be trained on {len(images)} images: at least 2 are needed")
        trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        if not trainable:
            raise UsageError("no parameter of the encoder requires a gradient: call requires_grad_() on those to train")
        self.encoder, self.images, self.training = encoder, images, training
        generator = keyed_generator(training.seed, Purpose.MI_TRAINING_CRITIC)
        encoder.eval()
        sample = images[:_STANDARDISATION_IMAGES]
        with torch.no_grad():
            self.critic = VariationalObjective(sample, self.encode(sample), training.critic, generator)
        self.optimiser = torch.optim.Adam([*trainable, *self.critic.parameters()], training.learning_rate)
        self.batches = max(1, len(images) // training.batch_size)
        self.perturbations = torch.zeros_like(images if training.remembered else images[:0])
        parts: dict[str, Stateful] = {"encoder": encoder, "critic": self.critic, "optimiser": self.optimiser}
        identity = {"training": training.identity(), "images": list(images.shape), "sum": float(images.double().sum())}
        tensors = {"deltas": self.perturbations}
        self.checkpoint = Checkpoint(path, identity, parts, {"critic": generator}, tensors)

    def train(self, progress: EpochProgress) -> None:
        done, values = self.checkpoint.restore(), list[float]()
        while done < self.training.epochs * self.batches:
            values.append(self.step(done))
            done += 1
            epoch_ended = done % self.batches == 0
            if epoch_ended or (self.training.every and done % self.training.every == 0):
                self.checkpoint.save(done)
            if epoch_ended:
                progress(done // self.batches - 1, sum(values) / len(values))
                values.clear()
        self.encoder.eval()
        self.critic.eval()

    def encode(self, images: Images) -> Features:
        features: Features = self.encoder(images)
        return features.flatten(1)

    def autocast(self) -> AbstractContextManager[Any]:
        enabled = self.training.precision == "bf16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=enabled)

    def step(self, number: int) -> float:
        """Search the worst case of a batch, update encoder and critic, and return the objective in nats."""
        training, batch = self.training, self._batch(number)
        generator = keyed_generator(training.seed, Purpose.MI_TRAINING_SHIFTS, number)
        shifts = draw_shifts(self.images[batch], training.shift, generator, flip=training.flip)
        clean = shifts.apply(self.images[batch])
        adversarial = self._search(clean, batch, shifts, number) if training.beta > 0 else clean
        set_training_mode(self.encoder)
        self.critic.train()
        with self.autocast():
            value = mi_objective(self.encode, self.critic, clean, adversarial, training.beta)
        self.optimiser.zero_grad(set_to_none=True)
        (-value).backward()
        self.optimiser.step()
        nats = float(value.detach())
        if not isfinite(nats):
            raise InvalidModelError(f"the objective is {nats} at step {number}: lower the learning rate")
        return nats

    def _batch(self, number: int) -> Tensor:
        """Return the indices of the images of a step."""
        epoch, position = divmod(number, self.batches)
        generator = keyed_generator(self.training.seed, Purpose.MI_TRAINING_ORDER, epoch)
        order = torch.randperm(len(self.images), generator=generator)
        return order.tensor_split(self.batches)[position].to(self.images.device)

    def _search(self, clean: Images, batch: Tensor, shifts: Shifts, number: int) -> Images:
        threat, start = self.training.threat, None
        assert threat is not None
        self.encoder.eval()
        self.critic.eval()
        if self.training.remembered:
            start = threat.project(clean + shifts.apply(self.perturbations[batch]), clean)
        generator = keyed_generator(self.training.seed, Purpose.MI_TRAINING_STARTS, number)
        with self.autocast():
            adversarial = find_worst_case(self.encode, self.critic, clean, self.training, generator, start)
        if self.training.remembered:
            self.perturbations[batch] = shifts.undo(adversarial - clean)
        return adversarial


def _rows(embedded: Tensor, index: Tensor) -> Tensor:
    return embedded if len(index) == len(embedded) else embedded[index]
