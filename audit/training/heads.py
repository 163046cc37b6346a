"""Heads trained on a frozen layer: the best that anybody achieved, beside what no head can exceed.

Two ways to train them: `train_standard` and `train_adversarial` fit quickly, for certificates; `fit_head` follows the
paper, linear or with a hidden layer, standard or robust, stopped early or not.

Source: Zhu, Zhang & Evans 2020, section 5.2, for standard and adversarially trained heads on a frozen representation.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.label_attack import cross_entropy_objective, never_done
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.information.probes import ProbeTraining, fit_hidden, fit_linear
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Images, Labels

HeadName = Literal["slf", "mlp", "alf"]
HEADS: tuple[HeadName, ...] = ("slf", "mlp", "alf")
"""Standard linear, one hidden layer, adversarially trained linear."""
KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained: probes on the features, and for `alf` AdamW on images that PGD moved against it."""

    probe: ProbeTraining = field(default_factory=ProbeTraining)
    epochs: int = 10
    batch_size: int = 50
    learning_rate: float = 5e-2
    pgd: PGD = field(default_factory=lambda: PGD(steps=5, relative_step=0.4))
    seed: int = 0


@dataclass(frozen=True)
class HeadFit:
    """How one head is trained: Adam at a constant rate, on images that PGD moved against it where there is a `threat`.

    `linear` is one layer; `mlp` is linear(D, `hidden`), dropout, batch norm, ReLU, linear(`hidden`, K). `pgd` also
    searches the images that early stopping watches, `every` so many epochs. The defaults are the paper's but for
    `epochs`, which it does not tell.
    """

    classes: int = 10
    kind: Literal["linear", "mlp"] = "linear"
    threat: ThreatModel | None = None
    pgd: PGD = field(default_factory=lambda: PGD(steps=7, relative_step=0.32, random_start=False))
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-4
    hidden: int = 200
    dropout: float = 0.1
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("head", self.kind, KINDS)
        if self.classes < 2:
            raise UsageError(f"head classes {self.classes!r} must be at least 2")
        for name in ("epochs", "hidden", "every"):
            if getattr(self, name) < 1:
                raise UsageError(f"head {name} {getattr(self, name)!r} must be at least 1")
        if self.batch_size < 2:
            raise UsageError(f"head batch_size {self.batch_size!r} must be at least 2: batch norm needs two images")
        if not 0 < self.learning_rate < inf:
            raise UsageError(f"head learning_rate {self.learning_rate!r} must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"head dropout {self.dropout!r} is outside [0, 1)")


class Watched(NamedTuple):
    """Images (N, C, H, W) and labels (N,) on which early stopping reads adversarial accuracy, and against what."""

    images: Images
    labels: Labels
    threat: ThreatModel


class Stopped(NamedTuple):
    """The head as it was at the epoch with the best adversarial accuracy on what was watched, and that accuracy."""

    network: "OnLayer"
    epoch: int
    adversarial: float


class Fitted(NamedTuple):
    """The head after the last epoch, and by name of what was watched the head where it was best."""

    last: "OnLayer"
    best: Mapping[str, Stopped]


class OnLayer(nn.Module):
    """A head on a frozen layer, as one classifier: images (N, C, H, W) to logits (N, K)."""

    def __init__(self, layer: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head

    def forward(self, images: Images) -> Tensor:
        """Return the logits (N, K) that the head gives the layer's features."""
        logits: Tensor = self.head(self.layer(images))
        return logits


def train_standard(
    layer: nn.Module, images: Images, labels: Labels, classes: int, training: HeadTraining
) -> dict[HeadName, OnLayer]:
    """Return the standard linear head and the one with a hidden layer, on features of images (M, C, H, W) as they are.

    Raises UsageError where there are no images.
    """
    if len(images) == 0:
        raise UsageError("0 images train no head: at least 1 is needed")
    features = _features(layer, images, training.batch_size)
    return {
        "slf": OnLayer(layer, fit_linear(features, labels, classes, training.probe)).eval(),
        "mlp": OnLayer(layer, fit_hidden(features, labels, classes, training.probe)).eval(),
    }


def train_adversarial(
    start: OnLayer, images: Images, labels: Labels, threat: ThreatModel, training: HeadTraining
) -> OnLayer:
    """Return a linear head trained on images that PGD moved against it inside a threat model, from a standard one.

    The layer stays as it is: only the head learns. Source: Madry et al. 2018.
    """
    head = copy.deepcopy(start.head).requires_grad_(True)
    learner = OnLayer(start.layer, head).eval()
    optimiser = torch.optim.AdamW(head.parameters(), training.learning_rate, weight_decay=1e-4)
    order, starts = (
        keyed_generator(training.seed, Purpose.HEAD_ORDER),
        keyed_generator(training.seed, Purpose.HEAD_STARTS),
    )
    batches = max(1, len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, training.learning_rate, training.epochs * batches)
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(images), generator=order).to(images.device).tensor_split(batches):
            hardest = never_done(cross_entropy_objective(learner, labels[chosen]))
            moved = minimise(hardest, images[chosen], threat, training.pgd, starts).images
            with torch.no_grad():
                seen = start.layer(moved)
            optimiser.zero_grad()
            F.cross_entropy(head(seen), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    head.requires_grad_(False)
    return learner


@torch.no_grad()
def _features(layer: nn.Module, images: Images, batch_size: int) -> Tensor:
    return torch.cat([layer(batch) for batch in images.split(batch_size)])


def make_head(features: int, fit: HeadFit) -> nn.Module:
    """Return a fresh head for features (N, D), drawn from the seed alone."""
    draws = keyed_generator(fit.seed, Purpose.HEAD_WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=draws)))
        if fit.kind == "linear":
            return nn.Linear(features, fit.classes)
        middle = (_Dropout(fit.dropout, draws), nn.BatchNorm1d(fit.hidden), nn.ReLU())
        return nn.Sequential(nn.Linear(features, fit.hidden), *middle, nn.Linear(fit.hidden, fit.classes))


