"""`benchmark.yaml` into cells. The only module that knows YAML; it reports every fault at once, with its place."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from audit.errors import ConfigError, EnvironmentFault, suggestion
from audit.measurement import AuditSettings
from audit.sections import (
    ESTIMATOR_SECTIONS,
    AttackConfig,
    BenchmarkConfig,
    CriticConfig,
    ModelConfig,
    SearchConfig,
    ThreatConfig,
)
from audit.threat import ThreatModel

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000


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
            settings=settings,
        )
        for model in config.models
        for layer in model.layers or config.layers
        for settings in config.settings()
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
        "models": ModelConfig, "threats": ThreatConfig, "critic": CriticConfig, "search": SearchConfig,
        "attack": AttackConfig,
    }  # fmt: skip
    sections.update(ESTIMATOR_SECTIONS)
    for part in location[:-1]:
        section = sections.get(part, section)
    return list(section.model_fields)
