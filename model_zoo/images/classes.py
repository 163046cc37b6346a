"""Map the classes of a data set to the outputs of a network: by ImageNet's names, by other names, or by a file."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from audit.errors import EnvironmentFault, MismatchError, UsageError
from model_zoo.untrusted import check_file, printable

_MAX_MAP_BYTES = 10_000_000
_SHOWN = 3
_WNID = "wnid"
_FEWEST_OF_IMAGENET = 1000  # classes of the subsets that timm names


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network: how many, their names where they are known, and the model's name for messages."""

    model: str
    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassMap:
    """The network's output of every class of a data set, and what decided: `order`, `number`, `wnid`, `name`, `file`.

    With `restricted`, the network's other outputs do not compete: the network is reduced to these outputs, in this
    order.
    """

    outputs: tuple[int, ...]
    by: str
    restricted: bool = False

    def renumbered(self, labels: Tensor) -> Tensor:
        """Return labels (N,) of the data set's classes as labels of the outputs that compete."""
        return labels if self.restricted else torch.tensor(self.outputs, device=labels.device)[labels]


def map_classes(classes: Sequence[str], outputs: Outputs, ref: str, *, numbered: bool = False) -> ClassMap:
    """Return the output of each class of a data set; `numbered` classes have no names but their numbers.

    Numbers are those of the outputs where there are as many of both, and for ImageNet's outputs, whose order is known.
    Raises MismatchError, with the first names of both sides, where they cannot be told from the names.
    """
    named = _by_name(classes, outputs)
    if named is not None:
        return named
    if len(classes) == outputs.count:
        return ClassMap(tuple(range(outputs.count)), "order")
    if numbered and len(classes) < outputs.count and _imagenet(outputs):
        return ClassMap(tuple(range(len(classes))), "number")
    raise MismatchError(_refusal(classes, outputs, ref))


def _by_name(classes: Sequence[str], outputs: Outputs) -> ClassMap | None:
    """Return the map by the network's own names, else by ImageNet's; None where not every class has one output."""
    if found := _places(classes, [[name] for name in outputs.names]):
        return ClassMap(found, "name")
    if outputs.names:
        return None
    known = _imagenet(outputs)
    if found := _places(classes, [[wnid] for wnid, _ in known]):
        return ClassMap(found, _WNID)
    found = _places(classes, [[text] for _, text in known])  # in full, because some first names are shared
    found = found or _places(classes, [[text, *text.split(",")[:1]] for _, text in known])
    return ClassMap(found, "name") if found else None


def _imagenet(outputs: Outputs) -> list[tuple[str, str]]:
    """Return wnid and description of outputs that are ImageNet's by their number, [] for others."""
    if outputs.count < _FEWEST_OF_IMAGENET:
        return []  # timm takes two seconds to load
    from model_zoo.libraries import imagenet_names

    return imagenet_names(outputs.count)


def _places(classes: Sequence[str], names: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Return the place of each class among names, () unless each has exactly one and no two share it."""
    spelled = [{_plain(name) for name in each if name} for each in names]
    counts = Counter(name for each in spelled for name in each)
    place = {name: number for number, each in enumerate(spelled) for name in each if counts[name] == 1}
    found = [place.get(_plain(name)) for name in classes]
    if not classes or any(number is None for number in found) or len(set(found)) < len(found):
        return ()
    return tuple(number for number in found if number is not None)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _refusal(classes: Sequence[str], outputs: Outputs, ref: str) -> str:
    known: Sequence[str] = outputs.names
    if not known:
        known = [f"{wnid} ({text})" for wnid, text in _imagenet(outputs)]
    message = f"{outputs.model} has {outputs.count} outputs, data set {ref} has {len(classes)} classes"
    if len(classes) > outputs.count:
        return message
    sides = f"the classes {_first(classes)} are not among the outputs" + (f" {_first(known)}" if known else "")
    return f"{message}: {sides}; say which output each class is, with {ref}?classes=map.json"


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 40) for name in names[:_SHOWN])
    return shown + (", ..." if len(names) > _SHOWN else "")


def read_class_map(path: Path, classes: Sequence[str], outputs: Outputs, ref: str) -> ClassMap:
    """Return the map of a JSON file: a mapping from every class of the data set to an output's number or name.

    A list is the names of the network's outputs in order. Raises EnvironmentFault for an unreadable file, UsageError
    for another content, MismatchError for classes or outputs that do not exist.
    """
    held = read_class_file(path)
    if isinstance(held, list):
        if len(held) != outputs.count:
            raise MismatchError(f"{path} names {len(held)} outputs, {outputs.model} has {outputs.count}")
        return map_classes(classes, Outputs(outputs.model, outputs.count, tuple(map(str, held))), ref)
    place = {_plain(name): number for number, name in enumerate(outputs.names)}
    found = []
    for name in classes:
        if name not in held:
            message = f"{path} has no entry for the class {printable(name)!r} of {ref}"
            raise MismatchError(f"{message}; it has {_first(list(held))}")
        value = held[name]
        number = place.get(_plain(value)) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < outputs.count:
            message = f"{path} maps {printable(name)!r} to {printable(repr(value), 40)}"
            raise MismatchError(f"{message}; {outputs.model} has the outputs 0 to {outputs.count - 1}")
        found.append(number)
    return ClassMap(tuple(found), "file")


def read_class_file(path: Path) -> Mapping[str, Any] | list[Any]:
    """Return the mapping or list of a JSON file; raises EnvironmentFault, UsageError."""
    if not path.exists():
        raise EnvironmentFault(f"class map {path} does not exist; write a JSON file such as " + '{"cat": 281}')
    check_file(path, _MAX_MAP_BYTES)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON; write a mapping such as " + '{"cat": 281}') from error
    if not isinstance(held, dict | list) or not held:
        raise UsageError(f"{path} is neither a mapping from classes to outputs, nor a list of output names")
    return held
