"""The sections of a benchmark: what each may hold, and the settings it stands for. No YAML here."""

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from audit.accuracy import LabelAttack
from audit.critics import CriticShape
from audit.errors import AuditError
from audit.information import CriticTraining
from audit.measurement import AuditSettings
from audit.mine import Mine
from audit.pgd import PGD
from audit.records import canonical_json
from audit.threat import ThreatModel, threat_model
from audit.vulnerability import WorstCaseSearch


def parse_number(value: object) -> float:
    """Return a number written as 0.03, 1e-3 or 8/255.

    >>> parse_number("8/255") == 8 / 255
    True
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}")
    try:
        # only fractions as Fraction: it would write all the digits of "1e99999999" out
        return float(Fraction(value.replace(" ", "")) if isinstance(value, str) and "/" in value else value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}") from error


def _as_tuple(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


Number = Annotated[float, BeforeValidator(parse_number)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _raised_as_value_error(make: Callable[[], object]) -> None:
    """Pydantic collects ValueErrors; our own errors would end the reading at the first fault."""
    try:
        make()
    except AuditError as error:
        raise ValueError(str(error)) from error


class _Section(BaseModel):
    """Values that `made_of` checks one by one: no fault hides another one, and each keeps its line."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    made_of: ClassVar[type[Any] | None] = None

    @field_validator("*")
    @classmethod
    def _legal(cls, value: Any, info: ValidationInfo) -> Any:
        name, made_of = str(info.field_name), cls.made_of
        if made_of is not None and name in {known.name for known in fields(made_of)}:
            _raised_as_value_error(lambda: made_of(**{name: value}))
        return value


def _legal_norm(norm: str) -> str:
    _raised_as_value_error(lambda: threat_model(norm, 0.0))
    return norm


def _legal_radius(eps: float, info: ValidationInfo) -> float:
    if "norm" in info.data:  # else the norm is at fault, and says so
        _raised_as_value_error(lambda: threat_model(info.data["norm"], eps))
    return eps


def _legal_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    _raised_as_value_error(lambda: AuditSettings(seeds=seeds))
    return seeds


Radius = Annotated[Number, AfterValidator(_legal_radius)]
Radii = Annotated[tuple[Radius, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_as_tuple), AfterValidator(_legal_seeds)]


class ThreatConfig(_Section):
    """A norm and one or more radii in pixel units."""

    norm: Annotated[str, AfterValidator(_legal_norm)] = "linf"
    eps: Radii

    def models(self) -> list[ThreatModel]:
        """Return one threat model a radius."""
        return [threat_model(self.norm, eps) for eps in self.eps]


class ModelConfig(_Section):
    """A model reference, and what differs for this model from the benchmark's own settings."""

    ref: str
    name: str | None = None
    dataset: str | None = None
    images: int | None = Field(default=None, ge=1)
    layers: Names | None = None
    threats: Annotated[tuple[ThreatConfig, ...], BeforeValidator(_as_tuple)] | None = None


def _as_model(value: object) -> object:
    return {"ref": value} if isinstance(value, str) else value


def _as_models(value: object) -> object:
    return [_as_model(item) for item in _as_tuple(value)]


class CriticConfig(_Section):
    """The critic network; see `audit.critics.CriticShape`."""

    made_of: ClassVar[type[Any] | None] = CriticShape

    name: str = CriticShape.name
    width: int = CriticShape.width
    embedding: int = CriticShape.embedding
    channels: int = CriticShape.channels
    view: int = CriticShape.view
    dropout: Number = CriticShape.dropout
    flip: bool = CriticShape.flip


class EstimatorConfig(_Section):
    """How MI is estimated; see `audit.information.CriticTraining`."""

    made_of: ClassVar[type[Any] | None] = CriticTraining

    name: Literal["mine"] = "mine"
    bound: str = CriticTraining.bound
    steps: int = CriticTraining.steps
    batch_size: int = CriticTraining.batch_size
    learning_rate: Number = CriticTraining.learning_rate
    weight_decay: Number = CriticTraining.weight_decay
    every: int = CriticTraining.every
    patience: int = CriticTraining.patience
    critic: CriticConfig = CriticConfig()

    def training(self) -> CriticTraining:
        """Return the settings as the estimator takes them."""
        values = self.model_dump(exclude={"name", "critic"})
        return CriticTraining(**values, shape=CriticShape(**self.critic.model_dump()))


class SearchConfig(_Section):
    """How the worst case is searched; see `audit.vulnerability.WorstCaseSearch`."""

    made_of: ClassVar[type[Any] | None] = WorstCaseSearch

    collapse_steps: int = WorstCaseSearch.collapse_steps
    rounds: int = WorstCaseSearch.rounds
    relative_step: Number = WorstCaseSearch.relative_step
    critic_steps: int = WorstCaseSearch.critic_steps

    def search(self) -> WorstCaseSearch:
        """Return the settings as the search takes them."""
        return WorstCaseSearch(**self.model_dump())


class AttackConfig(_Section):
    """The attack that measures adversarial accuracy: PGD on the cross-entropy, then on the margin for survivors."""

    made_of: ClassVar[type[Any] | None] = PGD

    steps: int = PGD.steps
    relative_step: Number = PGD.relative_step
    restarts: int = PGD.restarts

    def attack(self) -> LabelAttack:
        """Return the settings as the attack takes them."""
        random_start = PGD(self.steps, self.relative_step, random_start=True, restarts=self.restarts)
        return LabelAttack(random_start, replace(random_start, random_start=False))


class BenchmarkConfig(_Section):
    """A benchmark: models x layers x threat models, each over all seeds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")
    dataset: str
    models: Annotated[tuple[ModelConfig, ...], BeforeValidator(_as_models), Field(min_length=1)]
    threats: Annotated[tuple[ThreatConfig, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    layers: Names = ("logits",)
    images: int | None = Field(default=None, ge=1)
    seeds: Seeds = AuditSettings().seeds
    reduce: Literal["flatten", "mean"] = "flatten"
    estimator: EstimatorConfig = EstimatorConfig()
    search: SearchConfig = SearchConfig()
    attack: AttackConfig = AttackConfig()

    def settings(self) -> AuditSettings:
        """Return everything that decides numbers beside model, images and threat model."""
        estimator = Mine(self.estimator.training(), self.search.search())
        return AuditSettings(estimator, self.attack.attack(), self.seeds, self.reduce)

    def canonical(self) -> str:
        """Return the one spelling of this configuration."""
        return canonical_json(self.model_dump(mode="json"))
