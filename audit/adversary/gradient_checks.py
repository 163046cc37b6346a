"""Does the gradient lead an attack anywhere? Checks of a network, or of any objective, before a number is believed.

They take at most 52 forward+backward passes an image and about ten forward ones, on at most 100 images that the
network gets right. Check 3 looks 1 % of the Euclidean length of a full step ahead: eps sqrt(D) / 100 in l-inf for
images of D values, eps / 100 in l2, eps / sqrt(pixels moved) / 100 in l1. Check 4 takes one step of eps / 4, as the
norm steps. Check 5 searches the l-inf ball of half the pixel range whatever the norm: it holds a grey image,
and lies in the l2 ball of sqrt(D) / 2 and the l1 ball of D / 2, whose own steps are coarser.
"""

from dataclasses import replace
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from audit.adversary.attack_checks import Check, Rule, randomised
from audit.adversary.batching import Batches
from audit.adversary.gradients import input_gradient
from audit.adversary.label_attack import cross_entropy_objective, margin, margin_objective
from audit.adversary.pgd import PGD, minimise
from audit.adversary.stochastic import own_randomness
from audit.adversary.threat import Linf, ThreatModel
from audit.errors import InvalidModelError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, Objective

_IMAGES = 100
_BATCH = 50
_SHARE_OF_STEP = 0.01  # how far the central difference looks, in full steps of the attack
_SLOPES = (0.5, 2.0)
_GAINS = (0.3, 2.0)
_FAR = PGD(steps=50, relative_step=0.04, random_start=False, batch_size=_BATCH)  # steps of 0.02 at a radius of 0.5
_BATCHES = (50, 25, 17, 13, 10)  # a network that looks at the whole batch answers differently, too
_POWERS = {"linf": 0.0, "l2": 0.5, "l1": 1.0}  # of D: how the length of one change in every pixel grows

GRADIENT = Rule(1, "gradient", "the gradient to the pixels exists and is finite")
ZERO_VALUE = Rule(2, "zero gradient", "at a random start the gradient is zero for no image")
ZERO_MARGIN = ZERO_VALUE._replace(name="zero gradient of the margin")
ZERO_LOSS = Rule(
    2,
    "zero gradient of the cross-entropy",
    "at a random start the gradient is zero for at most {limit:.0%} of the images",
    0.01,
)
SLOPE = Rule(3, "slope", "a small move changes 1/2 to 2 of what the gradient says, for {limit:.0%} of the images", 0.9)
LINEARITY = Rule(4, "linearity", "a step of eps / 4 gains 0.3 to 2 of what the gradient says, in the median image")
UNBOUNDED = Rule(5, "unbounded attack", "50 steps break every image at l-inf 1/2, where it can be made grey")
LOGITS = Rule(7, "logits", "the outputs are not probabilities")
DETERMINISM = Rule(8, "determinism", "five forward passes differ by less than {limit:g} of the logits' length", 1e-4)

# searches of other lengths and radii end elsewhere: as far is three quarters as far
FALLS_WITH_STEPS = Rule(
    11, "more steps", "the mean falls at least {limit:g} times as far in eight steps as in two", 0.75
)
FALLS_WITH_EPS = Rule(
    18, "wider ball", "the mean falls at least {limit:g} times as far within eps as within eps / 2", 0.75
)

_OF_GRADIENT = (ZERO_MARGIN, ZERO_LOSS, SLOPE, LINEARITY, UNBOUNDED)
_OF_OUTPUTS = (LOGITS, DETERMINISM)


def quick_checks(
    network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, seed: int
) -> tuple[Check, ...]:
    """Return checks 1 to 5, 7 and 8 on the first 100 images that the network gets right.

    Where there is no gradient, what needs one does not apply; nothing applies where no image is right. Noise that
    the network draws is keyed by the seed too, and the global generators are left as they were.
    """
    with own_randomness(images.device, seed):
        try:
            right = first_right(network, images, labels)
        except InvalidModelError as fault:
            return (_no_gradient(fault), *_skipped((*_OF_GRADIENT, *_OF_OUTPUTS), str(fault)))
        if len(right) == 0:
            return _skipped((GRADIENT, *_OF_GRADIENT, *_OF_OUTPUTS), "the network gets no image right")
        clean, wanted = images[right], labels[right]
        return (*_gradient_checks(network, clean, wanted, threat, seed), *_output_checks(network, clean))


def draws(network: nn.Module, images: Images, seed: int) -> bool:
    """Return whether check 8 fails on the first 100 images: the network draws at random, or looks at whole batches."""
    if len(images) == 0:
        return False
    with own_randomness(images.device, seed):
        return randomised(_output_checks(network, images[:_IMAGES]))


