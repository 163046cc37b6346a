"""Read benchmark files: YAML into sections, and every fault with its line and column. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from audit.config.benchmark import AttackConfig, BenchmarkConfig, ModelConfig, ThreatConfig
from audit.config.estimators import ESTIMATOR_SECTIONS
from audit.errors import ConfigError, EnvironmentFault, suggestion

_MOST_BYTES = 1_000_000
_MOST_NODES = 100_000

Location = tuple[str | int, ...]
"""Keys and indices that lead to a value, from the top."""


class Fault(NamedTuple):
    """One fault of a file: line and column from 1, keys of the value, message, and exit code."""

    line: int
    column: int
    where: str
    message: str
    exit_code: int = 2


@dataclass(frozen=True)
class Source:
    """A parsed YAML file, not yet validated."""

    path: Path
    tree: CommentedMap

    def fault(self, location: Location, message: str, exit_code: int = 2) -> Fault:
        """Return a fault at a location such as `("models", 2, "ref")`, or at its deepest part that the file has."""
        line, column = _place(self.tree, location)
        return Fault(line, column, ".".join(map(str, location)), message, exit_code)

    def line(self, fault: Fault) -> str:
        """Return a fault as a line `file:line:column: where: message`, a form that editors recognise."""
        where = f"{fault.where}: " if fault.where else ""
        return f"{self.path}:{fault.line}:{fault.column}: {where}{fault.message}"


def read_source(path: Path) -> Source:
    """Parse a YAML file, keeping the line and column of every value.

    Raises EnvironmentFault for a file that cannot be read, ConfigError if it is not a plain YAML mapping.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError([f"{path} is larger than {_MOST_BYTES:,} bytes, the limit of a benchmark file"])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path} is not UTF-8 text: {error.reason}"]) from error
    return Source(path, _parse(text, path))


def check_schema(source: Source) -> tuple[BenchmarkConfig | None, list[Fault]]:
    """Return the benchmark of a file, or None and the faults of its keys and values in the order of the file."""
    try:
        return BenchmarkConfig.model_validate(source.tree), []
    except ValidationError as error:
        faults = [_fault(source, item) for item in error.errors()]
        return None, sorted(faults, key=lambda fault: (fault.line, fault.column, source.line(fault)))


def read_config(path: Path) -> BenchmarkConfig:
    """Return the benchmark of a YAML file.

    Raises EnvironmentFault for a file that cannot be read, ConfigError with file, line and column of every fault.
    """
    source = read_source(path)
    config, faults = check_schema(source)
    if config is None:
        raise ConfigError([source.line(fault) for fault in faults])
    return config


def to_yaml(config: BenchmarkConfig) -> str:
    """Return a benchmark as YAML that reads back as the same benchmark."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(data: object) -> str:
    """Return plain JSON data as YAML that reads back as the same data."""
    text = StringIO()
    writer = YAML(typ="safe", pure=True)
    writer.allow_unicode, writer.width = False, 100_000  # escapes, so that every character is read back
    writer.default_flow_style = False
    writer.dump(data, text)
    return re.sub(r"(?m)(?<=[:-] )(-?\d+)e([+-]\d+)$", r"\1.0e\2", text.getvalue())  # YAML 1.1 reads 1e-05 as text


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
    """Yield nodes and places lazily, up to the limit of nodes: nested aliases grow exponentially."""
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


def _fault(source: Source, item: Any) -> Fault:
    location, message = tuple(item["loc"]), item["msg"].removeprefix("Value error, ")
    found = source.fault(location, message)
    if item["type"] == "model_type":
        return found._replace(message="not a mapping")
    if item["type"] == "extra_forbidden":
        near = suggestion(str(location[-1]), _legal_keys(location))
        return found._replace(where=".".join(map(str, location[:-1])), message=f"unknown key {location[-1]!r}{near}")
    return found


def _place(tree: CommentedMap, location: tuple[Any, ...]) -> tuple[int, int]:
    """Return line and column, from one, of the deepest part of a location that the file has."""
    node: Any = tree
    place = (0, 0)
    for part in location:
        in_map = isinstance(node, CommentedMap) and part in node
        if in_map or (isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node)):
            place = _place_in(node, part, place)
            node = node[part]
    return place[0] + 1, place[1] + 1


def _place_in(node: Any, part: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Return line and column, from zero, of a part, or `otherwise` for a key merged in by `<<`."""
    places = node.lc.data or {}
    return tuple(places[part][:2]) if part in places else otherwise


def _legal_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = BenchmarkConfig
    sections: dict[object, type[BaseModel]] = {
        "models": ModelConfig,
        "threats": ThreatConfig,
        "attack": AttackConfig,
    }
    sections.update(ESTIMATOR_SECTIONS)
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            section = field.annotation
        else:
            section = sections.get(part, section)
    return list(section.model_fields)
