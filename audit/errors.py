"""Exceptions shown to the user, each with one sentence and the exit code of the command line."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AuditError(Exception):
    """Base class; `exit_code` is the exit code of the command line."""

    exit_code = 1


class InvalidModelError(AuditError):
    """The model cannot be evaluated, for example because weights or outputs are not finite."""


class UsageError(AuditError):
    """An argument or setting is not legal; the message names the legal values."""

    exit_code = 2


class UnknownNameError(UsageError):
    """An unknown name; the message suggests the nearest legal names."""

    def __init__(self, kind: str, value: str, legal: Iterable[str]) -> None:
        names = sorted(set(legal))
        super().__init__(f"unknown {kind} {value!r}{suggestion(value, names)}")


class ConfigError(UsageError):
    """All faults of one configuration file, each with its line and column."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class MismatchError(UsageError):
    """Model, data set and settings do not match (classes, channels, image size, architecture)."""


class EnvironmentFault(AuditError):
    """A missing resource: a file, a device, the network, disk space."""

    exit_code = 3


class CheckpointError(EnvironmentFault):
    """An unreadable weights file; `kind` is `empty`, `truncated`, `html` or `not_a_checkpoint`."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class UnsafeError(AuditError):
    """Refused for safety: loading would run code or exhaust memory."""

    exit_code = 4


class IntegrityError(AuditError):
    """A hash or a record does not match its content."""

    exit_code = 5


def suggestion(value: str, legal: Sequence[str]) -> str:
    """Return the end of an error message: the nearest legal names, and all of them if there are at most 12.

    >>> suggestion("lnf", ["linf", "l2", "l1"])
    "; did you mean 'linf'? Legal: l1, l2, linf"
    """
    near = get_close_matches(value, legal, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    if len(legal) <= 12:
        return f"{meant} Legal: {', '.join(sorted(legal))}" if legal else f"{meant} none is known"
    return meant if near else f"; {len(legal)} names are known, none of them similar"
