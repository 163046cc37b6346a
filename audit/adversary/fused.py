"""A copy of a network that computes the same outputs faster: what a search may use, and no verdict.

Source: batch norm in eval mode is affine, so it folds into the convolution before it (Jacob et al. 2018, section 3.2).
So does dividing pixels by a constant into the convolution after it; subtracting one does not, for padding is zero.
A strided convolution is one of stride 1 on blocks of pixels (the "space to depth" of Shi et al. 2016, reversed).
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from audit.types import Images

_AGREEMENT = 1e-4  # of how far outputs lie apart
_FEW = 4  # channels: kernels for fewer than a vector register holds are slow


def faster(network: nn.Module, images: Images) -> nn.Module:
    """Return a copy with batch norms and pixel scales folded and strides on pixels undone, or the network itself.

    The copy's parameters are frozen. Its outputs on a few of the images (N, C, H, W) must agree with the network's
    within 1e-4 of how far these lie from one another. Networks that cannot be traced are returned as they are.
    """
    if network.training:
        return network
    folded = _folded(network, images)
    return folded if folded is not None and agree(network, folded, images) else network


def _folded(network: nn.Module, images: Images) -> nn.Module | None:
    from torch.fx.experimental.optimization import fuse

    try:
        folded = fuse(copy.deepcopy(network))
        changed = _fold_scales(folded) + _undo_strides(folded, images)
    except Exception:  # tracing runs foreign code, which may raise anything; the network itself is still there
        return None
    return folded.requires_grad_(False) if changed or _norms(folded) < _norms(network) else None


def _norms(network: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def _fold_scales(traced: nn.Module) -> int:
    """Fold divisions by one constant a channel into the convolutions that alone read the result; return how many."""
    assert isinstance(traced, GraphModule)
    scales = [node for node in traced.graph.nodes if node.target is operator.truediv]
    folded = [node for node in scales if _fold_scale(traced, node)]
    traced.graph.lint()
    traced.recompile()
    return len(folded)


def _fold_scale(traced: GraphModule, division: Node) -> bool:
    """Fold one division, and return whether it could be done."""
    values, scale = division.args
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    readers = list(division.users)
    layers = [traced.get_submodule(str(node.target)) for node in readers if node.op == "call_module"]
    constant = getattr(traced, str(scale.target), None) if isinstance(scale, Node) and scale.op == "get_attr" else None
    if not isinstance(values, Node) or not isinstance(constant, Tensor) or len(layers) < len(readers):
        return False
    if not all(_takes(layer, constant) and calls.count(node.target) == 1
               for layer, node in zip(layers, readers, strict=True)):  # fmt: skip
        return False
    for layer in layers:
        weight = layer.get_parameter("weight")  # (out, in, height, width)
        weight.data.div_(constant)
    division.replace_all_uses_with(values)
    traced.graph.erase_node(division)
    return True


def _takes(layer: nn.Module, constant: Tensor) -> bool:
    """Return whether a layer's weights (out, in, height, width) can be divided by a constant (1, in, 1, 1)."""
    shape = getattr(layer, "weight", constant).shape
    return type(layer) is nn.Conv2d and layer.groups == 1 and constant.shape == (1, shape[1], 1, 1)


def _undo_strides(traced: nn.Module, images: Images) -> int:
    """Replace the strided convolutions that read few channels, as the first one does; return how many."""
    found = [(name, layer) for name, layer in traced.named_modules() if _reads_blocks(layer, images)]
    for name, layer in found:
        traced.set_submodule(name, _OnBlocks(layer))
    return len(found)


def _reads_blocks(layer: nn.Module, images: Images) -> bool:
    if type(layer) is not nn.Conv2d or layer.in_channels > _FEW or isinstance(layer.padding, str):
        return False
    stride = layer.stride[0]
    plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    even = all(side % stride == 0 for side in images.shape[-2:])
    return plain and even and stride > 1 and layer.stride[1] == stride


class _OnBlocks(nn.Module):
    """A convolution of stride s as one of stride 1 on blocks of s x s pixels: the same products, in other places.

    Pixel s i + k - p of the strided one is phase f of block i + b, where k - p = s b + f.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.side = conv.stride[0]
        self.kernel, self.padding = conv.kernel_size, (conv.padding[0], conv.padding[1])
        self.first = [-(pad // self.side) - (pad % self.side > 0) for pad in self.padding]
        self.last = [(size - 1 - pad) // self.side for size, pad in zip(self.kernel, self.padding, strict=True)]
        self.weight = nn.Parameter(self._placed(conv.weight.detach()))
        self.bias = conv.bias

    def _placed(self, weight: Tensor) -> Tensor:
        """Return the weights (out, in, h, w) where the blocks have them: (out, in s s, blocks, blocks)."""
        room = [-pad - self.side * first for pad, first in zip(self.padding, self.first, strict=True)]
        whole = [self.side * (last - first + 1) for first, last in zip(self.first, self.last, strict=True)]
        placed = weight.new_zeros(*weight.shape[:2], *whole)
        (top, left), (height, width) = room, self.kernel
        placed[..., top : top + height, left : left + width] = weight
        return _blocks(placed, self.side)

    def forward(self, images: Tensor) -> Tensor:
        """Return what the strided convolution returns."""
        blocks = _blocks(images, self.side)
        before = [-first for first in self.first]
        after = [self._after(images.shape[2 + axis], axis) for axis in (0, 1)]
        if before == after:
            return F.conv2d(blocks, self.weight, self.bias, padding=(before[0], before[1]))
        return F.conv2d(F.pad(blocks, (before[1], after[1], before[0], after[0])), self.weight, self.bias)

    def _after(self, pixels: int, axis: int) -> int:
        """Return how many blocks the last outputs need beyond the image; negative where the stride leaves some out."""
        outputs = (pixels + 2 * self.padding[axis] - self.kernel[axis]) // self.side + 1
        return outputs - 1 + self.last[axis] - (pixels // self.side - 1)


def _blocks(images: Tensor, side: int) -> Tensor:
    """Return images (N, C, H, W) as blocks of pixels (N, C s s, H / s, W / s)."""
    count, channels, height, width = images.shape
    apart = images.reshape(count, channels, height // side, side, width // side, side).permute(0, 1, 3, 5, 2, 4)
    return apart.reshape(count, -1, height // side, width // side)  # a third of the time of torch's pixel_unshuffle


@torch.no_grad()
def agree(network: nn.Module, folded: nn.Module, images: Images) -> bool:
    """Return whether two maps of a few of the images (N, C, H, W) to vectors differ by 1e-4 of their spread at most."""
    images = images[:16]
    try:
        ours, theirs = folded(images), network(images)
    except Exception:  # what was traced may fit one kind of input only
        return False
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= _AGREEMENT * (theirs - theirs.mean(0)).abs().max())
