"""A copy of a network that computes the same outputs faster: what a search may use, and no verdict.

Source: batch norm in eval mode is affine, so it folds into the convolution before it (Jacob et al. 2018, section 3.2).
"""

import copy

import torch
from torch import Tensor, nn

from audit.types import Images

_AGREEMENT = 1e-4  # of how far outputs lie apart


def faster(network: nn.Module, images: Images) -> nn.Module:
    """Return a copy with batch norms folded into convolutions, or the network where that cannot be done.

    The copy's parameters are frozen. Its outputs on a few of the images (N, C, H, W) must agree with the network's
    within 1e-4 of how far these lie from one another. Networks that cannot be traced are returned as they are.
    """
    if network.training or not any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
        return network
    folded = _folded(network)
    return folded if folded is not None and _agree(network, folded, images[:16]) else network


def _folded(network: nn.Module) -> nn.Module | None:
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(copy.deepcopy(network)).requires_grad_(False)
    except Exception:  # tracing runs foreign code, which may raise anything; the network itself is still there
        return None


@torch.no_grad()
def _agree(network: nn.Module, folded: nn.Module, images: Images) -> bool:
    try:
        ours, theirs = folded(images), network(images)
    except Exception:  # what was traced may fit one kind of input only
        return False
    if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= _AGREEMENT * (theirs - theirs.mean(0)).abs().max())
