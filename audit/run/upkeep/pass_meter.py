"""Progress of long work in passes of single images: done, expected, and the time that the rest will take.

How many passes a search takes depends on what it finds, so the expected number is rough; it is never below the number
done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from typing import NamedTuple

from audit.adversary.label_attack import LabelAttack, NearStage
from audit.adversary.memory.counting import counted_by
from audit.adversary.staged.attack import FEW_QUERIES, FEW_VERTICES
from audit.config.settings import AuditSettings
from audit.information.estimator import Estimator
from audit.information.probing.settings import LabelInformationSettings
from audit.information.settings import LabelEntropySettings, MineSettings, ReferenceSettings, SandwichSettings
from audit.run.upkeep.progress import in_words

_CHECKED, _CHECKS = 100, 25  # images that an attack is checked on, and passes of each
_SURVIVORS, _NEAR = 0.3, 0.1  # share of images that the first two stages of an attack leave; of those within reach
_ROUNDS_PLAYED = 0.5  # share of the rounds of a game before it ends
_JACOBIANS = 40  # of an image at a layer that is certified: from 5, all at one hub, to 100, most in no collision
_LEDGER = 75  # passes of an image that a ledger neither proves nor breaks at once
_EVERY = 1.0  # seconds between two reports


class PassMeter:
    """Reports a stage with its passes, at most once a second: `about 3 min left, 12,300 of about 50,000 passes`."""

    def __init__(self, report: Callable[[str], object]) -> None:
        self._report, self._stage = report, ""
        self._expected, self._done, self._began, self._last = 0.0, 0.0, 0.0, 0.0

    def stage(self, name: str) -> None:
        """Report the start of a stage."""
        self._stage, self._last = name, time.monotonic()
        self._report(self._text)

    @contextmanager
    def counting(self, expected: float) -> Iterator[None]:
        """Count and report the passes of the work inside, of which about so many are expected."""
        self._expected, self._done, self._began = expected, 0.0, time.monotonic()
        try:
            with counted_by(self._count):
                yield
        finally:
            self._done = 0.0

    def _count(self, images: float) -> None:
        self._done += images
        now = time.monotonic()
        if now - self._last >= _EVERY:
            self._last = now
            self._report(self._text)

    @property
    def passed(self) -> str:
        """The time left and the passes in words; empty before the first pass."""
        if not self._done:
            return ""
        expected = max(self._expected, 1.05 * self._done)
        left = (time.monotonic() - self._began) * (expected - self._done) / self._done
        return f"{in_words(left)} left, {self._done:,.0f} of about {_rounded(expected):,} passes"

    @property
    def _text(self) -> str:
        return ", ".join(filter(None, (self._stage, self.passed)))


class StageMeter(PassMeter):
    """A meter of work that consists of stages: called with a stage's name and the number of completed stages."""

    def __init__(self, watch: Callable[[str, int], None]) -> None:
        self._finished = 0
        super().__init__(lambda text: watch(text, self._finished))

    def __call__(self, stage: str, finished: int) -> None:
        """Report the start of a stage."""
        self._finished = finished
        self.stage(stage)


def _rounded(count: float) -> int:
    """Return a count rounded to two digits.

    >>> _rounded(123456), _rounded(7)
    (120000, 7)
    """
    unit = 10 ** max(0, len(str(int(count))) - 2)
    return round(count / unit) * unit


def expected_attack_passes(attack: LabelAttack, images: int, norm: str = "linf", *, checked: bool = True) -> float:
    """Return about how many passes an attack takes, if `checked` with its checks; one forward pass counts as one."""
    passes = 3.0
    for number, stage in enumerate((*attack.stages_in(norm), *attack.thorough_in(norm))):
        near = isinstance(stage, NearStage) and stage.reach < inf
        share = _NEAR if near else 1.0 if number < 2 else _SURVIVORS
        passes += share * stage.pgd.restarts * stage.pgd.steps * max(1, stage.targets)
    drawn = attack.noise + attack.queries
    few = min(attack.noise, FEW_VERTICES) + min(attack.queries, FEW_QUERIES) if attack.reaches_in(norm) else drawn
    passes += _SURVIVORS * few + _NEAR * (drawn - few)
    return images * passes + (_CHECKS * min(images, _CHECKED) if checked else 0)


class StagePasses(NamedTuple):
    """About how many passes each stage of an audit takes; one forward pass counts as one.

    `dimension` is the number of features of a layer that is certified.
    """

    settings: AuditSettings
    images: int
    dimension: int = 10
    norm: str = "linf"

    @property
    def attack(self) -> float:
        """Passes of the attack on the label with its checks."""
        return expected_attack_passes(self.settings.attack, self.images, self.norm)

    @property
    def head(self) -> float:
        """Passes of the attack on one head beside a certificate."""
        return expected_attack_passes(self.settings.attack, self.images, self.norm, checked=False)

    @property
    def normal(self) -> float:
        """Passes of the normal case of one seed."""
        return self.images * 8 / len(self.settings.seeds)

    def worst(self, seed: int) -> float:
        """Return the passes of the worst case of a seed: the first one costs most."""
        first, later = _seed_passes(self.settings.estimator, self.images)
        return self.images * (first if seed == self.settings.seeds[0] else later)

    @property
    def certificate(self) -> float:
        """Passes of the certificate of a layer, with the attack on its best head; 0 where none is asked for."""
        if not self.settings.certificate:
            return 0.0
        ledger = _LEDGER if self.settings.ledger else 0
        return self.head + self.images * (_JACOBIANS * (1 + self.dimension) / 2 + ledger)


def expected_passes(settings: AuditSettings, images: int, norm: str = "linf") -> float:
    """Return about how many passes the audit of one layer under one threat model takes, its attack included."""
    stages = StagePasses(settings, images, norm=norm)
    cases = sum(stages.normal + stages.worst(seed) for seed in settings.seeds)
    return stages.attack + cases + stages.certificate


def _seed_passes(estimator: Estimator, images: int) -> tuple[float, float]:
    """Return the passes an image of the worst-case search, for the first seed and for each later one."""
    if isinstance(estimator, SandwichSettings):
        starts = (len(estimator.quantisers) + 1) * estimator.start_steps + 56 * min(1.0, 50 / images)
        annealed = len(estimator.widths) * estimator.annealing_steps
        return starts + annealed + estimator.steps, max(estimator.annealing_steps, estimator.steps)
    if isinstance(estimator, LabelInformationSettings):
        played = estimator.steps * _ROUNDS_PLAYED * estimator.rounds
        return played, played
    found = 0.0
    if isinstance(estimator, LabelEntropySettings):
        found = estimator.kept * estimator.steps + estimator.targets
    elif isinstance(estimator, MineSettings):
        found = estimator.search.collapse_steps + estimator.search.rounds
    elif isinstance(estimator, ReferenceSettings):
        found = estimator.steps * (estimator.search_steps + 1) * estimator.batch_size / images
    return found, found
