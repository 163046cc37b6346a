"""Find every fault of a benchmark file, with line and column: keys, values, names, files, hashes, layers.

Models are loaded, to try their layers on a small batch, only if keys and values are legal: without these, cells are
not defined. Everything before needs no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from audit.config.benchmark import BenchmarkConfig
from audit.config.yaml_source import Fault, Location, Source, check_schema, read_source
from audit.errors import AuditError


class Request(NamedTuple):
    """A model of the benchmark to try: its reference, images (None: all) and layers."""

    ref: str
    dataset: str
    images: int | None
    layers: tuple[str, ...]
    reduce: Literal["flatten", "mean"]
    preprocess: Literal["model", "none"] = "model"
    restrict_classes: bool = False
    balanced: bool = False


class Finding(NamedTuple):
    """An error and the part of a request at fault: `ref`, `dataset`, `images`, or the index of a layer."""

    part: str | int
    error: AuditError


Attempt = Callable[[Request], Iterable[Finding]]


@dataclass(frozen=True)
class Lookups:
    """Checks of model and data set references, which raise AuditError, and the trial of a model (None: no trial)."""

    model: Callable[[str], None]
    dataset: Callable[[str], None]
    attempt: Attempt | None = None


@dataclass(frozen=True)
class Verdict:
    """The faults of a file; `tried` is whether models were loaded and their layers computed."""

    source: Source
    faults: tuple[Fault, ...]
    tried: bool

    @property
    def lines(self) -> list[str]:
        """Return one line per fault, `file:line:column: where: message`."""
        return [self.source.line(fault) for fault in self.faults]

    @property
    def exit_code(self) -> int:
        """The largest code among the faults: 0 none, 2 the file, 3 something missing, 4 refused, 5 a hash differs."""
        return max((fault.exit_code for fault in self.faults), default=0)


def validate(path: Path, lookups: Lookups) -> Verdict:
    """Return every fault of a benchmark file.

    Raises EnvironmentFault for a file that cannot be read, ConfigError if it is not a YAML mapping.
    """
    source = read_source(path)
    config, faults = check_schema(source)
    faults += _name_faults(source, lookups)
    tried = config is not None and lookups.attempt is not None
    if config is not None and lookups.attempt is not None:
        faults += _trial_faults(source, config, lookups.attempt, {(fault.line, fault.column) for fault in faults})
    ordered = sorted(set(faults), key=lambda fault: (fault.line, fault.column, fault.message))
    return Verdict(source, tuple(ordered), tried)


def _name_faults(source: Source, lookups: Lookups) -> list[Fault]:
    """Return the faults of model references and data sets, whether or not keys and values are legal."""
    found = [_lookup_fault(source, place, ref, lookups.model) for place, ref in _references(source.tree)]
    found += [_lookup_fault(source, place, ref, lookups.dataset) for place, ref in _data_sets(source.tree)]
    return [fault for fault in found if fault is not None]


def _lookup_fault(source: Source, location: Location, name: str, look_up: Callable[[str], None]) -> Fault | None:
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


def _trial_faults(
    source: Source, config: BenchmarkConfig, attempt: Attempt, known: set[tuple[int, int]]
) -> list[Fault]:
    """Return the faults that trials of the models find, except at places with a known fault."""
    faults = []
    for number, model in enumerate(config.models):
        layers = model.layers or config.layers
        dataset, images = model.dataset or config.dataset, model.images or config.images
        rules = config.reduce, config.preprocess, config.restrict_classes, config.balanced
        for part, error in attempt(Request(model.ref, dataset, images, tuple(layers), *rules)):
            fault = source.fault(_location(source, number, part), _sentence(error), error.exit_code)
            if (fault.line, fault.column) not in known:
                faults.append(fault._replace(message=_message(fault, part, model.ref)))
    return faults


def _location(source: Source, number: int, part: str | int) -> Location:
    """Return the location of a part of a model: its own key if it has one, else that of the benchmark."""
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


def _message(fault: Fault, part: str | int, ref: str) -> str:
    """Return the message of a fault; with the model's name if the part may be shared by several models."""
    return fault.message if part == "ref" else f"{ref}: {fault.message}"


def _sentence(error: AuditError) -> str:
    return " ".join(str(error).split())


def to_rows(verdict: Verdict) -> list[dict[str, Any]]:
    """Return the faults as JSON data."""
    return [{"file": str(verdict.source.path), **fault._asdict()} for fault in verdict.faults]
