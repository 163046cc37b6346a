"""Checks of attacks and of networks: rules, results, and the verdict on a robust accuracy.

An attack that is too weak leaves many images unbroken, so that the network only seems robust. `check_rules` has the
table of all rules; the checks are made in `gradient_checks` (of a network or an objective), `comparison_checks` (of
two attacks) and `audit.run.sanity_checks` (of a loaded model).

Source: Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Athalye, Carlini & Wagner 2018, "Obfuscated
Gradients Give a False Sense of Security".
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from audit.adversary.passes import DRAWS

Level = Literal["trust", "note", "gate"]

UPPER_BOUND = "upper bound, attack not trustworthy"
"""Verdict on the robust accuracy of a network that fails a check of level "trust"."""

RANDOMISED = f"randomised: majority verdict of {DRAWS} draws, no point estimate"
"""Verdict on the robust accuracy of a network whose outputs are random."""


class Check(NamedTuple):
    """Result of one check.

    `id` is a key of `check_rules.RULES` and `name` its title. `passed` is None where the check does not apply;
    `reason` explains that, or a failure. `figure` is the measured value (None without one), `criterion` the condition
    for passing. `passes` counts forward+backward passes of single images.
    """

    id: str
    name: str
    level: Level
    passed: bool | None
    figure: float | None
    criterion: str
    reason: str = ""
    passes: int = 0


class Rule(NamedTuple):
    """Definition of a check: `{limit}` in `criterion` is replaced by `limit`; `failure` says what a failure means."""

    id: str
    name: str
    level: Level
    criterion: str
    failure: str
    limit: float = 0.0

    def result(self, *, passed: bool, figure: float | None = None, reason: str = "", passes: int = 0) -> Check:
        """Return the result of a check that was made."""
        criterion = self.criterion.format(limit=self.limit)
        return Check(self.id, self.name, self.level, passed, figure, criterion, reason, passes)

    def at_most(self, figure: float, passes: int = 0) -> Check:
        """Return the result of a check that passes if its figure is at most the limit; NaN fails."""
        return self.result(passed=figure <= self.limit, figure=figure, passes=passes)

    def skipped(self, reason: str) -> Check:
        """Return the result of a check that does not apply, with the reason."""
        return Check(self.id, self.name, self.level, None, None, self.criterion.format(limit=self.limit), reason)


def failed(checks: Iterable[Check], level: str = "trust") -> list[Check]:
    """Return the checks of a level that failed; a check that does not apply has not failed."""
    return [check for check in checks if check.level == level and check.passed is False]


def trustworthy(checks: Iterable[Check]) -> bool:
    """Return whether no check of level "trust" failed."""
    return not failed(checks)


def randomised(checks: Iterable[Check]) -> bool:
    """Return whether the determinism check failed: outputs are random, or depend on the other images of the batch."""
    return any(check.id == "determinism" and check.passed is False for check in checks)


def verdict(checks: Iterable[Check]) -> str:
    """Return the verdict on a robust accuracy: "measured", `UPPER_BOUND` or `RANDOMISED`."""
    checks = tuple(checks)
    if randomised(checks):
        return RANDOMISED
    return "measured" if trustworthy(checks) else UPPER_BOUND
