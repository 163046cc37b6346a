"""`benchmark.yaml` into cells. The only module that knows YAML; it reports every fault at once, with its place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError

from audit.accuracy import LabelAttack
from audit.critics import CriticShape
from audit.errors import AuditError, ConfigError, EnvironmentFault, suggestion
from audit.information import CriticTraining
from audit.measurement import AuditSettings
from audit.pgd import PGD
from audit.records import canonical_json
from audit.threat import ThreatModel, threat_model
from audit.vulnerability import WorstCaseSearch

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000


def parse_number(value: object) -> float:
    """Return a number written as 0.03, 1e-3 or 8/255.

    >>> parse_number("8/255") == 8 / 255
    True
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}")
    try:
        return float(Fraction(value.replace(" ", ""))) if isinstance(value, str) else float(value)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}") from error


def _as_tuple(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


Number = Annotated[float, BeforeValidator(parse_number)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


def _raised_as_value_error(make: Callable[[], object]) -> None:
    """Pydantic collects ValueErrors; our own errors would end the reading at the first fault."""
    try:
        make()
    except AuditError as error:
        raise ValueError(str(error)) from error


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ThreatConfig(_Section):
    """A norm and one or more radii in pixel units."""

    norm: str = "linf"
    eps: Numbers

    @model_validator(mode="after")
    def _legal(self) -> "ThreatConfig":
        _raised_as_value_error(self.models)
        return self

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

    name: str = CriticShape.name
    width: int = CriticShape.width
    embedding: int = CriticShape.embedding
    channels: int = CriticShape.channels
    view: int = CriticShape.view
    dropout: Number = CriticShape.dropout
    flip: bool = CriticShape.flip


class EstimatorConfig(_Section):
    """How MI is estimated; see `audit.information.CriticTraining`."""

    name: Literal["mine"] = "mine"
    bound: str = CriticTraining.bound
    steps: int = CriticTraining.steps
    batch_size: int = CriticTraining.batch_size
    learning_rate: Number = CriticTraining.learning_rate
    weight_decay: Number = CriticTraining.weight_decay
    every: int = CriticTraining.every
    patience: int = CriticTraining.patience
    critic: CriticConfig = CriticConfig()

    @model_validator(mode="after")
    def _legal(self) -> "EstimatorConfig":
        _raised_as_value_error(self.training)
        return self

    def training(self) -> CriticTraining:
        """Return the settings as the estimator takes them."""
        values = self.model_dump(exclude={"name", "critic"})
        return CriticTraining(**values, shape=CriticShape(**self.critic.model_dump()))


class SearchConfig(_Section):
    """How the worst case is searched; see `audit.vulnerability.WorstCaseSearch`."""

    collapse_steps: int = WorstCaseSearch.collapse_steps
    rounds: int = WorstCaseSearch.rounds
    relative_step: Number = WorstCaseSearch.relative_step
    critic_steps: int = WorstCaseSearch.critic_steps

    @model_validator(mode="after")
    def _legal(self) -> "SearchConfig":
        _raised_as_value_error(self.search)
        return self

    def search(self) -> WorstCaseSearch:
        """Return the settings as the search takes them."""
        return WorstCaseSearch(**self.model_dump())


class AttackConfig(_Section):
    """The attack that measures adversarial accuracy: PGD on the cross-entropy, then on the margin for survivors."""

    steps: int = PGD.steps
    relative_step: Number = PGD.relative_step
    restarts: int = PGD.restarts

    @model_validator(mode="after")
    def _legal(self) -> "AttackConfig":
        _raised_as_value_error(self.attack)
        return self

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
    seeds: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = AuditSettings().seeds
    reduce: Literal["flatten", "mean"] = "flatten"
    estimator: EstimatorConfig = EstimatorConfig()
    search: SearchConfig = SearchConfig()
    attack: AttackConfig = AttackConfig()

    @model_validator(mode="after")
    def _legal(self) -> "BenchmarkConfig":
        _raised_as_value_error(self.settings)
        return self

    def settings(self) -> AuditSettings:
        """Return everything that decides numbers beside model, images and threat model."""
        return AuditSettings(
            self.estimator.training(), self.search.search(), self.attack.attack(), self.seeds, self.reduce
        )

    def canonical(self) -> str:
        """Return the one spelling of this configuration."""
        return canonical_json(self.model_dump(mode="json"))


@dataclass(frozen=True)
class Cell:
    """One thing to audit: a model at a layer under a threat model, on the first `images` images of a data set."""

    ref: str
    name: str | None
    dataset: str
    images: int | None
    layer: str
    threat: ThreatModel
    settings: AuditSettings


def cells(config: BenchmarkConfig) -> list[Cell]:
    """Return a benchmark's cells, all of one model together."""
    return [
        Cell(
            ref=model.ref,
            name=model.name,
            dataset=model.dataset or config.dataset,
            images=model.images or config.images,
            layer=layer,
            threat=threat,
            settings=config.settings(),
        )
        for model in config.models
        for layer in model.layers or config.layers
        for section in model.threats or config.threats
        for threat in section.models()
    ]


def read_config(path: Path) -> BenchmarkConfig:
    """Return the benchmark a YAML file describes.

    Raises EnvironmentFault where it cannot be read, ConfigError naming file, line and column of every fault.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError([f"{path} is larger than {_MOST_BYTES:,} bytes: no benchmark is"])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 text: {error.reason}"]) from error
    tree = _parse(text, path)
    try:
        return BenchmarkConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_fault(path, tree, item) for item in error.errors()]) from error


def _parse(text: str, path: Path) -> CommentedMap:
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError([f"{place}: {str(error.problem).splitlines()[0]}"]) from error
    if not isinstance(tree, CommentedMap):
        raise ConfigError([f"{path}:1:1: a benchmark is a mapping with name, dataset, models and threats"])
    if sum(1 for _ in _nodes(tree)) > _MOST_NODES:
        raise ConfigError([f"{path}: more than {_MOST_NODES:,} values (aliases that multiply?)"])
    tagged = next((node for node in _nodes(tree) if isinstance(node, TaggedScalar)), None)
    if tagged is not None:
        raise ConfigError([f"{path}: tags such as {tagged.tag.value} are not legal here"])
    return tree


def _nodes(node: object) -> Iterator[object]:
    """Walk the tree lazily and never past the cap: nested aliases grow exponentially."""
    stack, seen = [node], 0
    while stack and seen <= _MOST_NODES:
        current = stack.pop()
        seen += 1
        yield current
        if isinstance(current, CommentedMap):
            stack.extend(current.values())
        elif isinstance(current, CommentedSeq):
            stack.extend(current)


def _fault(path: Path, tree: CommentedMap, item: Any) -> str:
    location = tuple(item["loc"])
    line, column = _place(tree, location)
    where = ".".join(str(part) for part in location)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = f"unknown key {location[-1]!r}{suggestion(str(location[-1]), _legal_keys(location))}"
        where = ".".join(str(part) for part in location[:-1])
    return f"{path}:{line}:{column}: {where + ': ' if where else ''}{message}"


def _place(tree: CommentedMap, location: tuple[Any, ...]) -> tuple[int, int]:
    """Return line and column, from one, of the deepest part of the location that the file has."""
    node: Any = tree
    place = (0, 0)
    for part in location:
        if isinstance(node, CommentedMap) and part in node:
            place = node.lc.key(part)
        elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
            place = node.lc.item(part)
        else:
            continue
        node = node[part]
    return place[0] + 1, place[1] + 1


def _legal_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = BenchmarkConfig
    sections: dict[object, type[BaseModel]] = {
        "models": ModelConfig, "threats": ThreatConfig, "estimator": EstimatorConfig, "critic": CriticConfig,
        "search": SearchConfig, "attack": AttackConfig,
    }  # fmt: skip
    for part in location[:-1]:
        section = sections.get(part, section)
    return list(section.model_fields)
