"""Attacks of other packages, as one table of callables: candidates in, legal images and their cost out.

One of our own stands among them, the search by differences: it too sees no more than the network's outputs.

Every adapter leaves the process as it found it: no gradient on a parameter, no draw from a global generator, no
tracer removed, nothing printed. Verdicts are not theirs to give: the caller judges the images by a plain forward pass.

What depends on the batch, as far as the packages go: pyautoattack draws its random starts for 250 images at once and
gives all of them the same squares, so an image's result depends on its neighbours and their order (equal images in
equal order and an equal seed give equal results). HopSkipJump runs image by image and does not.
"""

import logging
import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from audit.adversary.finite_differences import Differences
from audit.adversary.label_attack import margin
from audit.adversary.threat import THREATS, ThreatModel
from audit.errors import EnvironmentFault, InvalidModelError, UnknownNameError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels

_STARTS = 64  # noise images among which HopSkipJump looks for a start
_FAULTS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


class Borrowed(NamedTuple):
    """Legal candidates (N, C, H, W), the clean image where none was found, and the passes of single images spent.

    A package's own checks of the network count as forward passes too.
    """

    images: Images
    forwards: int
    backwards: int


class BorrowedAttack(ABC):
    """An attack from elsewhere: call it with a network, the images still to break, labels, threat and seed."""

    library: ClassVar[str]
    norms: ClassVar[dict[str, str]]

    def __call__(self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Borrowed:
        """Return candidates (N, C, H, W) inside the ball and the pixel range; the same seed gives the same ones.

        Raises UsageError for a norm or pixel range that the package does not know, EnvironmentFault where it is not
        installed, InvalidModelError where it fails on this network or these images.
        """
        self._check(threat)
        if len(images) == 0 or threat.eps == 0:
            return Borrowed(images.clone(), 0, 0)
        with _as_it_was(network):
            counted = Counted(network)
            try:
                found = self._search(counted, images.detach(), labels, threat, _library_seed(seed))
            except torch.OutOfMemoryError:
                raise
            except _FAULTS as fault:
                shape = tuple(images.shape[1:])
                raise InvalidModelError(
                    f"{self.library} fails on this network and images of shape {shape}: {type(fault).__name__} {fault}"
                ) from fault
        return Borrowed(_legal(found.detach(), images, threat), counted.forwards, counted.backwards)

    def _check(self, threat: ThreatModel) -> None:
        if threat.norm not in self.norms:
            raise UsageError(
                f"{self.library} does not attack in {threat.norm!r}; legal: {', '.join(sorted(self.norms))}"
            )
        if threat.pixel_range != (0.0, 1.0):
            raise UsageError(f"{self.library} moves pixels within (0.0, 1.0), not within {threat.pixel_range}")

    @abstractmethod
    def _search(self, network: "Counted", images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Images: ...


@dataclass(frozen=True)
class AutoAttack(BorrowedAttack):
    """Stages of AutoAttack, each on what the ones before it left: 100 iterations of APGD, 100 of FAB, then Square.

    The DLR loss divides by the third logit, its targeted form by the fourth. With three classes the untargeted form
    takes the targeted one's place, with two only the cross-entropy is left; at most nine classes are targeted.

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

    def _check(self, threat: ThreatModel) -> None:
        if self.stages == ("square",) and threat.norm != "linf":
            raise UsageError(
                f"Square alone attacks in 'linf', not in {threat.norm!r}: there its squares reach a boundary only at "
                "two to three times its distance; use `differences`"
            )
        super()._check(threat)

    def stages_for(self, num_classes: int) -> list[str]:
        """Return the stages that a number of classes allows; raises InvalidModelError for fewer than two classes."""
        if num_classes < 2:
            raise InvalidModelError(f"the network has {num_classes} output: an attack on the label needs 2 or more")
        allowed = [stage if stage != "apgd-t" or num_classes > 3 else "apgd-dlr" for stage in self.stages]
        allowed = [stage if stage != "apgd-dlr" or num_classes > 2 else "apgd-ce" for stage in allowed]
        return list(dict.fromkeys(allowed))

    def _search(self, network: "Counted", images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Images:
        with _needed("pyautoattack"):
            library = import_module("pyautoattack")
        classes = network.num_classes(images)
        attack = library.AutoAttack(
            network, norm=self.norms[threat.norm], eps=threat.eps, seed=seed, device=images.device, version="standard"
        )
        attack.attacks_to_run = self.stages_for(classes)
        attack.square.n_queries = self.queries
        attack.fab.n_target_classes = min(attack.fab.n_target_classes, classes - 1)
        attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, classes - 1)
        # what it warns of (zero gradients, a random network, probabilities for logits) is for the audit's own checks
        silent = logging.Logger("silent", logging.CRITICAL + 1)
        attack.logger = attack.apgd.logger = attack.apgd_targeted.logger = silent
        found: Images = attack.run_standard_evaluation(images, labels)[0]
        return found


@dataclass(frozen=True)
class HopSkipJump(BorrowedAttack):
    """HopSkipJump, which sees only the class named: for networks whose gradients and scores cannot be trusted.

    `steps` of the walk along the boundary: 50 cost about 25,000 forward passes an image. Images run one by one,
    because Foolbox scales the gradient estimate by the norm over the whole batch. A walk starts at the nearest of 64
    noise images that the network does not give the label, else at the nearest given image that it does not; an
    image without a start stays clean.

    Source: Chen, Jordan & Wainwright 2020, "HopSkipJumpAttack: A Query-Efficient Decision-Based Attack".
    """

    steps: int = 50

    library: ClassVar[str] = "foolbox"
    norms: ClassVar[dict[str, str]] = {"linf": "linf", "l2": "l2"}

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps {self.steps!r} of HopSkipJump must be at least 1")

    def _search(self, network: "Counted", images: Images, labels: Labels, threat: ThreatModel, seed: int) -> Images:
        with _needed("foolbox"):
            foolbox, attacks = import_module("foolbox"), import_module("foolbox.attacks")
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=images.device)
        attack = attacks.HopSkipJumpAttack(steps=self.steps, constraint=self.norms[threat.norm])
        network.num_classes(images)
        starts = _starts(network, images, labels, seed)
        found = images.clone()
        for i in (~starts.isnan().flatten(1).any(1)).nonzero().flatten().tolist():
            torch.manual_seed(seed)  # inside fork_rng: every image has the same draws, whatever its place
            criterion = foolbox.criteria.Misclassification(labels[i : i + 1])
            found[i] = attack.run(model, images[i : i + 1], criterion, starting_points=starts[i : i + 1])[0]
        # its images lie on the boundary up to rounding: a thousandth further out the verdict does not hang on it
        return images + 1.001 * (found - images)


@dataclass(frozen=True)
class ByDifferences(BorrowedAttack):
    """Our own search by differences of the margin, `audit.adversary.finite_differences`, with so many queries an image."""

    queries: int = 300

    library: ClassVar[str] = "the search by differences"
    norms: ClassVar[dict[str, str]] = {norm: norm for norm in THREATS}

    def _check(self, threat: ThreatModel) -> None:
        """Every threat model is fit, whatever its pixel range."""

    def _search(
        self,
        network: "Counted",
        images: Images,
        labels: Labels,
        threat: ThreatModel,
        seed: int,  # noqa: ARG002
    ) -> Images:
        network.num_classes(images)
        return Differences(self.queries).search(network, images, labels, threat).images


BORROWED: dict[str, BorrowedAttack] = {
    "autoattack-standard": AutoAttack(),
    "apgd": AutoAttack(("apgd-ce", "apgd-t")),
    "fab": AutoAttack(("fab-t",)),
    "square": AutoAttack(("square",), queries=300),
    "differences": ByDifferences(),
    "hopskipjump": HopSkipJump(),
}


def blind_attack(threat: ThreatModel, queries: int) -> BorrowedAttack:
    """Return the attack of outputs only with so many queries an image: Square in l-inf, differences in other norms."""
    return AutoAttack(("square",), queries) if threat.norm == "linf" else ByDifferences(queries)


def borrowed_attack(name: str) -> BorrowedAttack:
    """Return a borrowed attack by its name; raises UnknownNameError with the nearest legal names."""
    if name not in BORROWED:
        raise UnknownNameError("borrowed attack", name, BORROWED)
    return BORROWED[name]


class Counted(nn.Module):
    """A network that counts the forward and backward passes of single images that others run through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._held = (network,)  # in a tuple it is no submodule: nobody's .eval() or .to() reaches it
        self.forwards = self.backwards = 0
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the network's logits (N, K), as a copy: Square writes into them, and they may be a view."""
        logits: Tensor = self._held[0](images).clone()
        self.forwards += len(images)
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def num_classes(self, images: Images) -> int:
        """Return how many classes the network names; raises InvalidModelError where its output is not (N, K)."""
        with torch.no_grad():
            shape = self(images[:1]).shape
        if len(shape) != 2:
            raise InvalidModelError(
                f"the network's output for one image has shape {tuple(shape)}: legal is (1, classes)"
            )
        return shape[1]

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def _library_seed(seed: int) -> int:
    """Return a seed for global generators, where the seed itself would repeat draws of whoever used it plainly."""
    return keyed_generator(seed, Purpose.EXTERNAL_ATTACK).initial_seed()


def _legal(found: Images, clean: Images, threat: ThreatModel) -> Images:
    finite = found.isfinite().flatten(1).all(1).view(-1, *[1] * (clean.dim() - 1))
    return threat.project(torch.where(finite, found, clean), clean)


@torch.no_grad()
def _starts(network: nn.Module, images: Images, labels: Labels, seed: int) -> Images:
    """Return for every image the nearest one that does not have its label, NaN where there is none."""
    noise = torch.rand(_STARTS, *images.shape[1:], generator=keyed_generator(seed, _STARTS)).to(images)
    starts = torch.full_like(images, torch.nan)
    for pool in (images, noise):  # the last word is the noise's: it does not depend on what else is attacked
        logits = torch.cat([network(part) for part in pool.split(_STARTS)])
        for i, image in enumerate(images):
            other = ~(margin(logits, labels[i].expand(len(pool))) > 0)
            if other.any():
                distance = (pool - image).flatten(1).norm(dim=1).masked_fill(~other, torch.inf)
                starts[i] = pool[distance.argmin()]
    return starts


@contextmanager
def _needed(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EnvironmentFault(
            f"{package} cannot be imported ({error}): this attack needs `pip install 'rvaudit[attacks]'`"
        ) from error


@contextmanager
def _as_it_was(network: nn.Module) -> Iterator[None]:
    """Freeze the parameters, and put back afterwards what the packages seed, draw from or switch off."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    states: tuple[Any, Any, Any] = random.getstate(), np.random.get_state(), sys.gettrace()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng(list(range(torch.cuda.device_count()))), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        random.setstate(states[0])
        np.random.set_state(states[1])
        sys.settrace(states[2])
