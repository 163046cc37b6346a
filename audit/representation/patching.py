"""Whether the logits are a function of one layer's output, by gradients and by replacing the output."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.passes import frozen_parameters, gradient_or_none
from audit.representation.hooks import HookPoint, in_this_thread, run_and_remove_hooks
from audit.representation.outputs import Index, with_changed
from audit.types import Images

_TOLERANCE = 1e-4  # of the largest logit: what rounding may change

_Change = Callable[[Tensor], Tensor]


class OutputPart(NamedTuple):
    """The output of one call of a module, and which of its values is meant where it holds several."""

    point: HookPoint
    output: Index | None = None


def carries_logits(model: nn.Module, part: OutputPart, images: Images) -> bool:
    """Return whether every path from images (N, C, H, W) to the logits passes through a layer's output.

    The gradient of the logits with respect to the images is zero once the output is detached; and once the output is
    replaced by that of other images, the logits are those of the other images. The second finds paths through
    operations without a gradient. It is left out in training mode, where passes change the network, and for networks
    whose passes differ by themselves.
    """
    if not _is_zero_detached(model, part, images):
        return False
    if model.training:
        return True
    ramp = torch.linspace(0, 1, images.numel(), device=images.device, dtype=images.dtype).view_as(images)
    return all(_follows(model, part, images, other) for other in (1 - images, ramp))


def _is_zero_detached(model: nn.Module, part: OutputPart, images: Images) -> bool:
    """Return whether the gradient of the logits with respect to the images is zero once the output is detached."""
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad(), frozen_parameters(model):
        logits = _run(model, leaf, part, lambda value: value.detach())
        weights = torch.arange(1.0, logits.numel() + 1, device=logits.device).view_as(logits)
        gradient = gradient_or_none((logits * weights).sum(), leaf)
    return gradient is None or not bool(gradient.any())


@torch.no_grad()
def _follows(model: nn.Module, part: OutputPart, images: Images, other: Images) -> bool:
    """Return whether images with the layer's output of other images get the logits of the other images."""
    seen: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        seen.append(value.clone())
        return value

    wanted, again = (_run_seeded(model, other, part, record) for _ in range(2))
    if not seen or not _equal(wanted, again):
        return True
    return _equal(_run_seeded(model, images, part, lambda _value: seen[0].clone()), wanted)


def _run_seeded(model: nn.Module, images: Images, part: OutputPart, change: _Change) -> Tensor:
    """Return the logits of a pass that leaves the global random generators as they were, and always draws the same."""
    devices: Sequence[torch.device] = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which seeds other devices, too
        if devices:
            torch.cuda.manual_seed(0)
        return _run(model, images, part, change)


def _run(model: nn.Module, images: Images, part: OutputPart, change: _Change) -> Tensor:
    """Return the logits with the tensor of one output changed."""
    calls = 0

    def replace(_module: nn.Module, _inputs: object, output: object) -> object:
        nonlocal calls
        calls += 1
        return with_changed(output, part.output, change) if calls - 1 == part.point.call else output

    handle = model.get_submodule(part.point.module).register_forward_hook(in_this_thread(replace))
    return run_and_remove_hooks(model, images, [handle])


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return whether two batches of logits agree but for rounding; equal infinities count as equal."""
    if one.shape != other.shape:
        return False
    scale = float(other[other.isfinite()].abs().max()) if bool(other.isfinite().any()) else 0.0
    return bool(torch.isclose(one, other, rtol=0, atol=_TOLERANCE * scale, equal_nan=True).all())
