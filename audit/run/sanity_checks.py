"""Sanity checks of a loaded network: whether it is fit to be audited at all. A broken checkpoint fails them.

They are checks of level "gate". A network that fails one keeps its figures, with the check beside them, and is never
ranked. Outputs that are not finite cannot be measured at all and raise an error elsewhere.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from audit.adversary.attack_checks import Check
from audit.adversary.check_rules import RULES
from audit.adversary.memory.limit import allowed
from audit.adversary.memory.stages import stage
from audit.adversary.passes import Batches, outputs_of, row_lengths
from audit.flags import FlagCode, flag
from audit.proportion import wilson
from audit.representation.headless import Headless
from audit.run.gates.pixel_scales import least_accuracy, pixel_scale
from audit.types import Images, Labels

_SAMPLE = 64  # images for the checks of activations and repeated passes
_BATCH = 250
_COMPANY = 8  # images that are passed together, whatever memory allows, to see whether they change each other
_MIN_PER_CLASS = 10  # images that testing a renaming of the classes needs, lest one fit by chance
_QUANTILE = 3.290527  # of the normal distribution: one correct network in 1,000 fails by chance


@torch.no_grad()
@stage("gates")
def sanity_checks(
    network: nn.Module, images: Images, labels: Labels, published: float | None = None
) -> tuple[Check, ...]:
    """Return the sanity checks of a network in eval mode, on images (N, C, H, W) with labels (N,).

    `published` is the clean accuracy published for these images, a fraction. They take about five forward passes an
    image. Checks of classes are skipped for an encoder. Buffers that change are restored, and the global random
    generators are left as they were.
    """
    sample, forward = images[:_SAMPLE], partial(_rows, network)
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _restored(network) as changes:
        not_finite = _not_finite(network, sample)
        passes = [Batches(_SAMPLE).run(forward, sample) for _ in range(3)]
        by_company = _logits_by_company(network, sample)
        changed = changes()
        scale, scores, order, accuracy = _class_checks(network, images, labels, published, passes[0])
    repeated = RULES["repeated_passes"].at_most(_relative_difference(passes))
    independence = _relative_difference([passes[0][: len(by_company[0])], *by_company])
    independent = RULES["batch_independence"].at_most(independence)
    if not repeated.passed:
        independent = RULES["batch_independence"].skipped("forward passes differ by themselves")
    return (
        scale,
        RULES["finite_activations"].result(
            passed=not not_finite, figure=len(not_finite), reason=_first_names(not_finite)
        ),
        scores,
        repeated,
        RULES["eval_mode"].result(passed=not changed, figure=len(changed), reason=_first_names(changed)),
        independent,
        order,
        accuracy,
    )


def _rows(network: nn.Module, images: Images) -> Tensor:
    """Return the outputs of a network as (N, K); features of an encoder may have more axes."""
    return outputs_of(network, images).flatten(1)


def _class_checks(
    network: nn.Module, images: Images, labels: Labels, published: float | None, logits: Tensor
) -> tuple[Check, ...]:
    """Return the checks that need classes, in the order of their names here; all are skipped for an encoder."""
    if isinstance(network, Headless):
        names = ("pixel_scale", "score_outputs", "label_order", "published_accuracy")
        return tuple(RULES[name].skipped("the network has no classifier") for name in names)
    predictions = Batches(_BATCH).run(partial(outputs_of, network), images).argmax(1)
    probabilities = _share_of_probabilities(logits)
    return (
        pixel_scale(network, images, labels, predictions),
        RULES["score_outputs"].result(passed=probabilities < 1, figure=probabilities),
        _label_order(predictions, labels, logits.shape[1]),
        _published_accuracy(predictions, labels, published),
    )


def sanity_flags(checks: Iterable[Check]) -> list[str]:
    """Return the flag of a network that failed sanity checks, with their names; none if it passed all."""
    failed = [check for check in checks if check.passed is False]
    named = ", ".join(f"{check.name}{f' ({check.reason})' if check.reason else ''}" for check in failed)
    return [flag(FlagCode.GATED, f"the network is not fit to be ranked: failed {named}")] if failed else []


def _not_finite(network: nn.Module, images: Images) -> list[str]:
    """Return the names of the innermost modules with an output that is not finite."""
    found: dict[str, None] = {}

    def look(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        parts = output if isinstance(output, list | tuple) else [output]
        if any(isinstance(part, Tensor) and not part.isfinite().all() for part in parts):
            found[name] = None

    leaves = [(name, part) for name, part in network.named_modules() if not list(part.children())]
    hooks = [part.register_forward_hook(partial(look, name or "the network")) for name, part in leaves]
    try:
        if not Batches(_SAMPLE).run(partial(_rows, network), images).isfinite().all():
            found["the output"] = None
    finally:
        for hook in hooks:
            hook.remove()
    return list(found)


@contextmanager
def _restored(network: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Give a function that names buffers, parameters and modes changed since; restore buffers and modes at the end."""
    buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
    versions = {name: (parameter, parameter._version) for name, parameter in network.named_parameters()}
    modes = {name: part.training for name, part in network.named_modules()}

    def changes() -> list[str]:
        now = dict(network.named_buffers())
        changed = [name for name, before in buffers.items() if not _equal(now.get(name), before)]
        changed += sorted(set(now) - set(buffers))
        parameters = dict(network.named_parameters())
        changed += [
            name
            for name, (before, version) in versions.items()
            if parameters.get(name) is not before or before._version != version
        ]
        parts = network.named_modules()
        return changed + [name or "the network" for name, part in parts if part.training != modes.get(name)]

    try:
        yield changes
    finally:
        for name, part in network.named_modules():
            part.training = modes.get(name, part.training)
        for name, buffer in network.named_buffers():
            if name in buffers and not _equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])


