"""The error tree: every user-facing failure is one sentence and one exit code.

Imports nothing of ours, so every layer may raise these.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class AuditError(Exception):
    """Root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class InvalidModelError(AuditError):
    """The model loads but cannot be given a number (non-finite weights or outputs, a random forward...)."""


class UsageError(AuditError):
    """Something the user wrote is not legal; the message says what is."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that is in no table; carries its nearest matches."""

    def __init__(self, kind: str, value: str, legal: Iterable[str]) -> None:
        names = sorted(set(legal))
        super().__init__(f"unknown {kind} {value!r}{suggestion(value, names)}")


class ConfigError(UsageError):
    """Every fault of one configuration file, each with its line and column."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class MismatchError(UsageError):
    """Model, data set and request do not fit together (classes, channels, size, architecture)."""


class EnvironmentFault(AuditError):
    """The machine lacks something: a file, a device, the network, room on the disk."""

    exit_code = 3


class CheckpointError(EnvironmentFault):
    """A weights file that cannot be read; `kind` is one of empty, truncated, html, not_a_checkpoint."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class UnsafeError(AuditError):
    """Refused for safety: reading on would run code or exhaust the machine."""

    exit_code = 4


class IntegrityError(AuditError):
    """What is there is not what was promised: a hash or a record does not agree."""

    exit_code = 5


def suggestion(value: str, legal: Sequence[str]) -> str:
    """Return the tail of a sentence: the nearest legal names, or all of them when they are few.

    >>> suggestion("lnf", ["linf", "l2", "l1"])
    "; did you mean 'linf'? Legal: l1, l2, linf"
    """
    near = get_close_matches(value, legal, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
    if len(legal) <= 12:
        return f"{meant} Legal: {', '.join(sorted(legal))}" if legal else f"{meant} none is known"
    return meant if near else f"; {len(legal)} names are known, none of them near"
