"""Interface of the estimators: normal- and worst-case information of a representation, in nats, with standard errors.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 (representation vulnerability).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from importlib import import_module
from math import hypot
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.passes import frozen_parameters
from audit.adversary.threat import ThreatModel
from audit.flags import FlagCode, code_of
from audit.information.registry import REGISTRY
from audit.proportion import Proportion
from audit.types import (
    Encoded,
    Encoder,
    Features,
    Images,
    Labels,
    Objective,
    as_images,
    as_labels,
    standard_torch_state,
)

History = tuple[tuple[int, float], ...]
"""(step, nats) pairs."""

FloorKind = Literal["predictions", "labels", "smoothed"]


@dataclass(frozen=True)
class Origin:
    """The search that found a worst-case candidate.

    `kind` and `value` name the search and its parameter, such as a number of centres, an initial noise width or a
    target class. `refinement` is the label of a second search that started from that candidate, `{}` standing for it.
    """

    kind: str
    value: int | float | None = None
    refinement: str = "{}"

    @property
    def label(self) -> str:
        """Return the text shown in records.

        >>> Origin("annealed", 4.0).label, Origin("quantised", 8).refined("mean shift from {}").label
        ('annealed 4', 'mean shift from quantised 8')
        """
        value = f"{self.value:g}" if isinstance(self.value, float) else self.value
        return self.refinement.format(self.kind if value is None else f"{self.kind} {value}")

    def refined(self, refinement: str) -> "Origin":
        """Return the origin of a candidate that a second search made of this one."""
        return replace(self, refinement=refinement)

    @property
    def unrefined(self) -> "Origin":
        """Return the origin of the candidate that the second search started from."""
        return replace(self, refinement="{}")


CLEAN = Origin("clean")
"""The clean images, which are always a candidate."""
ATTACKED = Origin("attacked")
"""The adversarial images of the attack on the label."""
CARRIED = Origin("carried")
"""The images of the warm start, without further search."""
EARLIER = Origin("earlier layer")
"""The worst-case images of an earlier layer, without further search."""


@dataclass(frozen=True)
class MIEstimate:
    """One estimate of an information, in nats.

    `stderr` is the standard error of `nats` over the `images` it was evaluated on. `ceiling` is the largest value that
    the estimator can return for that many images. `parts` are other values of the same fit, in nats. `validated` is
    the value on validation data, by which candidates are compared, so that `nats` is not biased by the choice.
    `history` and `training_history` are the learning curves on validation and training images, empty if nothing is
    trained. `upper` is the upper end of an interval, on which bounds rest; None to let them rest on `nats`. `accuracy`
    is the accuracy of the best classifier of the features that the fit found, if it found one. `by_images` are values
    at smaller numbers of images, and at all, that show how the estimate depends on the number.
    """

    nats: float
    stderr: float
    images: int
    ceiling: float
    validated: float
    parts: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    history: History = ()
    training_history: History = ()
    flags: tuple[str, ...] = ()
    upper: float | None = None
    accuracy: Proportion | None = None
    by_images: History = ()

    @property
    def bounds_heads(self) -> bool:
        """Whether bounds on heads may rest on the estimate: not if there are too few images."""
        return FlagCode.TOO_FEW_IMAGES not in map(code_of, self.flags)


class Vulnerability(NamedTuple):
    """Normal- and worst-case estimates of one seed, and the worst-case images found.

    The worst case was evaluated on `adversarial` (M, C, H, W), the perturbed versions of the images with the indices
    `indices` (M,); `others` (N - M, C, H, W) are the perturbed versions of the remaining images, in ascending order of
    their indices. `passes` counts forward+backward passes of single images; a forward pass alone counts as half.
    `origin` is the search that found the worst case, None if there was only one.
    """

    normal: MIEstimate
    worst: MIEstimate
    adversarial: Images
    indices: Tensor
    passes: float
    origin: Origin | None = None
    others: Images | None = None

    @property
    def all_adversarial(self) -> Images:
        """Return all perturbed images (N, C, H, W) in the order of the data set, the warm start of another search."""
        if self.others is None:
            return self.adversarial
        images = self.adversarial.new_empty(len(self.adversarial) + len(self.others), *self.adversarial.shape[1:])
        evaluated = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        evaluated[self.indices] = True
        images[self.indices], images[~evaluated] = self.adversarial, self.others
        return images

    @property
    def nats(self) -> float:
        """Return the representation vulnerability RV = normal - worst in nats."""
        return self.normal.nats - self.worst.nats

    @property
    def stderr(self) -> float:
        """Return the standard error of RV for independent estimates; shared images make the true one smaller."""
        return hypot(self.normal.stderr, self.worst.stderr)


class WarmStart(NamedTuple):
    """Optional results of earlier searches that save passes.

    `normal` is the normal case of the same inputs and seed. `images` (N, C, H, W) are the worst-case images of a
    smaller ball or of a later layer: they are one candidate, and a shortened search continues from them. `origin` is
    that of another seed's worst case: only searches of the same kind are run. `attacked` (N, C, H, W) are the
    adversarial images of the attack on the label, `earlier` (N, C, H, W) the worst-case images of an earlier layer in
    the same ball: two more candidates.
    """

    normal: MIEstimate | None = None
    images: Images | None = None
    origin: Origin | None = None
    attacked: Images | None = None
    earlier: Images | None = None


COLD_START = WarmStart()


class EstimatorInputs(NamedTuple):
    """An encoder, images (N, C, H, W), their labels (N,), and the encoded clean images if they are cached.

    `later` are the inputs of layers that are functions of this one, by name: what is known of them is known of it.
    """

    encoder: Encoder
    images: Images
    labels: Labels
    clean: Encoded | None = None
    later: "Mapping[str, EstimatorInputs]" = MappingProxyType({})


@dataclass(frozen=True)
class Estimator(ABC):
    """Estimator of an information I in nats: I of the clean images, and min I over images inside the eps-balls.

    Subclasses are frozen dataclasses whose fields, validated in `__post_init__`, determine the result together with
    the inputs and the seed. Class attributes:

    - `quantity`: the information estimated.
    - `ranks`: whether models may be ranked by RV.
    - `bounds_heads`: whether the worst case implies Fano bounds on every head of the layer.
    - `floor_kind`: the measurement that bounds the estimate from below. `predictions`: accuracy and entropy of the
      predicted classes; `labels`: the accuracy alone; `smoothed`: the accuracy of `noisy` logits.
    - `reads_log_probs`: whether the encoder must return log-probabilities.
    - `reads_later_layers`: whether `later` inputs and `earlier` images are used, so that the information does not rise
      from a layer to a later one.
    - `memory_only`: fields that limit memory and do not affect the result.
    - `version`: raised by hand when a change of this estimator changes its numbers; part of a cell's identity.
    """

    quantity: ClassVar[str]
    ranks: ClassVar[bool] = True
    bounds_heads: ClassVar[bool] = True
    floor_kind: ClassVar[FloorKind] = "predictions"
    reads_log_probs: ClassVar[bool] = True
    reads_later_layers: ClassVar[bool] = False
    memory_only: ClassVar[tuple[str, ...]] = ()
    version: ClassVar[int] = 1

    def __init_subclass__(cls, **arguments: object) -> None:
        """Let both cases run in the standard state of torch, on inputs that are tensors outside any graph."""
        super().__init_subclass__(**arguments)
        for name in ("normal", "vulnerability", "read_worst"):
            if name in vars(cls):
                setattr(cls, name, _in_standard_state(vars(cls)[name]))

    @property
    @abstractmethod
    def name(self) -> str:
        """Return the name shown in tables, such as `mine-infonce`."""

    def check_labels(self, labels: Labels) -> None:  # noqa: ARG002
        """Raise UsageError for labels (N,) that cannot be estimated from, before anything is computed."""
        return

    @abstractmethod
    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the estimate on the clean images."""

    def objective(self, inputs: EstimatorInputs) -> Objective | None:  # noqa: ARG002
        """Return the objective that the worst-case search minimises for each image, None if there is no such objective.

        It is used to check the gradient; indices refer to the images of `inputs`.
        """
        return None

    def noisy(self, clean: Features, features: Features, generator: torch.Generator) -> Features:  # noqa: ARG002
        """Return features (N, D) with the noise that the estimate sees them through, chosen from clean ones (M, D)."""
        return features

    @abstractmethod
    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return the normal and the worst case; at eps = 0 both are equal."""

    def read_worst(self, inputs: EstimatorInputs, images: Images, seed: int) -> MIEstimate | None:  # noqa: ARG002
        """Return the worst case that perturbed images (N, C, H, W) of the inputs give; None if only a new fit tells."""
        return None


def _in_standard_state(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    @standard_torch_state()
    def measure(estimator: Estimator, inputs: EstimatorInputs, *arguments: Any, **named: Any) -> Any:
        inputs = inputs._replace(images=as_images(inputs.images), labels=as_labels(inputs.labels))

        def bounded(argument: Any) -> Any:
            return argument.within(inputs.images) if isinstance(argument, ThreatModel) else argument

        arguments, named = tuple(map(bounded, arguments)), {name: bounded(each) for name, each in named.items()}
        owner = getattr(inputs.encoder, "__self__", inputs.encoder)
        with frozen_parameters(owner) if isinstance(owner, nn.Module) else nullcontext():
            return method(estimator, inputs, *arguments, **named)

    return measure


class RegisteredEstimators(Mapping[str, Estimator]):
    """The registered estimators with their default settings, by name; implementations are imported on first use."""

    def __getitem__(self, name: str) -> Estimator:
        settings, implementation = REGISTRY[name]
        module, _, kind = implementation.partition(":")
        values = {each.name: getattr(settings, each.name) for each in fields(settings)}
        estimator: Estimator = getattr(import_module(module), kind)(**values)
        return estimator

    def __iter__(self) -> Iterator[str]:
        return iter(REGISTRY)

    def __len__(self) -> int:
        return len(REGISTRY)


ESTIMATORS = RegisteredEstimators()
