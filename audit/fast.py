"""A copy of a network that computes the same outputs faster: what a search may use, and no verdict.

Source: batch norm in eval mode is affine, so it folds into the convolution before it (Jacob et al. 2018, section 3.2).
So does dividing pixels by a constant into the convolution after it; subtracting one does not, for padding is zero.
"""

import copy
import operator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from audit.types import Images

_AGREEMENT = 1e-4  # of how far outputs lie apart


def faster(network: nn.Module, images: Images) -> nn.Module:
    """Return a copy with batch norms and pixel scales folded into convolutions, or the network where none can be.

    The copy's parameters are frozen. Its outputs on a few of the images (N, C, H, W) must agree with the network's
    within 1e-4 of how far these lie from one another. Networks that cannot be traced are returned as they are.
    """
    if network.training:
        return network
    folded = _folded(network)
    return folded if folded is not None and _agree(network, folded, images[:16]) else network


def _folded(network: nn.Module) -> nn.Module | None:
    from torch.fx.experimental.optimization import fuse

    try:
        folded = fuse(copy.deepcopy(network))
        scales = _fold_scales(folded)
    except Exception:  # tracing runs foreign code, which may raise anything; the network itself is still there
        return None
    return folded.requires_grad_(False) if scales or _norms(folded) < _norms(network) else None


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


@torch.no_grad()
def _agree(network: nn.Module, folded: nn.Module, images: Images) -> bool:
    try:
        ours, theirs = folded(images), network(images)
    except Exception:  # what was traced may fit one kind of input only
        return False
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= _AGREEMENT * (theirs - theirs.mean(0)).abs().max())