def _equal(now: Tensor | None, before: Tensor) -> bool:
    """Return whether two buffers are equal, NaN to NaN."""
    if now is None or now.shape != before.shape:
        return False
    return bool(((now == before) | (now.isnan() & before.isnan())).all())


def _logits_by_company(network: nn.Module, images: Images) -> list[Tensor]:
    """Return the logits of the first half of the images in a batch with other images, and in a batch of their own."""
    size = max(_COMPANY, min(_SAMPLE, allowed(_SAMPLE)))
    whole = Batches(size, exactly=True)
    few = images[:size]  # one batch: the images of one are company to each other
    half = max(1, len(few) // 2)
    first = few[:half]
    others = torch.cat([first, 1 - few[half:].flip(0)])
    forward = partial(_rows, network)
    return [whole.run(forward, others)[:half], whole.run(forward, first)]


def _relative_difference(passes: list[Tensor]) -> float:
    """Return the largest difference of logits (N, K) to the first pass, relative to their length; 2 if not finite."""
    length = row_lengths(passes[0]).clamp_min(1e-30)
    return max(float(((other - passes[0]) / length).abs().nan_to_num(2.0).max()) for other in passes[1:])


def _share_of_probabilities(logits: Tensor) -> float:
    simplex = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)
    return int(simplex.sum()) / len(logits)


def _label_order(predictions: Tensor, labels: Tensor, classes: int) -> Check:
    """Check accuracy against twice chance (6/5 of it for three classes or fewer), and against renamed classes.

    The best renaming is an assignment of predicted to true classes. Source: Kuhn 1955.
    """
    rule, count = RULES["label_order"], len(labels)
    accuracy = int((predictions == labels).sum()) / count
    least = least_accuracy(classes)
    table = torch.zeros(classes, classes, dtype=torch.long)
    table.index_put_((predictions.cpu(), labels.cpu()), torch.ones(count, dtype=torch.long), accumulate=True)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    renamed = int(table[rows, columns].sum()) / count if count >= _MIN_PER_CLASS * classes else accuracy
    permuted = renamed - accuracy > rule.limit
    reason = f"labels look permuted: with renamed classes {renamed:.1%} are correct, not {accuracy:.1%}"
    if not permuted:
        reason = f"{accuracy:.1%} are correct, under {least:.1%}" if accuracy < least else ""
    return rule.result(passed=accuracy >= least and not permuted, figure=accuracy, reason=reason)


def _published_accuracy(predictions: Tensor, labels: Labels, published: float | None) -> Check:
    rule = RULES["published_accuracy"]
    if published is None:
        return rule.skipped("no accuracy is published for these images")
    found = wilson(int((predictions == labels).sum()), len(labels), _QUANTILE)
    passed = found.high >= published - rule.limit
    reason = "" if passed else f"{found.value:.1%} are correct, {published:.1%} are published"
    return rule.result(passed=passed, figure=found.value, reason=reason)


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
