"""Representations learned by mutual information maximisation: in the normal case, in the worst case, or between.

One trainer moves encoder and critic together; before each step the batch is moved inside its balls down the critic's
own value, where the worst case counts.

Source: Zhu, Zhang & Evans 2020, section 5.1, equations 5.2 to 5.4; for beta = 0 Hjelm et al. 2019.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
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
from audit.training.objectives import Scorer, ScorerShape
from audit.types import Features, Images, Judged

_SAMPLE = 1024  # images whose mean and deviation a critic standardises by

PRECISIONS = ("float32", "bf16")
IMAGE_BRANCHES = ("detached", "followed", "cached")

Encode = Callable[[Images], Features]
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class MITraining:
    """How an encoder is trained to maximise I(X; g(X)) - beta RV = (1 - beta) I_normal + beta I_worst.

    `beta` 0 is the normal case and never searches, 1 the worst case alone; `threat` is needed above 0. The search
    keeps the iterate with the smallest value of the whole batch. Its `image_branch` says how far it looks: `detached`
    scores the moved image but follows the features alone (the authors'), `followed` takes the gradient through both,
    `cached` scores the features of the moved image against the clean one, which costs a view a batch instead of one a
    step. `remembered` starts each search where the image's last one ended.

    Each image is shifted by up to `shift` pixels and, with `flip`, mirrored half of the time. `bf16` runs encoder and
    image branch in mixed precision; scores and bounds stay in full. `every` is how many steps lie between
    checkpoints, beside one after each epoch; 0 for none.
    """

    beta: float = 1.0
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.32, random_start=False))
    critic: ScorerShape = field(default_factory=ScorerShape)
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
        """Return the settings as plain values, the norm by its name."""
        return asdict(self) | {"norm": self.threat.norm if self.threat else ""}


def train_representation(
    encoder: nn.Module,
    images: Images,
    training: MITraining,
    progress: Progress = lambda _epoch, _nats: None,
    checkpoint_path: Path | None = None,
) -> Scorer:
    """Train an encoder in place on images (M, C, H, W) in [0, 1], leave it in eval mode and return its critic.

    An encoder is any module that maps images to features (N, D), a `Representation` of a backbone's layer included.
    Parameters that require a gradient learn; parts without any stay in eval mode, their batch statistics too. The
    search runs in eval mode, so it moves no statistics; steps use those of the batch. `progress` hears the epoch and
    the mean objective in nats. Everything drawn is keyed by seed and step: a run taken up from its checkpoint file
    gives the weights of one left alone, bit for bit on the CPU.

    Raises UsageError where nothing can learn or there are fewer than two images, InvalidModelError where the value
    stops being finite.
    """
    run = _Run(encoder, images, training, checkpoint_path)
    run.train(progress)
    return run.scorer


def objective(encode: Encode, scorer: Scorer, clean: Images, moved: Images, beta: float) -> Tensor:
    """Return (1 - beta) I(x; g(x)) + beta I(x'; g(x')) () in nats for images (N, C, H, W) and where they were moved.

    The case that does not count is not computed. Above 1 the critic, which both cases share, is not the best one for
    the normal case, whose sign is negative. Source: Zhu, Zhang & Evans 2020, equation 5.2.
    """
    if beta == 0:
        return scorer(clean, encode(clean))
    worst: Tensor = scorer(moved, encode(moved))
    if beta == 1:
        return worst
    normal: Tensor = scorer(clean, encode(clean))
    return (1 - beta) * normal + beta * worst


def worst_case(
    encode: Encode,
    scorer: Scorer,
    clean: Images,
    training: MITraining,
    generator: torch.Generator,
    start: Images | None = None,
) -> Images:
    """Return images (N, C, H, W) moved inside their balls so that the critic's value of the whole batch is small.

    Every image is given the value of the batch, so the best iterate is one batch, not a mixture. The gradient goes
    where `training.image_branch` says.
    """
    assert training.threat is not None
    with torch.no_grad():
        cached = scorer.view(clean) if training.image_branch == "cached" else None

    def value(images: Images, index: Tensor) -> Judged:
        features = encode(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and training.image_branch == "followed"):
            view = scorer.view(images) if cached is None else _rows(cached, index)
        nats = scorer.value(view, features)
        return Judged(nats.expand(len(images)), torch.zeros(len(images), dtype=torch.bool, device=images.device))

    pgd = replace(training.pgd, batch_size=max(len(clean), training.pgd.batch_size))
    return minimise(value, clean, training.threat, pgd, generator, start).images


def learning_mode(encoder: nn.Module) -> None:
    """Put what can learn into training mode, and parts whose parameters are all frozen into eval mode."""
    encoder.train()
    for part in encoder.modules():
        parameters = list(part.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            part.eval()


class _Run:
    """One training run: encoder, critic, optimiser, and what is remembered of searches."""

    def __init__(self, encoder: nn.Module, images: Images, training: MITraining, path: Path | None) -> None:
        if len(images) < 2:
            raise UsageError(f"{len(images)} images train no encoder: at least 2 are needed")
        learners = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
        if not learners:
            raise UsageError("no parameter of the encoder requires a gradient: set requires_grad_() on what may learn")
        self.encoder, self.images, self.training = encoder, images, training
        draws = keyed_generator(training.seed, Purpose.MI_TRAINING_CRITIC)
        encoder.eval()
        sample = images[:_SAMPLE]
        with torch.no_grad():
            self.scorer = Scorer(sample, self.encode(sample), training.critic, draws)
        self.optimiser = torch.optim.Adam([*learners, *self.scorer.parameters()], training.learning_rate)
        self.batches = max(1, len(images) // training.batch_size)
        self.deltas = torch.zeros_like(images if training.remembered else images[:0])
        parts: dict[str, Stateful] = {"encoder": encoder, "critic": self.scorer, "optimiser": self.optimiser}
        known = {"training": training.identity(), "images": list(images.shape), "sum": float(images.double().sum())}
        self.checkpoint = Checkpoint(path, known, parts, {"critic": draws}, {"deltas": self.deltas})

    def train(self, progress: Progress) -> None:
        done, heard = self.checkpoint.restore(), list[float]()
        while done < self.training.epochs * self.batches:
            heard.append(self.step(done))
            done += 1
            ended = done % self.batches == 0
            if ended or (self.training.every and done % self.training.every == 0):
                self.checkpoint.save(done)
            if ended:
                progress(done // self.batches - 1, sum(heard) / len(heard))
                heard.clear()
        self.encoder.eval()
        self.scorer.eval()

    def encode(self, images: Images) -> Features:
        features: Features = self.encoder(images)
        return features.flatten(1)

    def precision(self) -> AbstractContextManager[Any]:
        enabled = self.training.precision == "bf16"
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=enabled)

    def step(self, number: int) -> float:
        """Move a batch where the worst case counts, then encoder and critic up the objective; return it in nats."""
        training, chosen = self.training, self._chosen(number)
        draws = keyed_generator(training.seed, Purpose.MI_TRAINING_SHIFTS, number)
        shifts = draw_shifts(self.images[chosen], training.shift, draws, flip=training.flip)
        clean = shifts.apply(self.images[chosen])
        moved = self._moved(clean, chosen, shifts, number) if training.beta > 0 else clean
        learning_mode(self.encoder)
        self.scorer.train()
        with self.precision():
            value = objective(self.encode, self.scorer, clean, moved, training.beta)
        self.optimiser.zero_grad(set_to_none=True)
        (-value).backward()
        self.optimiser.step()
        nats = float(value.detach())
        if not isfinite(nats):
            raise InvalidModelError(f"the objective is {nats} at step {number}: lower the learning rate")
        return nats

    def _chosen(self, number: int) -> Tensor:
        epoch, place = divmod(number, self.batches)
        order = torch.randperm(
            len(self.images), generator=keyed_generator(self.training.seed, Purpose.MI_TRAINING_ORDER, epoch)
        )
        return order.tensor_split(self.batches)[place].to(self.images.device)

    def _moved(self, clean: Images, chosen: Tensor, shifts: Shifts, number: int) -> Images:
        threat, start = self.training.threat, None
        assert threat is not None
        self.encoder.eval()
        self.scorer.eval()
        if self.training.remembered:
            start = threat.project(clean + shifts.apply(self.deltas[chosen]), clean)
        draws = keyed_generator(self.training.seed, Purpose.MI_TRAINING_STARTS, number)
        with self.precision():
            moved = worst_case(self.encode, self.scorer, clean, self.training, draws, start)
        if self.training.remembered:
            self.deltas[chosen] = shifts.undo(moved - clean)
        return moved


def _rows(view: Tensor, index: Tensor) -> Tensor:
    return view if len(index) == len(view) else view[index]
