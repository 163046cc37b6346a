"""Settings of every estimator, each declared once with its default and legal values. Imports no torch.

An estimator extends its settings by the computation. `audit.config` derives the sections of benchmark files from the
same dataclasses, so that a file is validated before torch is loaded.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from math import inf
from typing import Annotated, Any, ClassVar, get_args

from audit.errors import UnknownNameError, UsageError

CRITIC_NAMES = ("concatenated", "dot-product")
BOUND_NAMES = ("donsker-varadhan", "infonce", "jensen-shannon", "nwj", "smile")

FIXED = {"yaml": "fixed"}
"""Metadata of a field that benchmark files cannot set."""
FLAT = {"yaml": "flat"}
"""Metadata of a field of settings whose own fields are keys of the estimator's section."""


def yaml_key(name: str) -> dict[str, str]:
    """Return the metadata of a field that has another key in benchmark files."""
    return {"key": name}


@dataclass(frozen=True)
class Limit:
    """The legal values of a setting; `words` complete the sentence "<setting> <value> ..." of an error."""

    legal: Callable[[Any], bool]
    words: str

    def check(self, setting: str, value: object) -> None:
        """Raise UsageError for a value that is not legal."""
        if not self.legal(value):
            raise UsageError(f"{setting} {value!r} {self.words}")


@dataclass(frozen=True)
class OneOf:
    """The legal names of a setting; `kind` is what they name."""

    kind: str
    names: tuple[str, ...]

    def check(self, setting: str, value: object) -> None:  # noqa: ARG002
        """Raise UnknownNameError for a name that is not legal."""
        if value not in self.names:
            raise UnknownNameError(self.kind, str(value), self.names)


Rule = Limit | OneOf
AT_LEAST_ONE = Limit(lambda x: x >= 1, "must be at least 1")
STEP_SIZE = Limit(lambda x: 0 < x <= 2, "is outside (0, 2]: it is a multiple of eps")

Count = Annotated[int, AT_LEAST_ONE]
AtLeastTwo = Annotated[int, Limit(lambda x: x >= 2, "must be at least 2")]
Counts = Annotated[tuple[int, ...], Limit(lambda counts: all(x >= 1 for x in counts), "must each be at least 1")]
Positive = Annotated[float, Limit(lambda x: 0 < x < inf, "must be above 0 and finite")]
PositiveOrNone = Annotated[float | None, Limit(lambda x: x is None or 0 < x < inf, "must be above 0 and finite")]
NotNegative = Annotated[float, Limit(lambda x: 0 <= x < inf, "must be at least 0 and finite")]
Share = Annotated[float, Limit(lambda x: 0 <= x < 1, "is outside [0, 1)")]
StepSize = Annotated[float, STEP_SIZE]
Width = Annotated[float, Limit(lambda x: 1 <= x < inf, "must be at least 1 and finite")]
CriticName = Annotated[str, OneOf("critic", CRITIC_NAMES)]
BoundName = Annotated[str, OneOf("bound", BOUND_NAMES)]


def rules_of(kind: object) -> tuple[Rule, ...]:
    """Return the rules in an annotation such as `Count`.

    >>> rules_of(Count)[0].words
    'must be at least 1'
    """
    return tuple(rule for rule in getattr(kind, "__metadata__", ()) if isinstance(rule, Rule))


def _checks(kind: object, value: Any) -> Iterator[tuple[Rule, object]]:
    """Yield each rule with the value it applies to: the whole, or every element of a tuple."""
    yield from ((rule, value) for rule in rules_of(kind))
    elements: Iterable[object] = value if isinstance(value, tuple) else ()
    for rule in rules_of(next(iter(get_args(kind)), None)):
        yield from ((rule, element) for element in elements)


@dataclass(frozen=True)
class Settings:
    """Base of frozen settings; raises UsageError for a value that breaks a rule of its field's annotation.

    `subject` begins the error messages.
    """

    subject: ClassVar[str]

    def __post_init__(self) -> None:
        for each in fields(self):
            for rule, value in _checks(each.type, getattr(self, each.name)):
                rule.check(f"{self.subject} {each.name}", value)


@dataclass(frozen=True)
class EstimatorSettings(Settings):
    """Base of an estimator's settings; `memory_only` fields limit memory and do not affect the result."""

    memory_only: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """The name of the estimator in tables."""
        return self.subject


@dataclass(frozen=True)
class SandwichSettings(EstimatorSettings):
    """Settings of the critic-free estimate of a noise-smoothed representation.

    The noise of each feature is proportional to its deviation on clean images, by the factor at which these hold
    `target_nats` of information. `noise` fixes it instead: one standard deviation for all features, in layer standard
    deviations (root mean square over the features that vary, on clean images), or in feature units if `absolute`,
    there by default a half. The worst-case search moves images to the nearest of `quantisers` centres or to one hub in
    `start_steps` steps, and from the best of these by mean shift in `steps` more. If that leaves more than
    `tolerance` nats, it also starts with a kernel of `widths` times the noise, which shrinks to the noise in
    `annealing_steps` steps. The value is estimated from `draws` draws of the noise, each with both signs.
    """

    subject: ClassVar[str] = "sandwich"
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    target_nats: Positive = 1.5
    noise: PositiveOrNone = None
    absolute: bool = False
    steps: Count = 30
    start_steps: Count = 10
    relative_step: StepSize = 0.2
    quantisers: Counts = (2,)
    widths: tuple[Width, ...] = (4.0,)
    annealing_steps: Count = 40
    tolerance: Positive = 0.05
    draws: Count = 4
    batch_size: Count = 256


