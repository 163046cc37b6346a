"""Attacks on the label of a classifier: objectives to minimise, stages and the attack tiers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.passes import outputs_of
from audit.adversary.pgd import PGD, Balls, FallingPGD, SearchResult, restarted_search, shrinking_ball_search
from audit.adversary.threat import L1, ThreatModel, start_at_any_distance
from audit.errors import UnknownNameError, UsageError
from audit.types import Images, Labels, Objective, ObjectiveValue


def margin(logits: Tensor, labels: Labels) -> Tensor:
    """Return the logit of the true class minus the largest other logit, (N,), from logits (N, K) and labels (N,).

    An image is misclassified unless its margin is positive: ties and NaN count as misclassified.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true - others


def cross_entropy_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that maximises the cross-entropy of the true labels (N,)."""

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        logits, true = outputs_of(network, images), labels[index]
        value = -F.cross_entropy(logits, true, reduction="none")
        return ObjectiveValue(value, ~(margin(logits.detach(), true) > 0))

    return objective


def margin_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that minimises the margin, whose gradient does not vanish where cross-entropy saturates.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f6 in section 5.1.
    """

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        value = margin(outputs_of(network, images), labels[index])
        return ObjectiveValue(value, ~(value.detach() > 0))

    return objective


def targeted_margin_objective(network: nn.Module, labels: Labels, targets: Labels) -> Objective:
    """Return the objective that minimises the logit of the true class minus that of a target class.

    `labels` and `targets` are (N,). An image is done once any other class wins.

    Source: Gowal et al. 2019, "An Alternative Surrogate Loss for PGD-based
    Adversarial Testing", section 3.
    """

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        logits = outputs_of(network, images)
        true, other = (logits.gather(1, which[index][:, None]).squeeze(1) for which in (labels, targets))
        return ObjectiveValue(true - other, ~(margin(logits.detach(), labels[index]) > 0))

    return objective


Objectives = Callable[[str], Objective]
"""Maps the name of a loss, `ce`, `margin` or `targeted`, to its objective."""

LOSSES: dict[str, Callable[[nn.Module, Labels], Objective]] = {
    "ce": cross_entropy_objective,
    "margin": margin_objective,
}


@dataclass(frozen=True)
class Stage:
    """One search of an attack: loss, PGD settings, and for the targeted loss the number of target classes.

    Raises UnknownNameError for an unknown loss, UsageError for a number of targets that does not fit the loss.
    """

    loss: str
    pgd: PGD
    targets: int = 0

    def __post_init__(self) -> None:
        if self.loss not in (*LOSSES, "targeted"):
            raise UnknownNameError("loss", self.loss, (*LOSSES, "targeted"))
        if (self.loss == "targeted") != (self.targets > 0):
            raise UsageError(
                f"targets {self.targets!r} must be at least 1 for the targeted loss, and 0 for other losses"
            )

    @property
    def name(self) -> str:
        """Return the stage's name in tables, such as `margin-40x2` or `targeted-20x3`."""
        times = self.targets or self.pgd.restarts
        return f"{self.loss}-{self.pgd.steps}" + (f"x{times}" if times > 1 else "")

    def search(
        self, objectives: Objectives, clean: Images, threat: ThreatModel, generator: torch.Generator
    ) -> SearchResult:
        """Return the best iterates (N, C, H, W) of the loss around clean images."""
        return shrinking_ball_search(objectives(self.loss), clean, threat, self.pgd, generator)


@dataclass(frozen=True)
class ThoroughStage(Stage):
    """A stage in l2 or l1 that descends through `balls`: first from the clean images, then from random ones.

    Without a random start it has no other start. In both norms a descent inside the ball ends in a local minimum on the
    side of the ball that it first reaches; images from wider balls are projected onto other sides.
    """

    balls: Balls = ()

    @property
    def name(self) -> str:
        """Return the stage's name in tables, such as `margin-60x2-outside`, or `ce-100-inside` for the ball alone."""
        return f"{super().name}-{'outside' if self.balls else 'inside'}"

    def search(
        self, objectives: Objectives, clean: Images, threat: ThreatModel, generator: torch.Generator
    ) -> SearchResult:
        """Return the best iterates (N, C, H, W) of the loss around clean images."""
        first = partial(start_at_any_distance, threat) if self.pgd.random_start else (lambda same, _: same)
        return restarted_search(objectives(self.loss), (clean, threat, self.balls), self.pgd, generator, first)


