"""The limit of batches that holds for the work in progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from audit.errors import UsageError


class Limit(NamedTuple):
    """The largest number of images in a batch; a `fixed` one also replaces smaller numbers."""

    size: int
    fixed: bool = False


_limit: ContextVar[Limit | None] = ContextVar("limit of batches", default=None)


def current_limit() -> Limit | None:
    """Return the limit of the work in progress, None without one."""
    return _limit.get()


def allowed(most: int) -> int:
    """Return the number of images in a batch: `most`, or fewer where the work in progress is limited.

    A size set by `fixed_batches` replaces `most`, also by more.

    >>> with limited(Limit(8)):
    ...     allowed(4), allowed(256)
    (4, 8)
    """
    limit = _limit.get()
    if limit is None:
        return most
    return limit.size if limit.fixed else min(most, limit.size)


@contextmanager
def limited(limit: Limit) -> Iterator[None]:
    """Limit the batches of the work inside."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


@contextmanager
def fixed_batches(size: int) -> Iterator[None]:
    """Pass `size` images at a time through networks in the work inside; raises UsageError for a size below 1."""
    if size < 1:
        raise UsageError(f"batch size {size!r} must be at least 1")
    with limited(Limit(size, fixed=True)):
        yield
