"""Attacks on a classifier's label: objectives for `pgd.minimise`, smallest where the attack wins, and their tiers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.pgd import PGD, Found, minimise
from audit.adversary.threat import L1, ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.types import Images, Judged, Labels, Objective


def margin(logits: Tensor, labels: Labels) -> Tensor:
    """Return the true class's logit less the largest other one, (N,): negative exactly where the label is lost.

    A tie counts as lost: it is not a correct answer either. A NaN margin is above nothing, so lost too.
    """
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return true - others


def cross_entropy_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that maximises the cross-entropy of the true label."""

    def objective(images: Images, index: Tensor) -> Judged:
        logits, wanted = network(images), labels[index]
        value = -F.cross_entropy(logits, wanted, reduction="none")
        return Judged(value, ~(margin(logits.detach(), wanted) > 0))

    return objective


def margin_objective(network: nn.Module, labels: Labels) -> Objective:
    """Return the objective that minimises the margin; it keeps a gradient where cross-entropy saturates.

    Source: Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", f6 in section 5.1.
    """

    def objective(images: Images, index: Tensor) -> Judged:
        value = margin(network(images), labels[index])
        return Judged(value, ~(value.detach() > 0))

    return objective


def targeted_margin_objective(network: nn.Module, labels: Labels, targets: Labels) -> Objective:
    """Return the objective that minimises the true class's logit less one other's; any lost label ends it.

    `labels` and `targets` are (N,). Source: Gowal et al. 2019, "An Alternative Surrogate Loss for PGD-based
    Adversarial Testing", section 3.
    """

    def objective(images: Images, index: Tensor) -> Judged:
        logits = network(images)
        true, other = (logits.gather(1, which[index][:, None]).squeeze(1) for which in (labels, targets))
        return Judged(true - other, ~(margin(logits.detach(), labels[index]) > 0))

    return objective


def never_done(objective: Objective) -> Objective:
    """Return the objective without an end: for who wants the hardest image in the ball, not the first that is lost."""

    def unending(images: Images, index: Tensor) -> Judged:
        value = objective(images, index).value
        return Judged(value, torch.zeros(len(images), dtype=torch.bool, device=images.device))

    return unending


_WIDER = ((6.0, 0.3), (2.5, 0.3))  # balls to walk in from, in radii, and the share of the steps spent in each
_WALKED = 10  # a search of fewer steps has none to spare


def search(objective: Objective, clean: Images, threat: ThreatModel, pgd: PGD, generator: torch.Generator) -> Found:
    """Return what `pgd.minimise` does; in the l1 ball each start is walked in from wider balls, within as many steps.

    The best l1 changes lie in few pixels, and which ones no gradient at the clean image tells: a descent in the ball
    itself stays with those it began with. Source: Croce & Hein 2021, "Mind the Box: l1-APGD for Sparse Adversarial
    Attacks on Image Classifiers", section 3.4 (the radii, and the sparse starts, are ours).
    """
    if not isinstance(threat, L1) or pgd.steps < _WALKED or len(clean) == 0:
        return minimise(objective, clean, threat, pgd, generator)
    best = _walked_in(
        objective, clean, threat, pgd, threat.sparse_start(clean, generator) if pgd.random_start else clean
    )
    for restart in range(1, pgd.restarts):
        start, left = threat.sparse_start(clean, generator), (~best.done).nonzero().flatten()
        if len(left) == 0:
            break
        again = _walked_in(_of_some(objective, left), clean[left], threat, pgd, start[left])
        best = _better(best, again, left, restart * (pgd.steps + 1))
    return best


def _walked_in(objective: Objective, clean: Images, threat: L1, pgd: PGD, start: Images) -> Found:
    """Return the best image of the ball itself, after searches in wider balls."""
    nobody, spent, passes, forwards = torch.Generator(), 0, 0, 0
    for radii, share in _WIDER:
        wider, steps = replace(threat, eps=radii * threat.eps), int(share * pgd.steps)
        part = replace(pgd, steps=steps, random_start=False, restarts=1)
        found = minimise(never_done(objective), clean, wider, part, nobody, wider.project(start, clean))
        start, spent = found.images, spent + steps
        passes, forwards = passes + found.passes, forwards + found.forwards
    part = replace(pgd, steps=pgd.steps - spent, random_start=False, restarts=1)
    found = minimise(objective, clean, threat, part, nobody, threat.project(start, clean))
    step = torch.where(found.step < 0, found.step, found.step + spent)
    return found._replace(step=step, passes=passes + found.passes, forwards=forwards + found.forwards)