@dataclass(frozen=True)
class BoundaryStage(Stage):
    """A stage in l2 or l1 from noisy images far outside the ball: walks along the decision boundary towards its centre.

    In l1 one run of four starts at few random pixels instead, and all end in descents that change few pixels. Steps
    adapt their length. The loss is the margin in l2, and in l1 the one that runs descend on before the margin.
    """

    @property
    def name(self) -> str:
        """Return the stage's name in tables, such as `margin-40x24-boundary`."""
        return f"{super().name}-boundary"

    def search(
        self, objectives: Objectives, clean: Images, threat: ThreatModel, generator: torch.Generator
    ) -> SearchResult:
        """Return the nearest adversarial images (N, C, H, W) in l2, the best iterates in l1."""
        from audit.adversary.thorough.boundary import boundary_search
        from audit.adversary.thorough.sparse import sparse_search

        if isinstance(threat, L1):
            return sparse_search(objectives, clean, threat, self.pgd, generator)
        return boundary_search(objectives(self.loss), clean, threat, self.pgd, generator)


@dataclass(frozen=True)
class NearStage(Stage):
    """A stage on images of at most `reach`; with `resume` its first run starts at the best images found so far.

    The reach of an image is the margin that is left, divided by the margin that was lost so far (`staged.reach`).
    """

    reach: float = inf
    resume: bool = False

    @property
    def name(self) -> str:
        """Return the stage's name in tables, such as `margin-10` or `targeted-32x2x3-near`."""
        runs = f"x{self.pgd.restarts}" if self.targets and self.pgd.restarts > 1 else ""
        return super().name + runs + ("" if self.reach == inf else "-near")


# chosen by the images that APGD breaks and the stages leave: images 500 to 1,600 of a CIFAR-10 test set, six networks
_LONG, _THRICE = FallingPGD(32, 2.0), FallingPGD(32, 2.0, restarts=3)
_BY_REACH: tuple[Stage, ...] = (
    NearStage("ce", PGD(1, 1.0, random_start=False)),
    NearStage("ce", PGD(3, 0.7, random_start=False), resume=True),
    NearStage("margin", FallingPGD(10, 1.0, random_start=False, last_step=0.1), resume=True),
    NearStage("targeted", FallingPGD(8, 1.0, random_start=False, last_step=0.1), targets=3, reach=0.4),
    NearStage("margin", _LONG, reach=0.15),
    NearStage("ce", _LONG, reach=0.1),
    NearStage("targeted", _LONG, targets=3, reach=0.06),
    NearStage("ce", _THRICE, reach=0.06),
    NearStage("targeted", _THRICE, targets=2, reach=0.06),
    NearStage("margin", _THRICE, reach=0.06),
)
_TWICE: Balls = ((3.0, 0.3), (1.5, 0.3))
_THOROUGH = (
    ThoroughStage("margin", PGD(60, 0.1, random_start=False, restarts=3), balls=_TWICE),
    ThoroughStage("ce", PGD(60, 0.1, random_start=False, restarts=2), balls=_TWICE),
    ThoroughStage("targeted", PGD(40, 0.1, random_start=False), targets=4, balls=_TWICE),
    ThoroughStage("margin", PGD(100, 0.1, restarts=4)),
)
_BOUNDARY: dict[str, Stage] = {
    "l2": BoundaryStage("margin", PGD(40, restarts=24)),
    "l1": BoundaryStage("ce", PGD(50, restarts=16)),
}
"""Searches in l2 and l1 on images that all others of an attack leave."""


