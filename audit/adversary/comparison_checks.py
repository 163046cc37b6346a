"""Checks that compare the images left robust by two attacks.

Masks (N,) mark the images that are still classified correctly after an attack, all over the same N images; those
misclassified without an attack are not robust.
"""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from audit.adversary.attack_checks import Check, Rule
from audit.adversary.check_rules import RULES
from audit.errors import UsageError

SQUARE_QUERIES = 300
_CONVERGED_RISE = 0.05


def check_single_step(single_robust: Tensor, iterative_robust: Tensor) -> Check:
    """Check that no image broken by one step survives many."""
    return _check_newly_broken(RULES["single_step_attack"], iterative_robust, single_robust)


def check_losses(cross_entropy_robust: Tensor, margin_robust: Tensor) -> Check:
    """Check that attacks on the two losses give about the same robust accuracy; a wide gap means one is masked."""
    return _check_accuracies(RULES["loss_agreement"], cross_entropy_robust, margin_robust, two_sided=True)


def check_rescaled_logits(robust: Tensor, rescaled_robust: Tensor) -> Check:
    """Check that the same attack on rescaled logits breaks hardly more."""
    return _check_accuracies(RULES["rescaled_logits"], robust, rescaled_robust)


def check_more_steps(robust_20: Tensor, robust_40: Tensor) -> Check:
    """Check that twice the steps break hardly more."""
    return _check_accuracies(RULES["more_steps"], robust_20, robust_40)


def check_loss_convergence(earlier: Tensor, final: Tensor) -> Check:
    """Check that the survivors' best loss (M,) hardly rises from 10 steps before the end to the end.

    A loss is large where the attack wins: the negative of an objective's value.
    """
    _check_same_shape(earlier, final)
    rule = RULES["loss_convergence"]
    if len(final) == 0:
        return rule.skipped("no image survives")
    # a NaN has not converged
    share = int((final - earlier <= _CONVERGED_RISE).sum()) / len(final)
    return rule.result(passed=share >= rule.limit, figure=share)


def check_more_restarts(robust_1: Tensor, robust_5: Tensor) -> Check:
    """Check that five times the restarts break hardly more."""
    return _check_accuracies(RULES["more_restarts"], robust_1, robust_5)


def check_noise(robust: Tensor, noise_robust: Tensor) -> Check:
    """Check that random noise breaks no image that the attack leaves robust."""
    return _check_newly_broken(RULES["random_noise"], robust, noise_robust)


def check_gradient_free(robust: Tensor, gradient_free_robust: Tensor, queries: int) -> Check:
    """Check that a gradient-free attack with at least 300 queries an image breaks hardly any further image."""
    rule = RULES["gradient_free_attack"]
    if queries < SQUARE_QUERIES:
        return rule.skipped(f"Square had {queries} queries for an image; the check needs {SQUARE_QUERIES}")
    return _check_newly_broken(rule, robust, gradient_free_robust)


def check_transfer(robust: Tensor, transfer_robust: Tensor) -> Check:
    """Check that adversarial images made on a similar network, or around a layer, break no further image."""
    return _check_newly_broken(RULES["transfer_attack"], robust, transfer_robust)


def check_eps_curve(robust_by_eps: Mapping[float, int], covering_eps: float) -> tuple[Check, Check]:
    """Check that robust counts never rise with eps, and that they are 0 from `covering_eps` on.

    `covering_eps` is the radius at which the ball around any image holds a grey one
    (`gradient_checks.grey_covering_eps`); the second check does not apply if no radius is as large.
    """
    monotone, end = RULES["eps_monotonicity"], RULES["unbounded_eps"]
    curve = sorted(robust_by_eps.items())
    if not curve:
        return monotone.skipped("no eps was tried"), end.skipped("no eps was tried")
    counts = [count for _, count in curve]
    rise = max((after - before for before, after in pairwise(counts)), default=0)
    top, left = curve[-1]
    if top < covering_eps:
        reason = f"the largest eps is {top:.4g}; every image can be reached from {covering_eps:.4g} on"
        return monotone.at_most(max(0, rise)), end.skipped(reason)
    return monotone.at_most(max(0, rise)), end.at_most(left)


def _check_newly_broken(rule: Rule, robust: Tensor, other: Tensor) -> Check:
    """Check the share of all images that only the other attack breaks."""
    _check_same_shape(robust, other)
    if len(robust) == 0:
        return rule.skipped("there is no image to compare")
    return _check_share(rule, int((robust & ~other).sum()), len(robust))


def _check_accuracies(rule: Rule, robust: Tensor, other: Tensor, *, two_sided: bool = False) -> Check:
    """Check by how much the other attack's robust accuracy is lower, or differs."""
    _check_same_shape(robust, other)
    if len(robust) == 0:
        return rule.skipped("there is no image to compare")
    fewer = int(robust.sum()) - int(other.sum())
    return _check_share(rule, abs(fewer) if two_sided else max(0, fewer), len(robust))


def _check_share(rule: Rule, count: int, images: int) -> Check:
    """Check a share of the images; if the limit is less than one image, one image passes."""
    # whole counts divided once: 3 of 100 is 0.03 exactly, and passes a limit of 0.03
    share, finest = count / images, 1 / images if rule.limit else 0.0
    return rule.result(passed=share <= max(rule.limit, finest), figure=share)


def _check_same_shape(one: Tensor, other: Tensor) -> None:
    if one.dim() != 1 or one.shape != other.shape:
        shapes = " and ".join(str(tuple(mask.shape)) for mask in (one, other))
        raise UsageError(f"shapes {shapes} cannot be compared: both must be (N,), over the same images")
