"""What a value of a configuration may be, said once in words. Imports nothing that computes."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from math import inf
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from audit.errors import UnknownNameError

_Check = Callable[[Any, ValidationInfo], Any]


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


def as_list(value: object) -> list[object]:
    """Return a value that may be written alone as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def known(kind: str, name: str, legal: Iterable[str]) -> str:
    """Return a name that is in a table; raises ValueError with the nearest ones."""
    if name not in (names := tuple(legal)):
        raise ValueError(str(UnknownNameError(kind, name, names)))
    return name


def _least(low: int) -> _Check:
    def check(value: int, info: ValidationInfo) -> int:
        if value < low:
            raise ValueError(f"{info.field_name} {value!r} must be at least {low}")
        return value

    return check


def _inside(legal: Callable[[float], bool], words: str) -> _Check:
    def check(value: float, info: ValidationInfo) -> float:
        if not legal(value):
            raise ValueError(f"{info.field_name} {value!r} {words}")
        return value

    return check


def _all_positive(counts: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
    if any(count < 1 for count in counts):
        raise ValueError(f"{info.field_name} {counts!r} must each be at least 1")
    return counts


Number = Annotated[float, BeforeValidator(parse_number)]
Count = Annotated[int, AfterValidator(_least(1))]
Several = Annotated[int, AfterValidator(_least(2))]
Counts = Annotated[tuple[int, ...], AfterValidator(_all_positive)]
Positive = Annotated[Number, AfterValidator(_inside(lambda x: 0 < x < inf, "must be above 0 and finite"))]
NotNegative = Annotated[Number, AfterValidator(_inside(lambda x: 0 <= x < inf, "must be at least 0 and finite"))]
Share = Annotated[Number, AfterValidator(_inside(lambda x: 0 <= x < 1, "is outside [0, 1)"))]
StepSize = Annotated[
    Number, AfterValidator(_inside(lambda x: 0 < x <= 2, "is outside (0, 2]: it is a multiple of eps"))
]
Width = Annotated[Number, AfterValidator(_inside(lambda x: 1 <= x < inf, "must be at least 1 and finite"))]
Widths = tuple[Width, ...]
Names = Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)]
