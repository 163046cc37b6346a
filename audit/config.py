"""`benchmark.yaml` into cells. The only module that knows YAML; it reports every fault at once, with its place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

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
        faults = sorted((_place(tree, tuple(item["loc"])), _fault(path, tree, item)) for item in error.errors())
        raise ConfigError([fault for _, fault in faults]) from error


def _parse(text: str, path: Path) -> CommentedMap:
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError([f"{place}: {str(error.problem).splitlines()[0]}"]) from error
    except ReaderError as error:
        lines = text[: error.position].split("\n")
        place = f"{path}:{len(lines)}:{len(lines[-1]) + 1}"
        raise ConfigError([f"{place}: the character {text[error.position]!r} is not legal in YAML"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: lists or mappings are nested too deeply"]) from error
    except ValueError as error:  # such as the date 2001-99-99
        raise ConfigError([f"{path}: a value cannot be read as YAML: {error}"]) from error
    if not isinstance(tree, CommentedMap):
        raise ConfigError([f"{path}:1:1: a benchmark is a mapping with name, dataset, models and threats"])
    if sum(1 for _ in _nodes(tree)) > _MOST_NODES:
        raise ConfigError([f"{path}: more than {_MOST_NODES:,} values (aliases that multiply?)"])
    tagged = {place: node.tag.value for node, place in _nodes(tree) if getattr(node, "tag", None) and node.tag.value}
    if tagged:
        places = [f"{path}:{line + 1}:{column + 1}" for line, column in sorted(tagged)]
        names = [tagged[place] for place in sorted(tagged)]
        raise ConfigError(
            [f"{place}: tags such as {name} are not legal here" for place, name in zip(places, names, strict=True)]
        )
    return tree


def _nodes(tree: CommentedMap) -> Iterator[tuple[Any, tuple[int, int]]]:
    """Walk the tree lazily and never past the cap: nested aliases grow exponentially."""
    stack: list[tuple[Any, tuple[int, int]]] = [(tree, (0, 0))]
    seen = 0
    while stack and seen <= _MOST_NODES:
        current, place = stack.pop()
        seen += 1
        yield current, place
        if isinstance(current, CommentedMap):
            stack.extend((value, _place_in(current, key, place)) for key, value in current.items())
        elif isinstance(current, CommentedSeq):
            stack.extend((value, _place_in(current, index, place)) for index, value in enumerate(current))


def _fault(path: Path, tree: CommentedMap, item: Any) -> str:
    location = tuple(item["loc"])
    line, column = _place(tree, location)
    where = ".".join(str(part) for part in location)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "model_type":
        message = "not a mapping with keys of its own"
    if item["type"] == "extra_forbidden":
        message = f"unknown key {location[-1]!r}{suggestion(str(location[-1]), _legal_keys(location))}"
        where = ".".join(str(part) for part in location[:-1])
    return f"{path}:{line}:{column}: {where + ': ' if where else ''}{message}"


def _place(tree: CommentedMap, location: tuple[Any, ...]) -> tuple[int, int]:
    """Return line and column, from one, of the deepest part of the location that the file has."""
    node: Any = tree
    place = (0, 0)
    for part in location:
        in_map = isinstance(node, CommentedMap) and part in node
        if in_map or (isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node)):
            place = _place_in(node, part, place)
            node = node[part]
    return place[0] + 1, place[1] + 1


def _place_in(node: Any, part: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Return line and column, from zero, of a part; a key merged in with `<<` has no place of its own."""
    places = node.lc.data or {}
    return tuple(places[part][:2]) if part in places else otherwise


def _legal_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = BenchmarkConfig
    sections: dict[object, type[BaseModel]] = {
        "models": ModelConfig, "threats": ThreatConfig, "estimator": EstimatorConfig, "critic": CriticConfig,
        "search": SearchConfig, "attack": AttackConfig,
    }  # fmt: skip
    for part in location[:-1]:
        section = sections.get(part, section)
    return list(section.model_fields)
