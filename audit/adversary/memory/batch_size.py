"""How many images pass through a network at a time: as many as their saved activations fit a budget.

A pass with gradients keeps activations until its backward pass. On a CPU, the time of an image grows again once those
of a batch no longer fit what caches and the allocator bear: with EfficientNet-Lite0 (78 MiB an image) from batches of
4 on, with ResNet-20 on 32 pixels (1.4 MiB) above 128. Networks whose activations fit in the largest batch anyway,
such as those of the 8-pixel digits, are not limited.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from audit.adversary.memory.limit import Limit, current_limit, limited
from audit.adversary.passes import frozen_parameters
from audit.types import Images

CPU_BUDGET = 192 << 20
"""Bytes of saved activations in a batch on a CPU: networks of 0.03 to 78 MiB an image are fastest at or below it."""

IMAGES_BUDGET = 8 << 20
"""Bytes of the images of a batch on a CPU: the C library takes a larger tensor from the system anew in every pass."""

_CUDA_SHARE = 0.4  # of the free memory: gradients and workspaces take as much again
_LARGEST = 4096  # a larger batch saves nothing on any device

_saved: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = WeakKeyDictionary()


@contextmanager
def fitting_batches(network: nn.Module, images: Images) -> Iterator[None]:
    """Limit batches of images like these (N, C, H, W) to what fits, in the work inside; a fixed size stays.

    On a GPU, batches grow to what fits, too.
    """
    before = current_limit()
    if len(images) == 0 or (before is not None and before.fixed):
        yield
        return
    size = fitting_batch(network, images)
    limit = Limit(size, fixed=images.device.type == "cuda") if before is None else Limit(min(size, before.size))
    with limited(limit):
        yield


def fitting_batch(network: nn.Module, images: Images) -> int:
    """Return the largest batch of images like these (N, C, H, W), N > 0, that fits the budgets.

    On a CPU it depends on the network and the shape of the images alone.
    """
    needed = _saved.setdefault(network, {})
    key = (tuple(images.shape[1:]), images.dtype, images.device)
    if key not in needed:
        needed[key] = saved_bytes(network, images[:1])
    fitting = budget_of(images.device) // max(1, needed[key])
    if images.device.type == "cpu":
        fitting = min(fitting, IMAGES_BUDGET // (images[0].numel() * images.element_size()))
    return max(1, min(_LARGEST, fitting))


def budget_of(device: torch.device) -> int:
    """Return how many bytes of saved activations a batch may have: a constant on a CPU, a share of what a GPU has left.

    Memory that the allocator of torch holds for tensors to come counts as left.
    """
    if device.type != "cuda":
        return CPU_BUDGET
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(_CUDA_SHARE * (torch.cuda.mem_get_info(device)[0] + kept))


def saved_bytes(network: nn.Module, images: Images) -> int:
    """Return the bytes that autograd keeps of one forward pass of images (N, C, H, W), without the weights.

    It is 0 for a network that cannot be run: whoever runs it next reports why. Random numbers that the network draws
    are not taken from the global generators.
    """
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    leaf = images.detach().clone().requires_grad_()
    devices = [images.device] if images.device.type == "cuda" else []
    weights = {each.untyped_storage()._cdata for each in (*network.parameters(), *network.buffers())}
    try:
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            frozen_parameters(network),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            network(leaf)
    except Exception:  # a network of others may raise anything
        return 0
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in weights)
