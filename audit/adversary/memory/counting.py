"""Counting the passes of the work in progress, so that its progress can be shown."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[float], None]
"""Called with the number of images that have passed through a network, forward and backward or forward alone."""

_listener: ContextVar[Listener | None] = ContextVar("listener to passes", default=None)


def count_passes(images: float) -> None:
    """Tell the listener, if there is one, that images have passed through a network, or parts of it through all."""
    listener = _listener.get()
    if listener is not None:
        listener(images)


class PassCount:
    """Passes that a search has spent; those that are added are also told to the listener."""

    passes: float = 0.0

    def spend(self, passes: float) -> None:
        """Add passes."""
        self.passes += passes
        count_passes(passes)


@contextmanager
def counted_by(listener: Listener) -> Iterator[None]:
    """Count the passes of the work inside; a listener around it goes on counting."""
    outer = _listener.get()

    def both(images: float) -> None:
        listener(images)
        if outer is not None:
            outer(images)

    token = _listener.set(both)
    try:
        yield
    finally:
        _listener.reset(token)
