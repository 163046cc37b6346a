"""The contract of attacks from other packages, and the isolation in which they run.

An adapter leaves the process unchanged: no gradient on a parameter, no draw from a global generator, no trace function
removed, nothing printed. Adapters return candidates; the caller evaluates them by a plain forward pass.
"""

import random
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from audit.adversary.memory.counting import count_passes
from audit.adversary.memory.limit import allowed
from audit.adversary.passes import frozen_parameters, outputs_of
from audit.adversary.threat import ThreatModel
from audit.errors import EnvironmentFault, InvalidModelError, UsageError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, as_images, as_labels, standard_torch_state

_FAULTS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


class ExternalResult(NamedTuple):
    """Legal candidates (N, C, H, W), the clean image if none was found, and the passes of single images.

    Forward passes of a package's own checks of the network are counted.
    """

    images: Images
    forwards: int
    backwards: int


class ExternalAttack(ABC):
    """An attack from another package, as a function of network, images, labels, threat model and seed."""

    library: ClassVar[str]
    norms: ClassVar[dict[str, str]]

    @standard_torch_state()
    def __call__(
        self, network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, seed: int
    ) -> ExternalResult:
        """Return candidates for images (N, C, H, W) with labels (N,), inside the ball and the pixel range.

        The same seed gives the same candidates. Raises UsageError for a norm or pixel range that the package does not
        support, EnvironmentFault if it is not installed, InvalidModelError if it fails on this network or these images.
        """
        self._check_threat(threat)
        images, labels, threat = as_images(images), as_labels(labels), threat.within(images)
        if len(images) == 0 or threat.eps == 0:
            return ExternalResult(images.clone(), 0, 0)
        with _isolated(network):
            counter = PassCounter(network)
            try:
                found = self._search(counter, images, labels, threat, _library_seed(seed))
            except torch.OutOfMemoryError:
                raise
            except _FAULTS as error:
                shape = tuple(images.shape[1:])
                raise InvalidModelError(
                    f"{self.library} fails on this network and images of shape {shape}: {type(error).__name__} {error}"
                ) from error
        return ExternalResult(_legal(found.detach(), images, threat), counter.forwards, counter.backwards)

    def _check_threat(self, threat: ThreatModel) -> None:
        if threat.norm not in self.norms:
            legal = ", ".join(sorted(self.norms))
            raise UsageError(f"{self.library} does not attack in {threat.norm!r}; legal: {legal}")
        if threat.pixel_range != (0.0, 1.0):
            raise UsageError(f"{self.library} moves pixels within (0.0, 1.0), not within {threat.pixel_range}")

    @abstractmethod
    def _search(
        self, network: "PassCounter", images: Images, labels: Labels, threat: ThreatModel, seed: int
    ) -> Images: ...


class PassCounter(nn.Module):
    """A network that counts the forward and backward passes of single images through it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = (network,)  # in a tuple, so that it is no submodule that .eval() or .to() would change
        self.forwards = self.backwards = 0
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the network's logits (N, K), as a copy: Square writes into them, and they may be a view.

        Packages choose batches of their own; those that memory does not bear are passed in several parts, whose
        activations are computed again in the backward pass.
        """
        network = partial(outputs_of, self._network[0])
        batches = images.split(max(1, allowed(len(images))))
        if len(batches) > 1 and images.requires_grad and torch.is_grad_enabled():
            network = partial(checkpoint, network, use_reentrant=False)
        logits = torch.cat([network(batch) for batch in batches])
        self.forwards += len(images)
        count_passes(len(images))
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def num_classes(self, images: Images) -> int:
        """Return the number of classes; raises InvalidModelError if the outputs are not of shape (N, K)."""
        with torch.no_grad():
            shape = self(images[:1]).shape
        if len(shape) != 2:
            raise InvalidModelError(
                f"the network's output for one image has shape {tuple(shape)}: legal is (1, classes)"
            )
        return shape[1]

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@contextmanager
def required_package(package: str) -> Iterator[None]:
    """Raise EnvironmentFault with the extra to install where the package cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise EnvironmentFault(
            f"{package} cannot be imported ({error}): this attack needs `pip install 'rvaudit[attacks]'`"
        ) from error


def _library_seed(seed: int) -> int:
    """Return a seed for global generators; the seed itself would repeat draws of other code seeded with it."""
    return keyed_generator(seed, Purpose.EXTERNAL_ATTACK).initial_seed()


def _legal(found: Images, clean: Images, threat: ThreatModel) -> Images:
    finite = found.isfinite().flatten(1).all(1).view(-1, *[1] * (clean.dim() - 1))
    return threat.project(torch.where(finite, found, clean), clean)


@contextmanager
def _isolated(network: nn.Module) -> Iterator[None]:
    """Freeze the parameters, and restore global random states, warning filters and the trace function at exit."""
    states: tuple[Any, Any, Any] = random.getstate(), np.random.get_state(), sys.gettrace()
    try:
        with (
            frozen_parameters(network),
            torch.random.fork_rng(list(range(torch.cuda.device_count()))),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        sys.settrace(states[2])
