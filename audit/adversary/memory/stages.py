"""CPU seconds and passes of each stage of the work in progress, each counted in the innermost stage alone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from audit.adversary.memory.counting import counted_by


@dataclass
class StageCost:
    """CPU seconds of all threads, images passed through a network, and passes that the result of the stage states.

    `passed` counts every image that went through a network, forward alone or with its backward pass. `needed` is what
    the search of a stage counts itself, None for a stage without such a count.
    """

    seconds: float = 0.0
    passed: float = 0.0
    needed: float | None = None


class Profile:
    """Costs by the name of the stage, in the order in which stages began."""

    def __init__(self) -> None:
        self.costs: dict[str, StageCost] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Charge the work inside to a stage, and no longer to the one around it."""
        self._charge()
        self.costs.setdefault(name, StageCost())
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    @contextmanager
    def measured(self, rest: str) -> Iterator[None]:
        """Charge the stages inside, and work in no stage to `rest`."""
        token = _profile.set(self)
        try:
            with counted_by(self._count), self.stage(rest):
                yield
        finally:
            _profile.reset(token)

    def need(self, passes: float) -> None:
        """State how many passes the result of the innermost stage took; ignored where it was there before."""
        cost = self.costs[self._open[-1]]
        if cost.passed > 0:
            cost.needed = (cost.needed or 0.0) + passes

    def since_last(self) -> dict[str, dict[str, float | None]]:
        """Return the costs as `to_dict` does, and begin again at zero."""
        self._charge()
        found, self.costs = self.to_dict(), {name: StageCost() for name in self._open}
        return found

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """Return the costs as JSON data, rounded to milliseconds and tenths of a pass."""
        return {
            name: {
                "seconds": round(cost.seconds, 3),
                "passed": round(cost.passed, 1),
                "needed": None if cost.needed is None else round(cost.needed, 1),
            }
            for name, cost in self.costs.items()
        }

    def _charge(self) -> None:
        now = time.process_time()
        if self._open:
            self.costs[self._open[-1]].seconds += now - self._mark
        self._mark = now

    def _count(self, images: float) -> None:
        self.costs[self._open[-1]].passed += images


_profile: ContextVar[Profile | None] = ContextVar("profile of the work in progress", default=None)


def needed(passes: float) -> None:
    """State how many passes the result of the innermost stage took, as its search counts them."""
    profile = _profile.get()
    if profile is not None:
        profile.need(passes)


def costs_since_last() -> dict[str, dict[str, float | None]]:
    """Return the costs of the work in progress since the last call; none where they are not measured."""
    profile = _profile.get()
    return {} if profile is None else profile.since_last()


@contextmanager
def measured(rest: str) -> Iterator[None]:
    """Measure the stages of the work inside, and work in no stage as `rest`; see `costs_since_last`."""
    with Profile().measured(rest):
        yield


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Charge the work inside to a stage of the profile of the work in progress, if there is one."""
    profile = _profile.get()
    if profile is None:
        yield
        return
    with profile.stage(name):
        yield