def fit_head(
    layer: nn.Module,
    images: Images,
    labels: Labels,
    fit: HeadFit,
    watched: Mapping[str, Watched] | None = None,
    progress: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> Fitted:
    """Return a head trained on a frozen layer, and the ones that early stopping on each of `watched` chooses.

    Images (M, C, H, W) with labels (M,). The layer stays as it is, in eval mode; a robust head sees features of images
    that PGD moved through head and layer, both in eval mode. `watched` is the caller's to name: a head chosen on the
    images it is then reported on is flattered. Raises UsageError for fewer than two images.

    Source: Zhu, Zhang & Evans 2020, section 5.2 (heads and their rows "E.S.").
    """
    if len(images) < 2:
        raise UsageError(f"{len(images)} images train no head: at least 2 are needed")
    learner = _Learner(layer.eval(), images, labels, fit)
    best: dict[str, Stopped] = {}
    for epoch in range(fit.epochs):
        progress(epoch, learner.epoch(epoch))
        if (epoch + 1) % fit.every == 0 or epoch + 1 == fit.epochs:
            for name, sample in (watched or {}).items():
                share = _adversarial(learner.network, sample, fit)
                if name not in best or share > best[name].adversarial:
                    best[name] = Stopped(learner.copied(), epoch, share)
    return Fitted(learner.copied(), best)


class _Learner:
    """A head in training, and what it learns from: features made once, or images moved anew for every batch."""

    def __init__(self, layer: nn.Module, images: Images, labels: Labels, fit: HeadFit) -> None:
        self.images, self.labels, self.fit = images, labels, fit
        self.features = _features(layer, images, fit.batch_size)
        self.network = OnLayer(layer, make_head(self.features.shape[1], fit).to(images.device))
        self.optimiser = torch.optim.Adam(self.network.head.parameters(), fit.learning_rate)
        self.batches = max(1, len(images) // fit.batch_size)

    def epoch(self, number: int) -> float:
        """Learn from every image once and return the mean loss; the head is in eval mode before and after."""
        order = torch.randperm(len(self.images), generator=keyed_generator(self.fit.seed, Purpose.HEAD_ORDER, number))
        starts, total = keyed_generator(self.fit.seed, Purpose.HEAD_STARTS, number), 0.0
        for chosen in order.to(self.images.device).tensor_split(self.batches):
            seen = self._seen(chosen, starts)
            self.network.head.train()
            loss = F.cross_entropy(self.network.head(seen), self.labels[chosen])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            self.network.head.eval()
            total += float(loss.detach()) * len(chosen)
        return total / len(self.images)

    def copied(self) -> OnLayer:
        """Return the network with a frozen copy of the head as it is now."""
        head = make_head(self.features.shape[1], self.fit).to(self.images.device)
        head.load_state_dict(self.network.head.state_dict())
        return OnLayer(self.network.layer, head.requires_grad_(False)).eval()

    def _seen(self, chosen: Tensor, starts: torch.Generator) -> Features:
        if self.fit.threat is None:
            return self.features[chosen]
        self.network.head.eval()
        hardest = never_done(cross_entropy_objective(self.network, self.labels[chosen]))
        moved = minimise(hardest, self.images[chosen], self.fit.threat, self.fit.pgd, starts).images
        with torch.no_grad():
            features: Features = self.network.layer(moved)
        return features


def _adversarial(network: OnLayer, sample: Watched, fit: HeadFit) -> float:
    """Return the share of images that PGD leaves right."""
    objective = cross_entropy_objective(network, sample.labels)
    draws = keyed_generator(fit.seed, Purpose.HEAD_VALIDATION)
    found = minimise(objective, sample.images, sample.threat, fit.pgd, draws)
    return 1 - float(found.done.float().mean())


class _Dropout(nn.Module):
    """Dropout with masks from our own generator: nn.Dropout takes its from the global one."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.share, self.generator = share, generator

    def forward(self, values: Tensor) -> Tensor:
        if not (self.training and self.share):
            return values
        kept = torch.rand(values.shape, generator=self.generator).to(values) >= self.share
        return values * kept / (1 - self.share)
