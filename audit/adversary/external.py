"""Attacks of other packages by name, and our gradient-free search under the same contract.

Results of pyautoattack depend on the batch: it draws random starts for 250 images at once and proposes the same
squares for all of them, so that equal results need equal images in equal order and an equal seed. HopSkipJump runs
image by image and does not.
"""

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch
from torch import nn

from audit.adversary.external_adapter import ExternalAttack, PassCounter, required_package
from audit.adversary.finite_differences import FiniteDifferences
from audit.adversary.label_attack import margin
from audit.adversary.threat import THREATS, ThreatModel
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

_NOISE_STARTS = 64  # noise images among which HopSkipJump looks for a start


@dataclass(frozen=True)
class AutoAttack(ExternalAttack):
    """Stages of AutoAttack, each on the survivors: 100 iterations of APGD, 100 of FAB, then Square with `queries`.

    The DLR loss divides by the third logit, its targeted form by the fourth. So with three classes the untargeted form
    replaces the targeted one, and with two only the cross-entropy is left; at most nine classes are targeted. Raises
    UnknownNameError for an unknown stage, UsageError for no stage or no queries.

    Source: Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
    Parameter-free Attacks"; Square: Andriushchenko et al. 2020; FAB: Croce & Hein 2020.
    """

    stages: tuple[str, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")
    queries: int = 5000

    library: ClassVar[str] = "pyautoattack"
    norms: ClassVar[dict[str, str]] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
    legal_stages: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError(f"no stages of AutoAttack are named; legal: {', '.join(self.legal_stages)}")
        for stage in self.stages:
            if stage not in self.legal_stages:
                raise UnknownNameError("stage of AutoAttack", stage, self.legal_stages)
        if self.queries < 1:
            raise UsageError(f"queries {self.queries!r} of Square must be at least 1")

    def _check_threat(self, threat: ThreatModel) -> None:
        if self.stages == ("square",) and threat.norm != "linf":
            raise UsageError(
                f"Square alone attacks in 'linf', not in {threat.norm!r}, where it needs two to three times the "
                "radius; use `differences`"
            )
        super()._check_threat(threat)

    def stages_for(self, num_classes: int) -> list[str]:
        """Return the stages for a number of classes; raises InvalidModelError for fewer than two classes."""
        if num_classes < 2:
            raise InvalidModelError(f"the network has {num_classes} output: an attack on the label needs 2 or more")
        allowed = [stage if stage != "apgd-t" or num_classes > 3 else "apgd-dlr" for stage in self.stages]
        allowed = [stage if stage != "apgd-dlr" or num_classes > 2 else "apgd-ce" for stage in allowed]
        return list(dict.fromkeys(allowed))

    def _search(self, network: PassCounter, images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Images:
        with required_package("pyautoattack"):
            library = import_module("pyautoattack")
        classes = network.num_classes(images)
        attack = library.AutoAttack(
            network, norm=self.norms[threat.norm], eps=threat.eps, seed=seed, device=images.device, version="standard"
        )
        attack.attacks_to_run = self.stages_for(classes)
        attack.square.n_queries = self.queries
        attack.fab.n_target_classes = min(attack.fab.n_target_classes, classes - 1)
        attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, classes - 1)
        # silence its warnings of zero gradients, randomised networks and probabilities: our own checks cover them
        silent = logging.Logger("silent", logging.CRITICAL + 1)
        attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = silent
        found: Images = attack.run_standard_evaluation(images, labels)[0]
        return found


@dataclass(frozen=True)
class HopSkipJump(ExternalAttack):
    """HopSkipJump, a decision-based attack, for networks with masked gradients and scores.

    `steps` of the walk along the boundary: 50 take about 25,000 forward passes an image. Images run one by one,
    because Foolbox scales the gradient estimate by the norm over the whole batch. A walk starts at the nearest of 64
    noise images that the network puts in another class, else at the nearest such image of the given ones; an image
    without a start stays clean. Raises UsageError for fewer than one step.

    Source: Chen, Jordan & Wainwright 2020, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack".
    """

    steps: int = 50

    library: ClassVar[str] = "foolbox"
    norms: ClassVar[dict[str, str]] = {"linf": "linf", "l2": "l2"}

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps {self.steps!r} of HopSkipJump must be at least 1")

    def _search(self, network: PassCounter, images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Images:
        with required_package("foolbox"):
            foolbox, attacks = import_module("foolbox"), import_module("foolbox.attacks")
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        attack = attacks.HopSkipJumpAttack(steps=self.steps, constraint=self.norms[threat.norm])
        network.num_classes(images)
        starts = _starting_points(network, images, labels, seed)
        found = images.clone()
        for i in (~starts.isnan().flatten(1).any(1)).nonzero().flatten().tolist():
            torch.manual_seed(seed)  # inside fork_rng: every image has the same draws, whatever its place
            criterion = foolbox.criteria.Misclassification(labels[i : i + 1])
            found[i] = attack.run(model, images[i : i + 1], criterion, starting_points=starts[i : i + 1])[0]
        # results lie on the boundary up to rounding: move them outwards by a thousandth for a clear verdict
        return images + 1.001 * (found - images)


@dataclass(frozen=True)
class FiniteDifferenceAttack(ExternalAttack):
    """The gradient-free search of `audit.adversary.finite_differences`, with `queries` forward passes an image."""

    queries: int = 300

    library: ClassVar[str] = "the search by differences"
    norms: ClassVar[dict[str, str]] = {norm: norm for norm in THREATS}

    def _check_threat(self, threat: ThreatModel) -> None:
        """Accept every norm and pixel range."""

    def _search(
        self,
        network: PassCounter,
        images: Images,
        labels: Labels,
        threat: ThreatModel,
        seed: int,  # noqa: ARG002
    ) -> Images:
        network.num_classes(images)
        return FiniteDifferences(self.queries).search(network, images, labels, threat).images


EXTERNAL_ATTACKS: dict[str, ExternalAttack] = {
    "autoattack-standard": AutoAttack(),
    "apgd": AutoAttack(("apgd-ce", "apgd-t")),
    "fab": AutoAttack(("fab-t",)),
    "square": AutoAttack(("square",), queries=300),
    "differences": FiniteDifferenceAttack(),
    "hopskipjump": HopSkipJump(),
}


def gradient_free_attack(threat: ThreatModel, queries: int) -> ExternalAttack:
    """Return the gradient-free attack with `queries` queries an image: Square in l-inf, differences in other norms."""
    return AutoAttack(("square",), queries) if threat.norm == "linf" else FiniteDifferenceAttack(queries)


def external_attack(name: str) -> ExternalAttack:
    """Return an external attack by its name; raises UnknownNameError with the nearest legal names."""
    if name not in EXTERNAL_ATTACKS:
        raise UnknownNameError("external attack", name, EXTERNAL_ATTACKS)
    return EXTERNAL_ATTACKS[name]


@torch.no_grad()
def _starting_points(network: nn.Module, images: Images, labels: Labels, seed: int) -> Images:
    """Return for each image the nearest image of another predicted class, NaN if there is none."""
    generator = keyed_generator(seed, Purpose.EXTERNAL_STARTS)
    noise = torch.rand(_NOISE_STARTS, *images.shape[1:], generator=generator).to(images)
    starts = torch.full_like(images, torch.nan)
    for pool in (images, noise):  # noise last, and preferred: it does not depend on the other images
        logits = torch.cat([network(part) for part in pool.split(_NOISE_STARTS)])
        for i, image in enumerate(images):
            other = ~(margin(logits, labels[i].expand(len(pool))) > 0)
            if other.any():
                distance = (pool - image).flatten(1).norm(dim=1).masked_fill(~other, torch.inf)
                starts[i] = pool[distance.argmin()]
    return starts
