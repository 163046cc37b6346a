"""Is a loaded network fit to be given a number? Gates that a broken checkpoint fails.

A gate is a check of level "gate", numbered from 31. A network that fails one keeps its figures, with the gate beside
them, and is never ranked. What cannot be measured at all (outputs that are not finite) is an error elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from audit.adversary.attack_checks import Check, Rule
from audit.adversary.batching import Batches
from audit.proportion import wilson
from audit.records import AuditRecord
from audit.types import Images, Labels

_SAMPLE = 64  # images that are looked at closely
_SCALED = 200  # images tried at other scales
_BATCH = 250
_RENAMED = 10  # images of each class that a renaming of classes needs, lest it fit by luck
_SURE = 3.290527  # of 1,000 honest networks, at most one is under its published accuracy by chance alone

PIXELS = Rule(31, "pixels", "pixels lie in [0, 1], and at no other scale are {limit:.0%} more of the images right", 0.1)
FINITE = Rule(32, "finite activations", "no layer gives a value that is not finite")
SCORES = Rule(33, "scores", "the outputs are not probabilities")
REPEATED = Rule(34, "repeated passes", "three forward passes differ by at most {limit:g} of the logits' length", 1e-5)
STILL = Rule(35, "eval mode", "forward passes move no buffer, no parameter and no part out of eval mode")
ALONE = Rule(36, "each image alone", "other images in the batch move logits by at most {limit:g} of their length", 2e-3)
LABELS = Rule(37, "labels", "twice chance is right, and no renaming of the classes makes {limit:.0%} more so", 0.1)
PUBLISHED = Rule(38, "published accuracy", "the accuracy's interval reaches the published one less {limit:.1%}", 0.005)

_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "0 to 255": lambda images: images * 255,
    "-1 to 1": lambda images: images * 2 - 1,
    "ImageNet's normalisation": lambda images: _normalised(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "MNIST's normalisation": lambda images: _normalised(images, (0.1307,), (0.3081,)),
}


@torch.no_grad()
def gates(network: nn.Module, images: Images, labels: Labels, published: float | None = None) -> tuple[Check, ...]:
    """Return gates 31 to 38 of a network in eval mode, on images (N, C, H, W) with labels (N,).

    `published` is the accuracy that its makers state on these very images, a fraction. About five forward passes an
    image are spent. Buffers that move are put back, and the global random generators are left as they were.
    """
    sample = images[:_SAMPLE]
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _put_back(network) as moved:
        sick = _not_finite(network, sample)
        passes = [Batches(_SAMPLE).run(network, sample) for _ in range(3)]
        lonely = _in_other_company(network, sample)
        stirred = moved()
        answers = Batches(_BATCH).run(network, images).argmax(1)
        scale = _pixels(network, images, labels, answers)
    repeated = _judged(REPEATED, _apart(passes))
    alone = _judged(ALONE, _apart([passes[0][: len(lonely[0])], *lonely]))
    if not repeated.passed:
        alone = ALONE.skipped("forward passes differ by themselves")
    found = (
        scale,
        FINITE.judged(passed=not sick, figure=len(sick), reason=_listed(sick)),
        SCORES.judged(passed=_share_of_probabilities(passes[0]) < 1, figure=_share_of_probabilities(passes[0])),
        repeated,
        STILL.judged(passed=not stirred, figure=len(stirred), reason=_listed(stirred)),
        alone,
        _labels(answers, labels, passes[0].shape[1]),
        _published(answers, labels, published),
    )
    return tuple(check._replace(level="gate") for check in found)


def gated(record: AuditRecord, found: Iterable[Check]) -> AuditRecord:
    """Return a record with its gates first among the checks, and a flag that names those not passed."""
    found = tuple(found)
    shut = [check for check in found if check.passed is False]
    named = ", ".join(f"{check.number} {check.name}{f' ({check.reason})' if check.reason else ''}" for check in shut)
    flags = [f"gated: the network is not fit to be ranked: failed {named}"] if shut else []
    checks = (*(check._asdict() for check in found), *record.checks)
    return replace(record, checks=checks, flags=(*flags, *record.flags))


def _pixels(network: nn.Module, images: Images, labels: Labels, answers: Tensor) -> Check:
    """Gate 31: the range of the pixels, and what the network makes of them at other scales."""
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # a NaN lies nowhere
        return PIXELS.judged(passed=False, reason=f"pixels range from {low:.3g} to {high:.3g}")
    some, wanted = images[:_SCALED], labels[:_SCALED]
    right = int((answers[:_SCALED] == wanted).sum())
    gains = {}
    for name, scale in _SCALES.items():
        if name.startswith("ImageNet") and images.shape[1] != 3:
            continue
        there = Batches(_BATCH).run(partial(_at_scale, network, scale), some).argmax(1)
        gains[name] = (int((there == wanted).sum()) - right) / len(some)
    best = max(gains, key=gains.__getitem__)
    passed = gains[best] <= PIXELS.limit
    reason = "" if passed else f"more are right with pixels of {best}: give the mean and std it was trained with"
    return PIXELS.judged(passed=passed, figure=max(0.0, gains[best]), reason=reason)


def _at_scale(network: nn.Module, scale: Callable[[Tensor], Tensor], images: Images) -> Tensor:
    logits: Tensor = network(scale(images))
    return logits


def _normalised(images: Images, mean: tuple[float, ...], std: tuple[float, ...]) -> Images:
    shift, width = (torch.tensor(values).view(1, -1, 1, 1).to(images) for values in (mean, std))
    return (images - shift) / width


def _not_finite(network: nn.Module, images: Images) -> list[str]:
    """Gate 32: the names of the innermost parts that give a value that is not finite."""
    sick: dict[str, None] = {}

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, list | tuple) else [output]
        if any(isinstance(part, Tensor) and not part.isfinite().all() for part in parts):
            sick[name] = None

    leaves = [(name, part) for name, part in network.named_modules() if not list(part.children())]
    hooks = [part.register_forward_hook(partial(look, name or "the network")) for name, part in leaves]
    try:
        if not Batches(_SAMPLE).run(network, images).isfinite().all():
            sick["the output"] = None
    finally:
        for hook in hooks:
            hook.remove()
    return list(sick)


@contextmanager
def _put_back(network: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Give a function that names what forward passes moved since, and undo it in the end."""
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    versions = {name: (parameter, parameter._version) for name, parameter in network.named_parameters()}
    modes = {name: part.training for name, part in network.named_modules()}

    def moved() -> list[str]:
        now = dict(network.named_buffers())
        stirred = [name for name, was in buffers.items() if not _same(now.get(name), was)]
        stirred += sorted(set(now) - set(buffers))
        written = dict(network.named_parameters())
        stirred += [name for name, (was, version) in versions.items()
                    if written.get(name) is not was or was._version != version]  # fmt: skip
        parts = network.named_modules()
        return stirred + [name or "the network" for name, part in parts if part.training != modes.get(name)]

    try:
        yield moved
    finally:
        for name, part in network.named_modules():
            part.training = modes.get(name, part.training)
        for name, buffer in network.named_buffers():
            if name in buffers and not _same(buffer, buffers[name]):
                buffer.copy_(buffers[name])


