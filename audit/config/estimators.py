"""The sections of estimators: what each may hold, and the settings it stands for.

Checked without anything that computes, so a typo is answered at once. Fields, defaults and limits are those of the
dataclasses that `settings_of` names; `tests/audit/test_sections.py` holds them to that.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag

from audit.config.values import Count, Counts, NotNegative, Positive, Several, Share, StepSize, Widths, known

CRITICS = ("concatenated", "dot-product")
BOUNDS = ("donsker-varadhan", "infonce", "jensen-shannon", "nwj", "smile")


class Section(BaseModel):
    """A mapping of a benchmark; every field either decides numbers or does not, and says which.

    `decides` are part of a cell's identity, `labels` are not; `settings_of` is the dataclass that the section fills,
    as `module:name`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    decides: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[tuple[str, ...]] = ()
    settings_of: ClassVar[str] = ""


class EstimatorSection(Section):
    """An estimator by its name, with what differs from its defaults."""

    name: str

    @property
    def shown(self) -> str:
        """Return the estimator's name as tables show it."""
        return self.name

    @abstractmethod
    def estimator(self) -> Any:
        """Return the `audit.information.estimator.Estimator` with these settings."""


class PlainSection(EstimatorSection):
    """An estimator whose section is its own fields."""

    def estimator(self) -> Any:
        """Return the `audit.information.estimator.Estimator` with these settings."""
        from dataclasses import replace

        from audit.information.registry import ESTIMATORS

        return replace(ESTIMATORS[self.name], **self.model_dump(exclude={"name"}))


class SandwichSection(PlainSection):
    """See `audit.information.sandwich.Sandwich`."""

    decides = ("name", "noise", "absolute", "steps", "start_steps", "relative_step", "quantisers", "widths",
               "annealing_steps", "draws")  # fmt: skip
    labels = ("batch_size",)
    settings_of = "audit.information.sandwich:Sandwich"

    name: Literal["sandwich"] = "sandwich"
    noise: Positive = 0.5
    absolute: bool = False
    steps: Count = 30
    start_steps: Count = 10
    relative_step: StepSize = 0.2
    quantisers: Counts = (2, 8, 32)
    widths: Widths = (4.0, 8.0)
    annealing_steps: Count = 40
    draws: Count = 4
    batch_size: Count = 256


class LabelLevelSection(PlainSection):
    """See `audit.information.labels.LabelLevel`."""

    decides = ("name", "targets", "kept", "steps", "relative_step")
    labels = ("batch_size",)
    settings_of = "audit.information.labels:LabelLevel"

    name: Literal["label-level"] = "label-level"
    targets: Count = 10
    kept: Count = 3
    steps: Count = 30
    relative_step: StepSize = 0.2
    batch_size: Count = 256


class LabelInformationSection(PlainSection):
    """See `audit.information.labels.LabelInformation`."""

    decides = ("name", "steps", "relative_step")
    labels = ("batch_size",)
    settings_of = "audit.information.labels:LabelInformation"

    name: Literal["label-information"] = "label-information"
    steps: Count = 20
    relative_step: StepSize = 0.2
    batch_size: Count = 256


class _ReferenceSection(PlainSection):
    decides = ("name", "width", "steps", "batch_size", "learning_rate", "search_steps", "step_size", "every")
    settings_of = "audit.information.released.estimator:Reference"

    width: Count = 64
    steps: Count = 100
    batch_size: Several = 128
    learning_rate: Positive = 1e-3
    search_steps: Count = 7
    step_size: Positive = 0.01
    every: Count = 20


class ReferenceLocalSection(_ReferenceSection):
    """See `audit.information.released.estimator.Reference`, with a value per position."""

    name: Literal["ref-local"] = "ref-local"


class ReferenceMeanSection(_ReferenceSection):
    """See `audit.information.released.estimator.Reference`, with the scores averaged over positions."""

    name: Literal["ref-mean"] = "ref-mean"


class CriticSection(Section):
    """The critic network; see `audit.information.critics.CriticShape`."""

    decides = ("name", "width", "embedding", "channels", "view", "dropout", "flip")
    settings_of = "audit.information.critics:CriticShape"

    name: Annotated[str, AfterValidator(lambda name: known("critic", name, CRITICS))] = "dot-product"
    width: Count = 128
    embedding: Count = 32
    channels: Count = 32
    view: Count = 16
    dropout: Share = 0.2
    flip: bool = False


class SearchSection(Section):
    """How mine searches the worst case; see `audit.information.critic_descent.WorstCaseSearch`."""

    decides = ("collapse_steps", "rounds", "relative_step", "critic_steps", "every", "tolerance")
    settings_of = "audit.information.critic_descent:WorstCaseSearch"

    collapse_steps: Count = 20
    rounds: Count = 40
    relative_step: StepSize = 0.1
    critic_steps: Count = 5
    every: Count = 10
    tolerance: NotNegative = 0.02


class MineSection(EstimatorSection):
    """The paper's estimator; see `audit.information.critic_training.CriticTraining`."""

    decides = ("name", "bound", "steps", "batch_size", "learning_rate", "weight_decay", "every", "patience",
               "averaging", "critic", "search")  # fmt: skip
    settings_of = "audit.information.critic_training:CriticTraining"

    name: Literal["mine"] = "mine"
    bound: Annotated[str, AfterValidator(lambda name: known("bound", name, BOUNDS))] = "infonce"
    steps: Count = 1000
    batch_size: Several = 256
    learning_rate: Positive = 2e-3
    weight_decay: NotNegative = 1e-2
    every: Count = 10
    patience: Count = 80
    averaging: Share = 0.95
    critic: CriticSection = CriticSection()
    search: SearchSection = SearchSection()

    @property
    def shown(self) -> str:
        """Return the estimator's name as tables show it, such as `mine-infonce`."""
        critic = self.critic.name
        return f"mine-{self.bound}" + (f"-{critic}" if critic != CriticSection().name else "")

    def estimator(self) -> Any:
        """Return the `audit.information.estimator.Estimator` with these settings."""
        from audit.information.critic_descent import WorstCaseSearch
        from audit.information.critic_training import CriticTraining
        from audit.information.critics import CriticShape
        from audit.information.mine import Mine

        values = self.model_dump(exclude={"name", "critic", "search"})
        training = CriticTraining(**values, shape=CriticShape(**self.critic.model_dump()))
        return Mine(training, WorstCaseSearch(**self.search.model_dump()))


ESTIMATOR_SECTIONS: dict[str, type[EstimatorSection]] = {
    "sandwich": SandwichSection,
    "mine": MineSection,
    "label-level": LabelLevelSection,
    "label-information": LabelInformationSection,
    "ref-local": ReferenceLocalSection,
    "ref-mean": ReferenceMeanSection,
}


def _as_estimator(value: object) -> object:
    """A name or a mapping with one, validated by the section of that name."""
    mapping = {"name": value} if isinstance(value, str) else value
    if isinstance(mapping, EstimatorSection):
        return mapping
    if not isinstance(mapping, dict) or not isinstance(mapping.get("name"), str):
        raise ValueError(f"an estimator is a name or a mapping with one; legal: {', '.join(ESTIMATOR_SECTIONS)}")
    known("estimator", mapping["name"], ESTIMATOR_SECTIONS)
    return mapping


def _section_name(value: object) -> str | None:
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


AnyEstimator: Any = Annotated[
    Union[*(Annotated[section, Tag(name)] for name, section in ESTIMATOR_SECTIONS.items())],
    Discriminator(_section_name),
    BeforeValidator(_as_estimator),
]