def _of_some(objective: Objective, some: Tensor) -> Objective:
    return lambda images, index: objective(images, some[index])


def _better(best: Found, again: Found, left: Tensor, before: int) -> Found:
    """Put what a further start found for some images, by their indices (A,), where it is better."""
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
    """One search for images that are still right: a loss, how hard, and for targeted margins how many classes."""

    loss: str
    pgd: PGD
    targets: int = 0

    def __post_init__(self) -> None:
        if self.loss not in (*LOSSES, "targeted"):
            raise UnknownNameError("loss", self.loss, (*LOSSES, "targeted"))
        if (self.loss == "targeted") != (self.targets > 0):
            raise UsageError(f"targets {self.targets!r} must be at least 1 for the targeted loss, and 0 for others")

    @property
    def name(self) -> str:
        """Return the stage as tables show it, such as `margin-40x2` or `targeted-20x3`."""
        times = self.targets or self.pgd.restarts
        return f"{self.loss}-{self.pgd.steps}" + (f"x{times}" if times > 1 else "")


@dataclass(frozen=True)
class LabelAttack:
    """Which attack measures adversarial accuracy: stages in turn, each on the images that are still right.

    Then `noise` random corners of the ball, and an attack with `queries` queries an image: Square in l-inf, the
    search by differences of `audit.adversary.finite_differences` in other norms. These follow no gradient, so what they break beside the
    others says that the gradients misled. Last the attacks of `borrowed`, by their names in `audit.adversary.external`. `fast`
    lets searches run on a folded copy of the network; every verdict is the network's own, so it decides cost only.
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
            raise UsageError("stages () must be at least one: an attack without a search measures nothing")

    @property
    def name(self) -> str:
        """Return the attack as tables of l-inf show it, such as `ce-10+margin-10+noise-100`."""
        return self.name_in("linf")

    def name_in(self, norm: str) -> str:
        """Return the attack as tables show it where images are moved in a norm."""
        return "+".join(self.names_in(norm))

    def names_in(self, norm: str) -> tuple[str, ...]:
        """Return the name of each part, in the order they run in a norm."""
        asking = self.asking_in(norm)
        blind = [f"noise-{self.noise}"] if self.noise else []
        return (*(stage.name for stage in self.stages), *blind, *([asking] if asking else []), *self.borrowed)

    def asking_in(self, norm: str) -> str:
        """Return the name of the part that asks for outputs only, such as `square-300`; empty where there is none."""
        return f"{'square' if norm == 'linf' else 'differences'}-{self.queries}" if self.queries else ""

    def version_in(self, norm: str) -> int:
        """Return the version of what the attack does in a norm: raised where its numbers change in that norm alone."""
        return self.version + (1 if self.queries and norm != "linf" else 0) + (1 if self.stages and norm == "l1" else 0)

    @property
    def batch_size(self) -> int:
        """Return how many images go through the network at once."""
        return self.stages[0].pgd.batch_size if self.stages else PGD.batch_size


def two_losses(cross_entropy: PGD, margins: PGD | None = None) -> LabelAttack:
    """Return PGD on the cross-entropy, then on the margin for survivors; by default from the clean image.

    The second loss breaks what more steps and restarts of the first do not.
    """
    second = margins or PGD(cross_entropy.steps, cross_entropy.relative_step, random_start=False,
                            restarts=cross_entropy.restarts, batch_size=cross_entropy.batch_size)  # fmt: skip
    return LabelAttack((Stage("ce", cross_entropy), Stage("margin", second)))


_PAIR = two_losses(PGD(10, 0.25)).stages
AUDIT = LabelAttack(
    (*_PAIR, Stage("margin", PGD(40, 0.1, restarts=2)), Stage("targeted", PGD(20, 0.15), targets=3)),
    noise=100,
    queries=300,
)
TIERS = {
    "smoke": LabelAttack(_PAIR),
    "audit": AUDIT,
    "leaderboard": replace(AUDIT, borrowed=("autoattack-standard",)),
}
