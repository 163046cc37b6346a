"""Attacks on the label of a classifier: objectives to minimise, the l1 search, and the attack tiers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.pgd import PGD, SearchResult, minimise
from audit.adversary.threat import L1, ThreatModel
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
        logits, true = network(images), labels[index]
        value = -F.cross_entropy(logits, true, reduction="none")
        return ObjectiveValue(value, ~(margin(logits.detach(), true) > 0))

    return objective


def margin_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that minimises the margin, whose gradient does not vanish where cross-entropy saturates.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f6 in section 5.1.
    """

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        value = margin(network(images), labels[index])
        return ObjectiveValue(value, ~(value.detach() > 0))

    return objective


def targeted_margin_objective(network: nn.Module, labels: Labels, targets: Labels) -> Objective:
    """Return the objective that minimises the logit of the true class minus that of a target class.

    `labels` and `targets` are (N,). An image is done once any other class wins.

    Source: Gowal et al. 2019, "An Alternative Surrogate Loss for PGD-based
    Adversarial Testing", section 3.
    """

    def objective(images: Images, index: Tensor) -> ObjectiveValue:
        logits = network(images)
        true, other = (logits.gather(1, which[index][:, None]).squeeze(1) for which in (labels, targets))
        return ObjectiveValue(true - other, ~(margin(logits.detach(), labels[index]) > 0))

    return objective


def without_early_stopping(objective: Objective) -> Objective:
    """Return the objective with no image ever done: a search finds the lowest value in the ball, not a first error."""

    def unstopped(images: Images, index: Tensor) -> ObjectiveValue:
        value = objective(images, index).value
        return ObjectiveValue(value, torch.zeros(len(images), dtype=torch.bool, device=images.device))

    return unstopped


_WIDER_BALLS = ((6.0, 0.3), (2.5, 0.3))  # radii in multiples of eps, with the share of the steps spent in each ball
_FEWEST_STEPS = 10  # shorter searches stay in the ball itself


def shrinking_ball_search(
    objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD, generator: torch.Generator
) -> SearchResult:
    """Minimise an objective as `pgd.minimise` does; in l1, first in wider balls, within the same number of steps.

    The best l1 perturbations change few pixels, which the gradient at the clean image does not single out: a descent
    inside the ball keeps the pixels it starts with.

    Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers", section 3.4
    (the radii, and the sparse starts, are ours).
    """
    if not isinstance(threat, L1) or pgd.steps < _FEWEST_STEPS or len(clean) == 0:
        return minimise(objective, clean, threat, pgd, generator)
    start = threat.sparse_start(clean, generator) if pgd.random_start else clean
    best = _descend_through_balls(objective, clean, threat, pgd, start)
    for restart in range(1, pgd.restarts):
        start, left = threat.sparse_start(clean, generator), (~best.done).nonzero().flatten()
        if len(left) == 0:
            break
        again = _descend_through_balls(_restricted(objective, left), clean[left], threat, pgd, start[left])
        best = _merge(best, again, left, restart * (pgd.steps + 1))
    return best


def _descend_through_balls(objective: Objective, clean: Images, threat: L1, pgd: PGD, start: Images) -> SearchResult:
    """Search in ever smaller balls, each from the end of the one before, and return the best iterates of the last."""
    unused, spent, passes, forwards = torch.Generator(), 0, 0, 0
    for radii, share in _WIDER_BALLS:
        wider, steps = replace(threat, eps=radii * threat.eps), int(share * pgd.steps)
        part = replace(pgd, steps=steps, random_start=False, restarts=1)
        found = minimise(without_early_stopping(objective), clean, wider, part, unused, wider.project(start, clean))
        start, spent = found.images, spent + steps
        passes, forwards = passes + found.passes, forwards + found.forwards
    part = replace(pgd, steps=pgd.steps - spent, random_start=False, restarts=1)
    found = minimise(objective, clean, threat, part, unused, threat.project(start, clean))
    step = torch.where(found.step < 0, found.step, found.step + spent)
    return found._replace(step=step, passes=passes + found.passes, forwards=forwards + found.forwards)


def _restricted(objective: Objective, subset: Tensor) -> Objective:
    return lambda images, index: objective(images, subset[index])


def _merge(best: SearchResult, again: SearchResult, left: Tensor, before: int) -> SearchResult:
    """Update the best iterates with the better ones of a restart on the images of indices `left` (A,)."""
    better = again.done | (again.value < best.value[left])
    where = left[better]
    best.images[where], best.value[where], best.done[where] = (
        again.images[better],
        again.value[better],
        again.done[better],
    )
    best.step[where] = torch.where(again.step < 0, again.step, again.step + before)[better]
    return best._replace(passes=best.passes + again.passes, forwards=best.forwards + again.forwards)


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


@dataclass(frozen=True)
class LabelAttack:
    """Settings of the attack that measures adversarial accuracy: a sequence of searches, each on the survivors.

    After the gradient-based `stages` come `noise` random vertices of the ball, then a gradient-free attack with
    `queries` queries an image: Square in l-inf, `finite_differences` in other norms. Images that only these break are
    a sign of gradient masking. Last come the attacks `borrowed` from other packages, named as in `external`. `fast`
    runs searches on a fused copy of the network; images are always evaluated on the network itself, so that it affects
    cost only. Raises UsageError for negative counts, or for an attack with no search.
    """

    stages: tuple[Stage, ...] = ()
    noise: int = 0
    queries: int = 0
    borrowed: tuple[str, ...] = ()
    fast: bool = True
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
        return (*(stage.name for stage in self.stages), *noise, *gradient_free, *self.borrowed)

    def gradient_free_name(self, norm: str) -> str:
        """Return the name of the gradient-free attack in a norm, such as `square-300`; empty if there is none."""
        return f"{'square' if norm == 'linf' else 'differences'}-{self.queries}" if self.queries else ""

    def version_in(self, norm: str) -> int:
        """Return the version of the attack in a norm, which increases when results in that norm change."""
        return self.version + (1 if self.queries and norm != "linf" else 0) + (1 if self.stages and norm == "l1" else 0)

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
)
TIERS = {
    "smoke": LabelAttack(_SMOKE),
    "audit": AUDIT,
    "leaderboard": replace(AUDIT, borrowed=("autoattack-standard",)),
}