@dataclass(frozen=True)
class LabelAttack:
    """Settings of the attack that measures adversarial accuracy: a sequence of searches, each on the survivors.

    After the gradient-based `stages` come `noise` random vertices of the ball, then a gradient-free attack with
    `queries` queries an image: Square in l-inf, `finite_differences` in other norms. Images that only these break are
    a sign of gradient masking. Then come thorough searches in l2 and l1, and last the attacks `borrowed` from other
    packages, named as in `external`. `fast` runs searches on a fused copy of the network; images are always evaluated
    on the network itself, so that it affects cost only. With `by_reach` the stages in l-inf are others, which give up
    images out of reach. Raises UsageError for negative counts, or for an attack with no search.
    """

    stages: tuple[Stage, ...] = ()
    noise: int = 0
    queries: int = 0
    borrowed: tuple[str, ...] = ()
    fast: bool = True
    by_reach: bool = False
    version: int = 2

    def __post_init__(self) -> None:
        for name in ("noise", "queries"):
            if getattr(self, name) < 0:
                raise UsageError(f"attack {name} {getattr(self, name)!r} must be at least 0")
        if not self.names_in("linf"):
            raise UsageError(
                "stages () must be at least one: an attack needs a stage, noise, queries or an external attack"
            )

    @property
    def name(self) -> str:
        """Return the attack's name in the l-inf norm, such as `ce-10+margin-10+noise-100`."""
        return self.name_in("linf")

    def name_in(self, norm: str) -> str:
        """Return the attack's name in a norm."""
        return "+".join(self.names_in(norm))

    def names_in(self, norm: str) -> tuple[str, ...]:
        """Return the names of all stages in a norm, in the order in which they run."""
        noise = [f"noise-{self.noise}"] if self.noise else []
        gradient_free = [self.gradient_free_name(norm)] if self.queries else []
        thorough = [stage.name for stage in self.thorough_in(norm)]
        return (*(stage.name for stage in self.stages_in(norm)), *noise, *gradient_free, *thorough, *self.borrowed)

    def reaches_in(self, norm: str) -> bool:
        """Return whether images out of reach are given up in a norm."""
        return self.by_reach and norm == "linf"

    def stages_in(self, norm: str) -> tuple[Stage, ...]:
        """Return the gradient-based stages in a norm that precede random noise."""
        return _BY_REACH if self.reaches_in(norm) else self.stages

    def thorough_in(self, norm: str) -> tuple[Stage, ...]:
        """Return the stages of attacks with queries in l2 and l1 that follow the gradient-free attack.

        They come after it because their random starts also break images of networks whose gradients are masked.
        """
        return (*_THOROUGH, _BOUNDARY[norm]) if self.stages and self.queries and norm != "linf" else ()

    def gradient_free_name(self, norm: str) -> str:
        """Return the name of the gradient-free attack in a norm, such as `square-300`; empty if there is none."""
        return f"{'square' if norm == 'linf' else 'differences'}-{self.queries}" if self.queries else ""

    def version_in(self, norm: str) -> int:
        """Return the version of the attack in a norm, which increases when results in that norm change."""
        raised = bool(self.queries and norm != "linf") + bool(self.stages and norm == "l1") + self.reaches_in(norm)
        return self.version + raised + 2 * bool(self.thorough_in(norm))

    @property
    def batch_size(self) -> int:
        """Return the batch size of forward passes."""
        return self.stages[0].pgd.batch_size if self.stages else PGD.batch_size


def two_losses(cross_entropy: PGD, margins: PGD | None = None) -> LabelAttack:
    """Return PGD on the cross-entropy, then on the margin; by default with equal settings, from the clean image.

    The margin breaks images that more steps and restarts on the cross-entropy do not.
    """
    second = margins or replace(cross_entropy, random_start=False)
    return LabelAttack((Stage("ce", cross_entropy), Stage("margin", second)))


_SMOKE = two_losses(PGD(10, 0.25)).stages
AUDIT = LabelAttack(
    (*_SMOKE, Stage("margin", PGD(40, 0.1, restarts=2)), Stage("targeted", PGD(20, 0.15), targets=3)),
    noise=100,
    queries=300,
    by_reach=True,
)
TIERS = {
    "smoke": LabelAttack(_SMOKE),
    "audit": AUDIT,
    "leaderboard": replace(AUDIT, borrowed=("autoattack-standard",)),
}
