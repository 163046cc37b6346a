"""Values of benchmark files: numbers, lists, names, and the rules of settings as validators. Imports no torch."""

from collections.abc import Iterable
from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from audit.errors import UnknownNameError, UsageError
from audit.information.settings import Rule


def parse_number(value: object) -> float:
    """Return a number written as 0.03, 1e-3, 8/255 or 0.5/255; raises ValueError.

    >>> parse_number("8/255") == 8 / 255
    True
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}")
    try:
        numerator, *denominator = value.split("/", 1) if isinstance(value, str) else [value]
        found = float(numerator) / float(denominator[0]) if denominator else float(numerator)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}") from error
    if denominator and not isfinite(found):
        raise ValueError(f"not a number or fraction such as 8/255: {value!r}")
    return found


def as_list(value: object) -> list[object]:
    """Return a list or tuple as a list, and any other value as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def known(kind: str, name: str, legal: Iterable[str]) -> str:
    """Return a name of a table; raises ValueError with the nearest names for another one."""
    if name not in (names := tuple(legal)):
        raise ValueError(str(UnknownNameError(kind, name, names)))
    return name


def checked(rule: Rule) -> AfterValidator:
    """Return the validator of a rule of settings; errors begin with the name of the field."""

    def check(value: Any, info: ValidationInfo) -> Any:
        try:
            rule.check(str(info.field_name), value)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(check)


Number = Annotated[float, BeforeValidator(parse_number)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_list), Field(min_length=1)]