def _same(now: Tensor | None, was: Tensor) -> bool:
    return now is not None and now.shape == was.shape and bool(((now == was) | (now.isnan() & was.isnan())).all())


def _in_other_company(network: nn.Module, images: Images) -> list[Tensor]:
    """Gate 36: the logits of the first half of a batch beside other images, and in a batch of their own."""
    half = max(1, len(images) // 2)
    mine = images[:half]
    others = torch.cat([mine, 1 - images[half:].flip(0)])
    return [Batches(_SAMPLE).run(network, others)[:half], Batches(_SAMPLE).run(network, mine)]


def _apart(passes: list[Tensor]) -> float:
    """Return how far logits (N, K) of several passes lie apart, relative to their length; 2 where not finite."""
    length = passes[0].norm(dim=1, keepdim=True).clamp_min(1e-30)
    return max(float(((other - passes[0]) / length).abs().nan_to_num(2.0).max()) for other in passes[1:])


def _judged(rule: Rule, figure: float) -> Check:
    return rule.judged(passed=figure <= rule.limit, figure=figure)


def _share_of_probabilities(logits: Tensor) -> float:
    simplex = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)
    return int(simplex.sum()) / len(logits)


def _labels(answers: Tensor, labels: Labels, classes: int) -> Check:
    """Gate 37: twice chance (six fifths of it for three classes or fewer), and the best renaming of the classes.

    The renaming is a one-to-one assignment of predicted to true classes (Kuhn 1955).
    """
    count = len(labels)
    right = int((answers == labels).sum()) / count
    least = (2.0 if classes > 3 else 1.2) / classes
    table = torch.zeros(classes, classes, dtype=torch.long)
    table.index_put_((answers.cpu(), labels.cpu()), torch.ones(count, dtype=torch.long), accumulate=True)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    renamed = int(table[rows, columns].sum()) / count if count >= _RENAMED * classes else right
    permuted = renamed - right > LABELS.limit
    reason = f"labels look permuted: with other names for the classes {renamed:.1%} are right, not {right:.1%}"
    if not permuted:
        reason = f"{right:.1%} are right, under {least:.1%}" if right < least else ""
    return LABELS.judged(passed=right >= least and not permuted, figure=right, reason=reason)


def _published(answers: Tensor, labels: Labels, published: float | None) -> Check:
    if published is None:
        return PUBLISHED.skipped("no accuracy is published for these images")
    found = wilson(int((answers == labels).sum()), len(labels), _SURE)
    passed = found.high >= published - PUBLISHED.limit
    reason = "" if passed else f"{found.value:.1%} are right, {published:.1%} are published"
    return PUBLISHED.judged(passed=passed, figure=found.value, reason=reason)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
