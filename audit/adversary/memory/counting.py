"""Counting the passes of the work in progress, so that its progress can be shown."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[int], None]
"""Called with the number of images that have passed through a network, forward and backward or forward alone."""

_listener: ContextVar[Listener | None] = ContextVar("listener to passes", default=None)


def count_passes(images: int) -> None:
    """Tell the listener, if there is one, that images have passed through a network."""
    listener = _listener.get()
    if listener is not None:
        listener(images)


@contextmanager
def counted_by(listener: Listener) -> Iterator[None]:
    """Count the passes of the work inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
