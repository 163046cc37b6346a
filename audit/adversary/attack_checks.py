"""Is an attack to be believed? What a check is, and the checks that compare what attacks left standing.

An attack that fails breaks little, and then the network only seems robust. `masking.py` has the checks that look
at the network itself; the functions here compare masks (N,) of the images still right after different attacks,
all over the same N images, those wrong from the start included as not robust.

Source: Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Athalye, Carlini & Wagner 2018, "Obfuscated
Gradients Give a False Sense of Security".
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Literal, NamedTuple

from torch import Tensor

from audit.adversary.stochastic import DRAWS
from audit.errors import UsageError

TRUST = frozenset({1, 2, 3, 5, 8, 15, 16})
"""The numbers of the checks without which a robust accuracy is only an upper bound."""

UPPER_BOUND = "upper bound, attack not trustworthy"
"""How to word the robust accuracy of a network that fails one of them."""

DETERMINISM = 8
RANDOMISED = f"randomised: majority verdict of {DRAWS} draws, no point estimate"
"""How to word it where the network draws at random."""

SQUARE_QUERIES = 300


class Check(NamedTuple):
    """One question put to an attack, and the answer.

    `number` and `name` say which, `level` is "trust", "note", or "gate" (`gates.py`). `passed` is None where the
    check does not apply, and `reason` says why, or what went wrong. `figure` is what was measured (None where nothing
    was), held against `criterion`. `passes` counts forward+backward passes of single images.
    """

    number: int
    name: str
    level: Literal["trust", "note", "gate"]
    passed: bool | None
    figure: float | None
    criterion: str
    reason: str = ""
    passes: int = 0


class Rule(NamedTuple):
    """A check before it is made; the `limit` stands in the text of its `criterion`."""

    number: int
    name: str
    criterion: str
    limit: float = 0.0

    def judged(self, *, passed: bool, figure: float | None = None, reason: str = "", passes: int = 0) -> Check:
        """Return the answer of a check that was made."""
        text = self.criterion.format(limit=self.limit)
        return Check(self.number, self.name, self._level, passed, figure, text, reason, passes)

    def at_most(self, figure: float, passes: int = 0) -> Check:
        """Return the answer of a check that passes where its figure is at most the limit; NaN is not."""
        return self.judged(passed=figure <= self.limit, figure=figure, passes=passes)

    def skipped(self, reason: str) -> Check:
        """Return the answer of a check that does not apply, and why."""
        return Check(self.number, self.name, self._level, None, None, self.criterion.format(limit=self.limit), reason)

    @property
    def _level(self) -> Literal["trust", "note"]:
        return "trust" if self.number in TRUST else "note"


SINGLE_STEP = Rule(6, "single step", "many steps break every image that one step breaks")
LOSSES = Rule(
    9, "cross-entropy against margin", "the two losses' robust accuracies differ by at most {limit:g}", limit=0.03
)
RESCALED = Rule(
    10, "rescaled logits", "rescaling the logits lowers the robust accuracy by at most {limit:g}", limit=0.01
)
CONVERGED = Rule(11, "more steps", "40 steps for 20 lower the robust accuracy by at most {limit:g}", limit=0.005)
SETTLED = Rule(
    11,
    "settled loss",
    "for {limit:.0%} of the survivors the best loss rises by at most 0.05 in the last 10 steps",
    0.95,
)
RESTARTS = Rule(12, "more restarts", "5 restarts for 1 lower the robust accuracy by at most {limit:g}", limit=0.005)
NOISE = Rule(14, "random noise", "random changes of length eps break nothing that the attack does not")
QUERIES = Rule(15, "gradient-free attack", "Square breaks at most {limit:g} of the images anew", limit=0.002)
TRANSFER = Rule(16, "transfer", "adversarial images of a similar network break nothing that the attack does not")
LADDER = Rule(18, "eps ladder", "the robust count never rises with eps")
LADDER_END = Rule(18, "end of the eps ladder", "no image is robust where eps reaches any image")

_SETTLED_RISE = 0.05


def failed(checks: Iterable[Check], level: str = "trust") -> list[Check]:
    """Return the checks of a level that failed; one that does not apply has not failed."""
    return [check for check in checks if check.level == level and check.passed is False]


def trustworthy(checks: Iterable[Check]) -> bool:
    """Return whether no check of level "trust" failed."""
    return not failed(checks)


def randomised(checks: Iterable[Check]) -> bool:
    """Return whether the check of determinism failed: the network draws at random, or looks at the whole batch."""
    return any(check.number == DETERMINISM and check.passed is False for check in checks)


def verdict(checks: Iterable[Check]) -> str:
    """Return how to word the robust accuracy that these checks stand beside."""
    checks = tuple(checks)
    if randomised(checks):
        return RANDOMISED
    return "measured" if trustworthy(checks) else UPPER_BOUND


def single_step_beaten(single_robust: Tensor, iterative_robust: Tensor) -> Check:
    """Return check 6: no image that one step breaks survives many."""
    return _anew(SINGLE_STEP, iterative_robust, single_robust)


def losses_agree(cross_entropy_robust: Tensor, margin_robust: Tensor) -> Check:
    """Return check 9: the attack on either loss leaves about as many images; a wide gap means one loss is masked."""
    return _apart(LOSSES, cross_entropy_robust, margin_robust, either_way=True)


def rescaling_gains_little(robust: Tensor, rescaled_robust: Tensor) -> Check:
    """Return check 10: the same attack on logits of ordinary size breaks hardly more."""
    return _apart(RESCALED, robust, rescaled_robust)


def steps_gain_little(robust_20: Tensor, robust_40: Tensor) -> Check:
    """Return the first part of check 11: twice the steps break hardly more."""
    return _apart(CONVERGED, robust_20, robust_40)


def loss_settled(earlier: Tensor, final: Tensor) -> Check:
    """Return the second part of check 11, of the survivors' best loss (M,) 10 steps before the end and at the end.

    A loss is large where the attack wins: the negative of an objective's value.
    """
    _same_shape(earlier, final)
    if len(final) == 0:
        return SETTLED.skipped("no image survives")
    # a NaN has not settled
    share = int((final - earlier <= _SETTLED_RISE).sum()) / len(final)
    return SETTLED.judged(passed=share >= SETTLED.limit, figure=share)


def restarts_gain_little(robust_1: Tensor, robust_5: Tensor) -> Check:
    """Return check 12: five times the starts break hardly more."""
    return _apart(RESTARTS, robust_1, robust_5)


def noise_breaks_nothing(robust: Tensor, noise_robust: Tensor) -> Check:
    """Return check 14: no noise breaks what the attack could not."""
    return _anew(NOISE, robust, noise_robust)


def queries_gain_little(robust: Tensor, square_robust: Tensor, queries: int) -> Check:
    """Return check 15: an attack that asks for no gradient breaks hardly anything new in at least 300 queries."""
    if queries < SQUARE_QUERIES:
        return QUERIES.skipped(f"Square had {queries} queries for an image; the check needs {SQUARE_QUERIES}")
    return _anew(QUERIES, robust, square_robust)


def transfer_breaks_nothing(robust: Tensor, transfer_robust: Tensor) -> Check:
    """Return check 16: no image made against a similar network, or a bypassed layer, breaks anything new."""
    return _anew(TRANSFER, robust, transfer_robust)


def never_rises(robust_by_eps: Mapping[float, int], reaching: float) -> tuple[Check, Check]:
    """Return check 18 in two parts: robust counts never rise with eps, and are 0 where eps is at least `reaching`.

    `reaching` is the radius at which the ball around an image holds a blank one (`masking.reaching_eps`); a ladder
    that ends below it says nothing about its end.
    """
    ladder = sorted(robust_by_eps.items())
    if not ladder:
        return LADDER.skipped("no eps was tried"), LADDER_END.skipped("no eps was tried")
    counts = [count for _, count in ladder]
    rise = max((after - before for before, after in pairwise(counts)), default=0)
    top, left = ladder[-1]
    if top < reaching:
        end = LADDER_END.skipped(f"the largest eps is {top:.4g}; every image can be reached from {reaching:.4g} on")
    else:
        end = LADDER_END.at_most(left)
    return LADDER.at_most(max(0, rise)), end


def _anew(rule: Rule, robust: Tensor, other: Tensor) -> Check:
    """Judge the share of all images that only the other attack breaks."""
    _same_shape(robust, other)
    if len(robust) == 0:
        return rule.skipped("there is no image to compare")
    return _at_most(rule, int((robust & ~other).sum()), len(robust))


def _apart(rule: Rule, robust: Tensor, other: Tensor, *, either_way: bool = False) -> Check:
    """Judge by how much the other attack's robust accuracy is lower, or by how much they differ."""
    _same_shape(robust, other)
    if len(robust) == 0:
        return rule.skipped("there is no image to compare")
    fewer = int(robust.sum()) - int(other.sum())
    return _at_most(rule, abs(fewer) if either_way else max(0, fewer), len(robust))


def _at_most(rule: Rule, count: int, images: int) -> Check:
    """Judge a share of the images: where the limit is less than one image, one image passes it."""
    # whole counts divided once: 3 of 100 is 0.03 exactly, and passes a limit of 0.03
    share, finest = count / images, 1 / images if rule.limit else 0.0
    return rule.judged(passed=share <= max(rule.limit, finest), figure=share)


def _same_shape(one: Tensor, other: Tensor) -> None:
    if one.dim() != 1 or one.shape != other.shape:
        shapes = " and ".join(str(tuple(mask.shape)) for mask in (one, other))
        raise UsageError(f"shapes {shapes} cannot be compared: both must be (N,), over the same images")
