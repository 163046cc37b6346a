"""Fused copies of networks, which compute the same outputs in less time; used in searches, not for verdicts.

Batch norm in eval mode is affine and is folded into the convolution before it. Division of pixels by a constant is
folded into the convolution after it; a subtraction cannot be, because padding is zero. A strided convolution becomes
one of stride 1 on blocks of pixels.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", section 3.2 (batch norm); Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an
Efficient Sub-Pixel Convolutional Neural Network" (space to depth is the inverse of their layer).
"""

import copy
import operator
import threading
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Tracer

from audit.adversary.passes import agree, values_and_gradient
from audit.types import Images, standard_torch_state

_FEW_CHANNELS = 4  # convolutions of at most as many input channels do not fill a vector register


@standard_torch_state()
def fused_copy(network: nn.Module, images: Images) -> nn.Module:
    """Return a fused copy of a network in eval mode, with frozen parameters, or the network itself.

    The network itself is returned if it cannot be traced, if there is nothing to fold, or if outputs or input gradients
    on 16 of the images (N, C, H, W) differ, see `computes_the_same`.
    """
    if network.training:
        return network
    folded = _folded(network, images)
    return folded if folded is not None and computes_the_same(network, folded, images) else network


def _folded(network: nn.Module, images: Images) -> nn.Module | None:
    from torch.fx.experimental.optimization import fuse

    try:
        folded = fuse(_traced(copy.deepcopy(network)), inplace=True, no_trace=True)
        changed = _fold_scales(folded) + _undo_strides(folded, images)
    except Exception:  # tracing runs the model's own code, which may raise anything
        return None
    return folded.requires_grad_(False) if changed or _batch_norms(folded) < _batch_norms(network) else None


_tracing = threading.Lock()


class _ThreadTracer(Tracer):
    """A tracer of one thread's module calls: while it traces, torch hands it those of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a call of a module in this thread; run it in others."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _traced(network: nn.Module) -> GraphModule:
    tracer = _ThreadTracer()
    with _tracing:  # two traces at a time would not undo each other's changes to torch
        graph = tracer.trace(network)
    return GraphModule(tracer.root, graph)


def _batch_norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def _fold_scales(traced: nn.Module) -> int:
    """Fold divisions by one constant a channel into the convolutions that read the result; return how many."""
    assert isinstance(traced, GraphModule)
    scales = [node for node in traced.graph.nodes if node.target is operator.truediv]
    folded = [node for node in scales if _fold_scale(traced, node)]
    traced.graph.lint()
    traced.recompile()
    return len(folded)


def _fold_scale(traced: GraphModule, division: Node) -> bool:
    """Fold one division if only convolutions read its result, and return whether it was folded."""
    values, scale = division.args
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    readers = list(division.users)
    layers = [traced.get_submodule(str(node.target)) for node in readers if node.op == "call_module"]
    constant = getattr(traced, str(scale.target), None) if isinstance(scale, Node) and scale.op == "get_attr" else None
    if not isinstance(values, Node) or not isinstance(constant, Tensor) or len(layers) < len(readers):
        return False
    once = all(calls.count(node.target) == 1 for node in readers)
    if not once or not all(_can_absorb(layer, constant) for layer in layers):
        return False
    for layer in layers:
        weight = layer.get_parameter("weight")  # (out, in, height, width)
        weight.data.div_(constant)
    division.replace_all_uses_with(values)
    traced.graph.erase_node(division)
    return True


def _can_absorb(layer: nn.Module, constant: Tensor) -> bool:
    """Return whether a layer's weights (out, in, height, width) can be divided by a constant (1, in, 1, 1)."""
    shape = getattr(layer, "weight", constant).shape
    return type(layer) is nn.Conv2d and layer.groups == 1 and constant.shape == (1, shape[1], 1, 1)


def _undo_strides(traced: nn.Module, images: Images) -> int:
    """Replace strided convolutions with few input channels, such as the first one; return how many."""
    found = [(name, layer) for name, layer in traced.named_modules() if _is_replaceable(layer, images)]
    for name, layer in found:
        traced.set_submodule(name, _BlockConvolution(layer))
    return len(found)


def _is_replaceable(layer: nn.Module, images: Images) -> bool:
    if type(layer) is not nn.Conv2d or layer.in_channels > _FEW_CHANNELS or isinstance(layer.padding, str):
        return False
    stride = layer.stride[0]
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    even = all(side % stride == 0 for side in images.shape[-2:])
    return plain and even and stride > 1 and layer.stride[1] == stride


class _BlockConvolution(nn.Module):
    """A convolution of stride s, computed as one of stride 1 on blocks of s x s pixels.

    Pixel s i + k - p, for output i, kernel entry k and padding p, is phase f of block i + b, where k - p = s b + f.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.side = conv.stride[0]
        self.kernel, self.padding = conv.kernel_size, (conv.padding[0], conv.padding[1])
        self.first = [-(pad // self.side) - (pad % self.side > 0) for pad in self.padding]
        self.last = [(size - 1 - pad) // self.side for size, pad in zip(self.kernel, self.padding, strict=True)]
        self.weight = nn.Parameter(self._block_weights(conv.weight.detach()))
        self.bias = conv.bias

    def _block_weights(self, weight: Tensor) -> Tensor:
        """Return the weights (out, in, h, w) rearranged for blocks, (out, in s s, blocks, blocks)."""
        offset = [-pad - self.side * first for pad, first in zip(self.padding, self.first, strict=True)]
        sides = [self.side * (last - first + 1) for first, last in zip(self.first, self.last, strict=True)]
        placed = weight.new_zeros(*weight.shape[:2], *sides)
        (top, left), (height, width) = offset, self.kernel
        placed[..., top : top + height, left : left + width] = weight
        return _blocks(placed, self.side)

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of the strided convolution."""
        blocks = _blocks(images, self.side)
        before = [-first for first in self.first]
        after = [self._padding_after(images.shape[2 + axis], axis) for axis in (0, 1)]
        if before == after:
            return F.conv2d(blocks, self.weight, self.bias, padding=(before[0], before[1]))
        return F.conv2d(F.pad(blocks, (before[1], after[1], before[0], after[0])), self.weight, self.bias)

    def _padding_after(self, pixels: int, axis: int) -> int:
        """Return how many blocks of padding the last outputs read; negative if the stride leaves blocks unread."""
        outputs = (pixels + 2 * self.padding[axis] - self.kernel[axis]) // self.side + 1
        return outputs - 1 + self.last[axis] - (pixels // self.side - 1)


def _blocks(images: Tensor, side: int) -> Tensor:
    """Return images (N, C, H, W) as blocks of pixels (N, C s s, H / s, W / s)."""
    count, channels, height, width = images.shape
    split = images.reshape(count, channels, height // side, side, width // side, side).permute(0, 1, 3, 5, 2, 4)
    return split.reshape(count, -1, height // side, width // side)  # three times as fast as pixel_unshuffle


@standard_torch_state()
def computes_the_same(network: nn.Module, folded: nn.Module, images: Images) -> bool:
    """Return whether two networks agree in outputs and input gradients on the first 16 images (N, C, H, W).

    A copy with the outputs alone would mislead a search: tracing replaces a `torch.autograd.Function` by its forward
    pass, which loses its gradient.
    """
    images = images[:16]
    try:
        return agree(values_and_gradient(folded, images), values_and_gradient(network, images))
    except Exception:  # a traced graph may be specific to one input shape
        return False
