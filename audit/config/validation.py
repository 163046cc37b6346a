"""Every fault of a benchmark file in one go, each with its line and column: keys, names, files, hashes, layers.

Nothing is computed for the first four. What loading a model shows - its layers and shapes on one small batch - is
asked for only where the keys and values are right: cells are not defined before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from audit.config.benchmark import BenchmarkConfig
from audit.config.yaml_source import Fault, Location, Source, check_schema, read_source
from audit.errors import AuditError


class Request(NamedTuple):
    """What the benchmark asks of one model: to be loaded, to take these images, to have these layers."""

    ref: str
    dataset: str
    images: int | None
    layers: tuple[str, ...]
    reduce: str


class Finding(NamedTuple):
    """What was wrong with one part of a request: `ref`, `dataset`, `images`, or the layer's number."""

    part: str | int
    error: AuditError


Attempt = Callable[[Request], Iterable[Finding]]


@dataclass(frozen=True)
class Lookups:
    """How names are looked up, and how a model is tried on a small batch; the latter None to leave it out."""

    model: Callable[[str], None]
    dataset: Callable[[str], None]
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found in a file; `tried` says whether models were loaded and layers looked at."""

    source: Source
    faults: tuple[Fault, ...]
    tried: bool

    @property
    def lines(self) -> list[str]:
        """Return one line a fault, `file:line:column: where: what`."""
        return [self.source.line(fault) for fault in self.faults]

    @property
    def exit_code(self) -> int:
        """Return 0, or the gravest fault's: 2 the file, 3 something missing here, 4 refused, 5 another hash."""
        return max((fault.exit_code for fault in self.faults), default=0)


def validate(path: Path, lookups: Lookups) -> Verdict:
    """Return every fault of a benchmark file.

    Raises EnvironmentFault where it cannot be read, ConfigError where it is no YAML mapping.
    """
    source = read_source(path)
    config, faults = check_schema(source)
    faults += _named(source, lookups)
    tried = config is not None and lookups.attempt is not None
    if config is not None and lookups.attempt is not None:
        faults += _attempted(source, config, lookups.attempt, {(fault.line, fault.column) for fault in faults})
    ordered = sorted(set(faults), key=lambda fault: (fault.line, fault.column, fault.message))
    return Verdict(source, tuple(ordered), tried)


def _named(source: Source, lookups: Lookups) -> list[Fault]:
    """Return the faults of the model references and data sets in the file, whatever else is wrong with it."""
    found = [_looked_up(source, place, ref, lookups.model) for place, ref in _references(source.tree)]
    found += [_looked_up(source, place, ref, lookups.dataset) for place, ref in _data_sets(source.tree)]
    return [fault for fault in found if fault is not None]


def _looked_up(source: Source, location: Location, name: str, look_up: Callable[[str], None]) -> Fault | None:
    try:
        look_up(name)
    except AuditError as error:
        return source.fault(location, _sentence(error), error.exit_code)
    return None


def _references(tree: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    models = tree.get("models")
    if isinstance(models, str):
        yield ("models",), models
    for number, item in enumerate(models if isinstance(models, list) else []):
        if isinstance(item, str):
            yield ("models", number), item
        elif isinstance(item, dict) and isinstance(item.get("ref"), str):
            yield ("models", number, "ref"), item["ref"]


def _data_sets(tree: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    models: Any = tree.get("models")
    parts: list[tuple[Location, Any]] = [((), tree)]
    parts += [(("models", number), item) for number, item in enumerate(models if isinstance(models, list) else [])]
    for location, part in parts:
        if isinstance(part, dict) and isinstance(part.get("dataset"), str):
            yield (*location, "dataset"), part["dataset"]


def _attempted(source: Source, config: BenchmarkConfig, attempt: Attempt, known: set[tuple[int, int]]) -> list[Fault]:
    """Return what loading the models and looking at their layers shows, beside what names have shown already."""
    faults = []
    for number, model in enumerate(config.models):
        layers = model.layers or config.layers
        dataset, images = model.dataset or config.dataset, model.images or config.images
        for part, error in attempt(Request(model.ref, dataset, images, tuple(layers), config.reduce)):
            fault = source.fault(_location(source, number, part), _sentence(error), error.exit_code)
            if (fault.line, fault.column) not in known:
                faults.append(fault._replace(message=_about(fault, part, model.ref)))
    return faults


def _location(source: Source, number: int, part: str | int) -> Location:
    """Return the place of a reference, a data set or a layer: the model's own, else the benchmark's."""
    entries = source.tree["models"]
    entry = entries[number] if isinstance(entries, list) else entries
    own: Location = ("models", number) if isinstance(entries, list) else ("models",)
    if part == "ref":
        return (*own, "ref") if isinstance(entry, dict) else own
    name = part if isinstance(part, str) else "layers"
    has_own = isinstance(entry, dict) and entry.get(name) is not None
    place: Location = (*own, name) if has_own else (name,)
    holder = entry[name] if has_own else source.tree.get(name)
    return (*place, part) if isinstance(holder, list) else place


def _about(fault: Fault, part: str | int, ref: str) -> str:
    """A shared layer is right for one model and wrong for another: say for which."""
    return fault.message if part == "ref" else f"{ref}: {fault.message}"


def _sentence(error: AuditError) -> str:
    return " ".join(str(error).split())


def to_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """Return the faults as plain data, for machines."""
    return [{"file": str(verdict.source.path), **fault._asdict()} for fault in verdict.faults]