def objective_checks(objective: Objective, images: Images, threat: ThreatModel, seed: int) -> tuple[Check, ...]:
    """Return checks 1 to 3 of any objective, such as a critic's, on the first 100 images."""
    clean = images[:_IMAGES]
    if len(clean) == 0:
        return _skipped((GRADIENT, ZERO_VALUE, SLOPE), "there is no image")
    with own_randomness(images.device, seed):
        start = threat.random_start(clean, keyed_generator(seed, Purpose.CHECK_START))
        try:
            gradient = _gradient(objective, start)
        except InvalidModelError as fault:
            return (_no_gradient(fault), *_skipped((ZERO_VALUE, SLOPE), "there is no gradient"))
        found = GRADIENT.judged(passed=True, passes=len(clean))
        return found, ZERO_VALUE.at_most(_share_zero(gradient)), _slope(objective, start, gradient, threat)


@torch.no_grad()
def first_right(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    """Return the indices of the first 100 images that the network gets right, asking for no more than it takes.

    Raises InvalidModelError where an output is not finite.
    """
    right = torch.zeros(0, dtype=torch.long, device=images.device)
    for first in range(0, len(images), _IMAGES):
        index = torch.arange(len(images), device=images.device)[first : first + _IMAGES]
        logits = Batches(_BATCH).run(network, images[index])
        _must_be_finite(logits.flatten(1), "network's output")
        right = torch.cat([right, index[margin(logits, labels[index]) > 0]])
        if len(right) >= _IMAGES:
            break
    return right[:_IMAGES]


def worst_case_checks(objective: Objective, images: Images, threat: ThreatModel, seed: int) -> tuple[Check, ...]:
    """Return checks 1 to 3 of what a worst-case search makes small, and whether it falls with steps and with eps."""
    found = objective_checks(objective, images, threat, seed)
    if all(check.passed is not None for check in found):
        with own_randomness(images.device, seed):
            found += _falling(objective, images[:_IMAGES], threat, seed)
    else:
        found += _skipped((FALLS_WITH_STEPS, FALLS_WITH_EPS), "there is no gradient")
    return tuple(check._replace(name=f"worst case: {check.name}") for check in found)


def reaching_eps(threat: ThreatModel, images: Images) -> float:
    """Return the radius at which the ball around every image holds a grey one: half the pixel range in each pixel."""
    low, high = threat.pixel_range
    size: int = images[0].numel()
    return 0.5 * (high - low) * float(size ** _POWERS[threat.norm])


def _gradient_checks(
    network: nn.Module, clean: Images, labels: Labels, threat: ThreatModel, seed: int
) -> tuple[Check, ...]:
    objective = margin_objective(network, labels)
    start = threat.random_start(clean, keyed_generator(seed, Purpose.CHECK_START))
    try:
        gradient = _gradient(objective, start)
        of_loss = _gradient(cross_entropy_objective(network, labels), start)
    except InvalidModelError as fault:
        return (_no_gradient(fault), *_skipped(_OF_GRADIENT, "there is no gradient"))
    return (
        GRADIENT.judged(passed=True, passes=2 * len(clean)),
        ZERO_MARGIN.at_most(_share_zero(gradient)),
        ZERO_LOSS.at_most(_share_zero(of_loss)),
        _slope(objective, start, gradient, threat),
        _linearity(objective, clean, start, gradient, threat),
        _unbounded(objective, clean, threat, seed),
    )


def _slope(objective: Objective, start: Images, gradient: Tensor, threat: ThreatModel) -> Check:
    """Check 3: the central difference of the values along the gradient, over what the gradient says of it."""
    if threat.eps == 0:
        return SLOPE.skipped("eps is 0")
    # in double: squares of saturated gradients underflow
    length = gradient.flatten(1).double().norm(dim=1)
    ahead = _SHARE_OF_STEP * threat.eps * threat.steepest(gradient, start).flatten(1).double().norm(dim=1)
    move = (gradient.double() * (ahead / length).view(-1, 1, 1, 1)).to(start)
    change = _values(objective, start + move) - _values(objective, start - move)
    # where the gradient is zero the ratio is NaN, which lies in no interval
    share = _share_within(change.double() / (2 * ahead * length), _SLOPES)
    return SLOPE.judged(passed=share >= SLOPE.limit, figure=share)


def _linearity(objective: Objective, clean: Images, start: Images, gradient: Tensor, threat: ThreatModel) -> Check:
    """Check 4: what a step of the attack gains, over what the gradient says of that very step."""
    if threat.eps == 0:
        return LINEARITY.skipped("eps is 0")
    stepped = threat.step(start, gradient, clean, threat.eps / 4)
    said = ((stepped - start).double() * gradient).flatten(1).sum(1)
    gained = (_values(objective, stepped) - _values(objective, start)).double()
    # a zero gradient promises nothing: no gain
    median = float((gained / said).nan_to_num(0.0).quantile(0.5))
    return LINEARITY.judged(passed=_GAINS[0] <= median <= _GAINS[1], figure=median)


@torch.enable_grad()
def _falling(objective: Objective, clean: Images, threat: ThreatModel, seed: int) -> tuple[Check, Check]:
    """Checks 11 and 18 of an objective: does it fall as far with more steps, and in a wider ball, as with less?"""
    start, few = _values(objective, clean), PGD(2, 0.5, random_start=False, batch_size=_BATCH)
    many, near = replace(few, steps=8, relative_step=0.25), replace(threat, eps=threat.eps / 2)
    runs = [
        minimise(objective, clean, ball, search, keyed_generator(seed, Purpose.CHECK_START))
        for ball, search in ((threat, many), (threat, few), (near, many))
    ]
    most, *less = (start - run.value for run in runs)
    passes = [runs[0].passes + runs[1].passes, runs[2].passes]
    # where nothing falls the ratio is NaN, which passes nothing
    ratios = [float(most.mean() / fall.mean()) for fall in less]
    rules = (FALLS_WITH_STEPS, FALLS_WITH_EPS)
    steps, eps = (
        rule.judged(passed=ratio >= rule.limit, figure=ratio if isfinite(ratio) else None, passes=cost)
        for rule, ratio, cost in zip(rules, ratios, passes, strict=True)
    )
    return steps, eps


@torch.enable_grad()
def _unbounded(objective: Objective, clean: Images, threat: ThreatModel, seed: int) -> Check:
    """Check 5: the share of images that survive where every image can be made grey."""
    low, high = threat.pixel_range
    far = Linf(0.5 * (high - low), threat.pixel_range)
    try:
        found = minimise(objective, clean, far, _FAR, keyed_generator(seed, Purpose.UNBOUNDED_ATTACK))
    except InvalidModelError as fault:
        return UNBOUNDED.judged(passed=False, reason=str(fault))
    return UNBOUNDED.at_most(int((~found.done).sum()) / len(clean), passes=found.passes)


@torch.no_grad()
def _output_checks(network: nn.Module, clean: Images) -> tuple[Check, Check]:
    runs = [Batches(size).run(network, clean) for size in _BATCHES]
    # rows that lie in [0, 1] and sum to one are no accident
    simplex = (runs[0] >= 0).all(1) & ((runs[0].sum(1) - 1).abs() < 1e-3)
    share = int(simplex.sum()) / len(clean)
    units = [logits / logits.norm(dim=1, keepdim=True).clamp_min(1e-30) for logits in runs]
    # what is not finite is as far from another unit vector as can be
    apart = float(torch.stack([unit - units[0] for unit in units]).abs().nan_to_num(2.0).max())
    logits = LOGITS.judged(passed=share < 1, figure=share)
    return logits, DETERMINISM.judged(passed=apart < DETERMINISM.limit, figure=apart)


def _gradient(objective: Objective, images: Images) -> Tensor:
    """Return the gradient (N, C, H, W); raises InvalidModelError where there is none, for whatever reason."""
    index = torch.arange(len(images), device=images.device)
    try:
        return Batches(_BATCH).run(partial(_gradient_of_batch, objective), images, index)
    except RuntimeError as fault:
        message = str(fault).partition("\n")[0]
        raise InvalidModelError(f"the gradient to the input cannot be computed: {message}") from fault


@torch.enable_grad()
def _gradient_of_batch(objective: Objective, images: Images, index: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    value = objective(leaf, index).value
    _must_be_finite(value[:, None], "objective")
    return input_gradient(value.sum(), leaf)


@torch.no_grad()
def _values(objective: Objective, images: Images) -> Tensor:
    index = torch.arange(len(images), device=images.device)
    return Batches(_BATCH).run(lambda batch, chosen: objective(batch, chosen).value, images, index)


def _must_be_finite(rows: Tensor, what: str) -> None:
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the {what} is not finite for {bad} of {len(rows)} images")


def _share_zero(gradient: Tensor) -> float:
    return int((gradient.flatten(1) == 0).all(1).sum()) / len(gradient)


def _share_within(ratios: Tensor, bounds: tuple[float, float]) -> float:
    return int(((ratios >= bounds[0]) & (ratios <= bounds[1])).sum()) / len(ratios)


def _no_gradient(fault: InvalidModelError) -> Check:
    return GRADIENT.judged(passed=False, reason=str(fault))


def _skipped(rules: tuple[Rule, ...], reason: str) -> tuple[Check, ...]:
    return tuple(rule.skipped(reason) for rule in rules)
