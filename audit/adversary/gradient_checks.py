"""Checks for gradient masking: does the gradient of a network, or of any objective, lead an attack to lower values?

At most 52 forward+backward passes and about ten forward passes an image are spent, on at most 100 images that the
network classifies correctly. The slope is measured over 1 % of the Euclidean length of a full step: eps sqrt(D) / 100
in l-inf for images of D values, eps / 100 in l2, eps / sqrt(pixels moved) / 100 in l1. Local linearity is measured
over one step of eps / 4 in the threat model's own norm. The unbounded attack searches the l-inf ball of half the pixel
range whatever the norm: it holds a grey image, and lies in the l2 ball of sqrt(D) / 2 and the l1 ball of D / 2, where
steps are coarser.
"""

from dataclasses import replace
from functools import partial
from math import isfinite

import torch
from torch import Tensor, nn

from audit.adversary.attack_checks import Check, Rule, randomised
from audit.adversary.check_rules import RULES
from audit.adversary.label_attack import cross_entropy_objective, margin, margin_objective
from audit.adversary.memory.limit import allowed
from audit.adversary.passes import Batches, input_gradient, outputs_of, row_lengths, seeded_noise
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf, ThreatModel
from audit.errors import InvalidModelError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, Labels, Objective, as_images, standard_torch_state

_IMAGES = 100
_BATCH = 50
_SHARE_OF_STEP = 0.01  # length of the central difference, in full steps of the attack
_SLOPES = (0.5, 2.0)
_GAINS = (0.3, 2.0)
_UNBOUNDED = PGD(steps=50, relative_step=0.04, random_start=False, batch_size=_BATCH)  # steps of 0.02 at radius 0.5
_FEWEST = 4  # images in a batch of which the outputs may depend on the others
_BATCH_SIZES = (50, 25, 17, 13, 10)  # outputs that depend on the batch differ between these, too

_GRADIENT_RULES = tuple(
    RULES[rule]
    for rule in (
        "zero_margin_gradient",
        "zero_cross_entropy_gradient",
        "gradient_slope",
        "local_linearity",
        "unbounded_attack",
    )
)
_OUTPUT_RULES = (RULES["logit_outputs"], RULES["determinism"])
_OBJECTIVE_RULES = (RULES["worst_case_zero_gradient"], RULES["worst_case_slope"])
_SEARCH_RULES = (RULES["worst_case_more_steps"], RULES["worst_case_wider_ball"])


@standard_torch_state()
def quick_checks(
    network: nn.Module, images: Images, labels: Labels, threat: ThreatModel, seed: int
) -> tuple[Check, ...]:
    """Return the checks of gradients and outputs on the first 100 images that the network classifies correctly.

    `images` are (N, C, H, W) and `labels` (N,). Checks that need a gradient do not apply without one, and none applies
    if no image is classified correctly. Random numbers drawn by the network are keyed by the seed, and the global
    generators are restored.

    Source: Carlini et al. 2019, "On Evaluating Adversarial Robustness".
    """
    threat = threat.within(images)
    with seeded_noise(images.device, seed):
        try:
            correct = first_correct(network, images, labels)
        except InvalidModelError as error:
            return (
                _failed_gradient(RULES["gradient"], error),
                *_skipped((*_GRADIENT_RULES, *_OUTPUT_RULES), str(error)),
            )
        if len(correct) == 0:
            rules = (RULES["gradient"], *_GRADIENT_RULES, *_OUTPUT_RULES)
            return _skipped(rules, "the network classifies no image correctly")
        clean, clean_labels = images[correct], labels[correct]
        return (
            *_gradient_checks(network, clean, clean_labels, threat, seed),
            *_output_checks(network, clean),
        )


@standard_torch_state()
def is_randomised(network: nn.Module, images: Images, seed: int) -> bool:
    """Return whether the determinism check fails on the first 100 images: random outputs, or dependent on the batch."""
    if len(images) == 0:
        return False
    with seeded_noise(images.device, seed):
        return randomised(_output_checks(network, images[:_IMAGES]))


@standard_torch_state()
def objective_checks(objective: Objective, images: Images, threat: ThreatModel, seed: int) -> tuple[Check, ...]:
    """Return the gradient checks of any objective, such as a critic's, on the first 100 images (N, C, H, W)."""
    gradient_rule, (zero_rule, slope_rule) = RULES["worst_case_gradient"], _OBJECTIVE_RULES
    clean, threat = as_images(images)[:_IMAGES], threat.within(images)
    if len(clean) == 0:
        return _skipped((gradient_rule, zero_rule, slope_rule), "there is no image")
    with seeded_noise(images.device, seed):
        start = threat.random_start(clean, keyed_generator(seed, Purpose.CHECK_START))
        try:
            gradient = _gradient(objective, start)
        except InvalidModelError as error:
            return (_failed_gradient(gradient_rule, error), *_skipped(_OBJECTIVE_RULES, "there is no gradient"))
        found = gradient_rule.result(passed=True, passes=len(clean))
        return (
            found,
            zero_rule.at_most(_zero_share(gradient)),
            _slope_check(slope_rule, objective, start, gradient, threat),
        )