@dataclass(frozen=True)
class LabelEntropySettings(EstimatorSettings):
    """Settings of the entropy of predicted labels under targeted attacks.

    Each of the `targets` most likely classes is tried on a few images; the `kept` best are attacked on all images.
    """

    subject: ClassVar[str] = "label-level"
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    targets: Count = 10
    kept: Count = 3
    steps: Count = 30
    relative_step: StepSize = 0.2
    batch_size: Count = 256


@dataclass(frozen=True)
class ReferenceSettings(EstimatorSettings):
    """Settings of the authors' released code; the defaults are reduced to a CPU.

    Released are `width` 2048, `learning_rate` 1e-4 and 500 epochs of augmented training images (on CIFAR-10, 195,500
    steps). Before every critic step, `search_steps` projected steps of the absolute length `step_size` start from the
    clean images. `every` is the number of steps between two values on validation images.
    """

    subject: ClassVar[str] = "reference"

    per_position: bool = field(default=True, metadata=FIXED)
    width: Count = 64
    steps: Count = 100
    batch_size: AtLeastTwo = 128
    learning_rate: Positive = 1e-3
    search_steps: Count = 7
    step_size: Positive = 0.01
    every: Count = 20

    @property
    def name(self) -> str:
        """The name of the estimator in tables: `ref-local` or `ref-mean`."""
        return "ref-local" if self.per_position else "ref-mean"


@dataclass(frozen=True)
class CriticShape(Settings):
    """Kind and size of a critic network, and the augmentation of its view of an image.

    Images larger than `view` pixels are averaged down to it. `flip` mirrors half of the training batches in the
    critic's view only: right for photographs, wrong for digits.
    """

    subject: ClassVar[str] = "critic"

    name: CriticName = "dot-product"
    width: Count = 128
    embedding: Count = 32
    channels: Count = 32
    view: Count = 16
    dropout: Share = 0.2
    flip: bool = False


@dataclass(frozen=True)
class CriticTraining(Settings):
    """Training of a critic: AdamW on a variational bound, with early stopping on validation images.

    `patience` is the number of steps without a new best validation value, `every` the number of steps between two
    evaluations. The moving average of the weights is evaluated and kept, in which the weights of each step count for
    1 - `averaging`; 0 is no average. Images and vectors have the same defaults, so that calibration and audits agree.
    """

    subject: ClassVar[str] = "critic training"

    bound: BoundName = "infonce"
    steps: Count = 1000
    batch_size: AtLeastTwo = 256
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 1e-2
    every: Count = 10
    patience: Count = 80
    averaging: Share = 0.95
    shape: CriticShape = field(default_factory=CriticShape, metadata=yaml_key("critic"))


@dataclass(frozen=True)
class WorstCaseSearch(Settings):
    """Search of the worst case against a critic: images are first merged, then moved down the critic's value.

    `collapse_steps` projected steps move all images to one class, the one that a short trial on training images merges
    best: information is not convex in the images, and a local search from the clean ones permutes classes where it
    could merge them. `mixing_steps` steps then move merged images, which keep their class, to where a kernel between
    features tells least of which images are alike. Then each round moves images one step down the mean value of the
    last `memory` critics, and trains the newest for `critic_steps` steps on features just computed, without passes
    through the network. Every `every` rounds a fresh critic takes over, fitted on another half of the images: images
    moved against one critic alone hide from it what others read. Steps start at `relative_step` x eps, four times that
    while merging and mixing, and shrink linearly to a tenth.

    Rounds are played in cycles, each of which doubles their number, up to `rounds`. The search ends when a cycle
    brought no more than `gain` nats or one standard error, or when no more than `tolerance` nats are left.

    Both cases are the mean of `repeats` critics that the search has not seen, each with its own division of the images.
    """

    subject: ClassVar[str] = "search"

    collapse_steps: Count = 20
    mixing_steps: Count = 30
    rounds: Count = 120
    relative_step: StepSize = 0.1
    critic_steps: Count = 5
    every: Count = 3
    memory: Count = 3
    repeats: Count = 3
    gain: NotNegative = 0.05
    tolerance: NotNegative = 0.02


@dataclass(frozen=True)
class MineSettings(EstimatorSettings):
    """Settings of the paper's estimator: training of the critic, and search of the worst case."""

    subject: ClassVar[str] = "mine"

    training: CriticTraining = field(default_factory=CriticTraining, metadata=FLAT)
    search: WorstCaseSearch = field(default_factory=WorstCaseSearch)

    @property
    def name(self) -> str:
        """The name of the estimator in tables, such as `mine-infonce`."""
        critic = self.training.shape.name
        return f"mine-{self.training.bound}" + (f"-{critic}" if critic != CriticShape.name else "")
