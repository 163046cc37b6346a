"""Whether a network may be left early: the exit must change neither the features nor their gradients."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from audit.adversary.passes import agree, values_and_gradient
from audit.types import Images, standard_torch_state

_IMAGES = 8


@standard_torch_state()
def exit_is_exact(
    read: Callable[[nn.Module, Images, bool], tuple[Tensor, ...]], model: nn.Module, images: Images
) -> bool:
    """Return whether passes that are left early give the features and gradients of a complete one.

    `read` returns features (N, ...) of a model for images (N, C, H, W), and leaves the pass early if the last argument
    is True. A network that is left early may keep what its forward pass would have reset at its end; so a copy of it is
    read. A network that cannot be copied, or draws random numbers of its own, is not left early.
    """

    def reading(exits: bool) -> tuple[Tensor, Tensor] | None:
        torch.manual_seed(0)  # a network that draws from the global generators draws the same again
        return values_and_gradient(lambda few: _joined(read(twin, few, exits)), images[:_IMAGES])

    devices = [images.device] if images.device.type == "cuda" else []
    try:
        twin = copy.deepcopy(model)
        with torch.random.fork_rng(devices=devices):
            complete, first, second = (reading(exits) for exits in (False, True, True))
    except Exception:  # the network's own code runs, which may raise anything
        return False
    return agree(first, complete) and agree(second, complete)


def _joined(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([value.flatten(1).float() for value in values], 1)
