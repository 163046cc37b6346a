"""The sections of a benchmark: what each may hold, and the settings it stands for. No YAML here."""

from collections.abc import Callable
from dataclasses import fields, replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    create_model,
    field_validator,
)

from audit.attacks import TIERS, LabelAttack, two_losses
from audit.critics import CriticShape
from audit.errors import AuditError, UnknownNameError
from audit.estimates import Estimator
from audit.estimators import ESTIMATORS
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


class SearchConfig(_Section):
    """How mine searches the worst case; see `audit.vulnerability.WorstCaseSearch`."""

    made_of: ClassVar[type[Any] | None] = WorstCaseSearch

    collapse_steps: int = WorstCaseSearch.collapse_steps
    rounds: int = WorstCaseSearch.rounds
    relative_step: Number = WorstCaseSearch.relative_step
    critic_steps: int = WorstCaseSearch.critic_steps


class MineConfig(_Section):
    """The paper's estimator; see `audit.information.CriticTraining`."""

    made_of: ClassVar[type[Any] | None] = CriticTraining

    name: Literal["mine"] = "mine"
    bound: str = CriticTraining.bound
    steps: int = CriticTraining.steps
    batch_size: int = CriticTraining.batch_size
    learning_rate: Number = CriticTraining.learning_rate
    weight_decay: Number = CriticTraining.weight_decay
    every: int = CriticTraining.every
    patience: int = CriticTraining.patience
    averaging: Number = CriticTraining.averaging
    critic: CriticConfig = CriticConfig()
    search: SearchConfig = SearchConfig()

    def estimator(self) -> Estimator:
        """Return the estimator with these settings."""
        values = self.model_dump(exclude={"name", "critic", "search"})
        training = CriticTraining(**values, shape=CriticShape(**self.critic.model_dump()))
        return Mine(training, WorstCaseSearch(**self.search.model_dump()))


class _PlainConfig(_Section):
    """An estimator whose section is its own fields."""

    name: str

    def estimator(self) -> Estimator:
        """Return the estimator with these settings."""
        found: Estimator = replace(ESTIMATORS[self.name], **self.model_dump(exclude={"name"}))
        return found


def _plain_section(name: str) -> type[_PlainConfig]:
    """Return the section of an estimator: its simple fields with the defaults of `ESTIMATORS`."""
    default = ESTIMATORS[name]
    simple = [known for known in fields(default) if known.type in (int, float, bool, tuple[int, ...])]
    typed = {known.name: (Number if known.type is float else known.type, getattr(default, known.name))
             for known in simple if known.name not in _NAMED_BY}  # fmt: skip
    made = create_model(f"{name} section", __base__=_PlainConfig, name=(Literal[name], name), **typed)  # type: ignore[call-overload]
    made.made_of = type(default)
    section: type[_PlainConfig] = made
    return section


_NAMED_BY = ("per_position",)  # what the estimator's name already says
ESTIMATOR_SECTIONS: dict[str, type[MineConfig] | type[_PlainConfig]] = {
    name: MineConfig if name == "mine" else _plain_section(name) for name in ESTIMATORS
}


def _as_estimator(value: object) -> object:
    """A name or a mapping with one, validated by the section of that name."""
    mapping = {"name": value} if isinstance(value, str) else value
    if not isinstance(mapping, dict) or not isinstance(mapping.get("name"), str):
        raise ValueError(f"an estimator is a name or a mapping with one; legal: {', '.join(ESTIMATORS)}")
    if mapping["name"] not in ESTIMATORS:
        _raised_as_value_error(lambda: _unknown_estimator(mapping["name"]))
    return mapping


def _unknown_estimator(name: str) -> None:
    raise UnknownNameError("estimator", name, ESTIMATORS)


def _section_name(value: object) -> str | None:
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


AnyEstimator: Any = Annotated[
    Union[*(Annotated[section, Tag(name)] for name, section in ESTIMATOR_SECTIONS.items())],
    Discriminator(_section_name),
    BeforeValidator(_as_estimator),
]


def _legal_tier(tier: str) -> str:
    if tier not in TIERS:
        _raised_as_value_error(lambda: _unknown_tier(tier))
    return tier


def _unknown_tier(tier: str) -> None:
    raise UnknownNameError("tier", tier, TIERS)


class AttackConfig(_Section):
    """A tier by its name, or steps, sizes and restarts of one's own: on the cross-entropy, then on the margin."""

    made_of: ClassVar[type[Any] | None] = PGD

    tier: Annotated[str, AfterValidator(_legal_tier)] | None = None
    steps: int = PGD.steps
    relative_step: Number = PGD.relative_step
    restarts: int = PGD.restarts

    @field_validator("steps", "relative_step", "restarts")
    @classmethod
    def _alone(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("tier") is not None:
            raise ValueError(f"{info.field_name} and a tier exclude each other: a tier says how hard it searches")
        return value

    def attack(self) -> LabelAttack:
        """Return the tier's attack, or one's own; the audit tier where nothing is said."""
        own = self.model_fields_set - {"tier"}
        if not own:
            return TIERS[self.tier or "audit"]
        return two_losses(PGD(self.steps, self.relative_step, restarts=self.restarts))


def _as_attack(value: object) -> object:
    return {"tier": value} if isinstance(value, str) else value


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
    estimators: Annotated[tuple[AnyEstimator, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        ESTIMATOR_SECTIONS["sandwich"](),  # type: ignore[call-arg]
    )
    certificate: bool = False
    attack: Annotated[AttackConfig, BeforeValidator(_as_attack)] = AttackConfig()

    @field_validator("estimators")
    @classmethod
    def _distinct(cls, estimators: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [each.estimator().name for each in estimators]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice: tables tell estimators apart by name only")
        return estimators

    def settings(self) -> list[AuditSettings]:
        """Return, for each estimator, everything that decides numbers beside model, images and threat model."""
        attack = self.attack.attack()
        return [
            AuditSettings(each.estimator(), attack, self.seeds, self.reduce, self.certificate)
            for each in self.estimators
        ]

    def canonical(self) -> str:
        """Return the one spelling of this configuration."""
        return canonical_json(self.model_dump(mode="json"))