@torch.no_grad()
def first_correct(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    """Return the indices of the first 100 images that the network classifies correctly, without a pass over the rest.

    Raises InvalidModelError if an output is not finite.
    """
    correct = torch.zeros(0, dtype=torch.long, device=images.device)
    for first in range(0, len(images), _IMAGES):
        index = torch.arange(len(images), device=images.device)[first : first + _IMAGES]
        logits = Batches(_BATCH).run(partial(outputs_of, network), images[index])
        _require_finite(logits.flatten(1), "network's output")
        correct = torch.cat([correct, index[margin(logits, labels[index]) > 0]])
        if len(correct) >= _IMAGES:
            break
    return correct[:_IMAGES]


@standard_torch_state()
def worst_case_checks(objective: Objective, images: Images, threat: ThreatModel, seed: int) -> tuple[Check, ...]:
    """Return the checks of a worst-case search: of its objective's gradient, and of its fall with steps and eps."""
    images, threat = as_images(images), threat.within(images)
    found = objective_checks(objective, images, threat, seed)
    if any(check.passed is None for check in found):
        return (*found, *_skipped(_SEARCH_RULES, "there is no gradient"))
    with seeded_noise(images.device, seed):
        return found + _search_checks(objective, images[:_IMAGES], threat, seed)


def grey_covering_eps(threat: ThreatModel, images: Images) -> float:
    """Return the radius at which the ball around any image holds a grey one: half the pixel range in every pixel."""
    low, high = threat.pixel_range
    size: int = images[0].numel()
    return 0.5 * (high - low) * float(size**threat.dimension_power)


def _gradient_checks(
    network: nn.Module, clean: Images, labels: Labels, threat: ThreatModel, seed: int
) -> tuple[Check, ...]:
    objective = margin_objective(network, labels)
    start = threat.random_start(clean, keyed_generator(seed, Purpose.CHECK_START))
    try:
        margin_gradient = _gradient(objective, start)
        loss_gradient = _gradient(cross_entropy_objective(network, labels), start)
    except InvalidModelError as error:
        return (_failed_gradient(RULES["gradient"], error), *_skipped(_GRADIENT_RULES, "there is no gradient"))
    return (
        RULES["gradient"].result(passed=True, passes=2 * len(clean)),
        RULES["zero_margin_gradient"].at_most(_zero_share(margin_gradient)),
        RULES["zero_cross_entropy_gradient"].at_most(_zero_share(loss_gradient)),
        _slope_check(RULES["gradient_slope"], objective, start, margin_gradient, threat),
        _linearity_check(objective, clean, start, margin_gradient, threat),
        _unbounded_check(objective, clean, threat, seed),
    )


def _slope_check(rule: Rule, objective: Objective, start: Images, gradient: Tensor, threat: ThreatModel) -> Check:
    """Check the ratio of the central difference along the gradient to the gradient's prediction."""
    if threat.eps == 0:
        return rule.skipped("eps is 0")
    # in double: squares of saturated gradients underflow
    length = gradient.flatten(1).double().norm(dim=1)
    ahead = _SHARE_OF_STEP * threat.eps * threat.steepest(gradient, start).flatten(1).double().norm(dim=1)
    move = (gradient.double() * (ahead / length).view(-1, 1, 1, 1)).to(start)
    change = _values(objective, start + move) - _values(objective, start - move)
    # a zero gradient gives NaN, which lies in no interval
    share = _share_within(change.double() / (2 * ahead * length), _SLOPES)
    return rule.result(passed=share >= rule.limit, figure=share)


def _linearity_check(
    objective: Objective, clean: Images, start: Images, gradient: Tensor, threat: ThreatModel
) -> Check:
    """Check the ratio of the gain of one step of the attack to the gradient's prediction for that step."""
    rule = RULES["local_linearity"]
    if threat.eps == 0:
        return rule.skipped("eps is 0")
    stepped = threat.step(start, gradient, clean, threat.eps / 4)
    predicted = ((stepped - start).double() * gradient).flatten(1).sum(1)
    gained = (_values(objective, stepped) - _values(objective, start)).double()
    # a zero gradient predicts no gain: count 0 / 0 as no gain
    median = float((gained / predicted).nan_to_num(0.0).quantile(0.5))
    return rule.result(passed=_GAINS[0] <= median <= _GAINS[1], figure=median)


@torch.enable_grad()
def _search_checks(objective: Objective, clean: Images, threat: ThreatModel, seed: int) -> tuple[Check, Check]:
    """Check that an objective falls as far with more steps, and in a wider ball, as with fewer and in a smaller one."""
    start, few = _values(objective, clean), PGD(2, 0.5, random_start=False, batch_size=_BATCH)
    many, near = replace(few, steps=8, relative_step=0.25), replace(threat, eps=threat.eps / 2)
    runs = [
        minimise(objective, clean, ball, search, keyed_generator(seed, Purpose.CHECK_START))
        for ball, search in ((threat, many), (threat, few), (near, many))
    ]
    most, *less = (start - run.value for run in runs)
    passes = [runs[0].passes + runs[1].passes, runs[2].passes]
    # without any fall the ratio is NaN, which fails
    ratios = [float(most.mean() / fall.mean()) for fall in less]
    steps, eps = (
        rule.result(passed=ratio >= rule.limit, figure=ratio if isfinite(ratio) else None, passes=cost)
        for rule, ratio, cost in zip(_SEARCH_RULES, ratios, passes, strict=True)
    )
    return steps, eps


@torch.enable_grad()
def _unbounded_check(objective: Objective, clean: Images, threat: ThreatModel, seed: int) -> Check:
    """Check the share of images that survive a search in a ball that holds a grey image."""
    rule, (low, high) = RULES["unbounded_attack"], threat.pixel_range
    ball = Linf(0.5 * (high - low), threat.pixel_range)
    try:
        found = minimise(objective, clean, ball, _UNBOUNDED, keyed_generator(seed, Purpose.UNBOUNDED_ATTACK))
    except InvalidModelError as error:
        return rule.result(passed=False, reason=str(error))
    return rule.at_most(int((~found.done).sum()) / len(clean), passes=found.passes)


@torch.no_grad()
def _output_checks(network: nn.Module, clean: Images) -> tuple[Check, Check]:
    runs = [Batches(size, exactly=True).run(partial(outputs_of, network), clean) for size in _batch_sizes()]
    # rows that lie in [0, 1] and sum to one are no accident
    simplex = (runs[0] >= 0).all(1) & ((runs[0].sum(1) - 1).abs() < 1e-3)
    share = int(simplex.sum()) / len(clean)
    units = [logits / row_lengths(logits).clamp_min(1e-30) for logits in runs]
    # a non-finite difference counts as 2, the diameter of the unit ball
    difference = float(torch.stack([unit - units[0] for unit in units]).abs().nan_to_num(2.0).max())
    logits_rule, determinism = _OUTPUT_RULES
    return (
        logits_rule.result(passed=share < 1, figure=share),
        determinism.result(passed=difference < determinism.limit, figure=difference),
    )


def _batch_sizes() -> list[int]:
    """Return different batch sizes, smaller ones where memory limits batches."""
    share = min(1.0, max(_FEWEST, allowed(_BATCH)) / _BATCH)
    return sorted({max(1, int(size * share)) for size in _BATCH_SIZES}, reverse=True)


def _gradient(objective: Objective, images: Images) -> Tensor:
    """Return the gradient (N, C, H, W); raises InvalidModelError if it cannot be computed."""
    index = torch.arange(len(images), device=images.device)
    try:
        return Batches(_BATCH).run(partial(_batch_gradient, objective), images, index)
    except RuntimeError as error:
        message = str(error).partition("\n")[0]
        raise InvalidModelError(f"the gradient to the input cannot be computed: {message}") from error


@torch.enable_grad()
def _batch_gradient(objective: Objective, images: Images, index: Tensor) -> Tensor:
    leaf = images.detach().requires_grad_()
    value = objective(leaf, index).value
    _require_finite(value[:, None], "objective")
    return input_gradient(value.sum(), leaf)


@torch.no_grad()
def _values(objective: Objective, images: Images) -> Tensor:
    index = torch.arange(len(images), device=images.device)
    return Batches(_BATCH).run(lambda batch, chosen: objective(batch, chosen).value, images, index)


def _require_finite(rows: Tensor, what: str) -> None:
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise InvalidModelError(f"the {what} is not finite for {bad} of {len(rows)} images")


def _zero_share(gradient: Tensor) -> float:
    return int((gradient.flatten(1) == 0).all(1).sum()) / len(gradient)


def _share_within(ratios: Tensor, bounds: tuple[float, float]) -> float:
    return int(((ratios >= bounds[0]) & (ratios <= bounds[1])).sum()) / len(ratios)


def _failed_gradient(rule: Rule, error: InvalidModelError) -> Check:
    return rule.result(passed=False, reason=str(error))


def _skipped(rules: tuple[Rule, ...], reason: str) -> tuple[Check, ...]:
    return tuple(rule.skipped(reason) for rule in rules)
