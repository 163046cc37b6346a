"""Read the layers and threat models of a Python call, in every form that is unambiguous."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from audit.adversary.threat import Linf, ThreatModel, threat_model
from audit.config.values import parse_number
from audit.errors import UsageError

_Value = TypeVar("_Value")
_WITH_NORM = re.compile(r"\s*([A-Za-z]\w*)\s*[:\s=]\s*(.+)", re.S)
_LEGAL = "8/255, 'linf:8/255', 'l2:0.5', Linf(8 / 255), or a list of these"


def several(value: object) -> bool:
    """Return whether an argument is a list of values: a sequence or set, but no text and no mapping."""
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def layers_of(value: object) -> tuple[str, ...]:
    """Return the names of layers, given as a name or a list of names, each once; raises UsageError."""
    return _distinct("layer", [_layer(each) for each in _values(value)])


def threats_of(value: object) -> tuple[ThreatModel, ...]:
    """Return threat models, given as objects, radii in pixel units (l-inf) or text such as `l2:0.5`, one or a list.

    Raises UnknownNameError for an unknown norm, UsageError for a radius that is not legal or another value.
    """
    return _distinct("threat", [_threat(each) for each in _values(value)])


def _values(value: object) -> list[object]:
    return list(value) if isinstance(value, Iterable) and several(value) else [value]


def _layer(value: object) -> str:
    if isinstance(value, str) and value:
        return value
    legal = "'input', 'penultimate', 'logits' or a path such as 'layer3'; audit.layer_names(model) lists them"
    raise UsageError(f"layer {value!r} is not the name of a layer: write {legal}")


def _threat(value: object) -> ThreatModel:
    if isinstance(value, ThreatModel):
        return value
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return Linf(float(value))
    if not isinstance(value, str):
        shown = "missing" if value is None else f"{value!r}, which is no radius"
        raise UsageError(f"threat is {shown}: write {_LEGAL}")
    norm, eps = found.groups() if (found := _WITH_NORM.fullmatch(value)) else ("linf", value)
    try:
        return threat_model(norm, parse_number(eps.strip()))
    except ValueError as error:
        raise UsageError(f"threat {value!r}: {error}; write {_LEGAL}") from error


def _distinct(what: str, values: Sequence[_Value]) -> tuple[_Value, ...]:
    found = tuple(dict.fromkeys(values))
    if not found:
        raise UsageError(f"{what} is an empty list: name at least one")
    return found
