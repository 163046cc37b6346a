"""Warm starts at run time: whether one layer precedes another, and worst cases kept for the searches that use them."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from audit.errors import UsageError
from audit.information.estimator import Vulnerability
from audit.representation.headless import resolved_layer
from audit.representation.hooks import OUTPUTS
from audit.representation.layers import Representation, find_module
from audit.run.cell import module_path
from audit.run.intermediate import EstimateCache, IntermediateResults
from audit.types import Images


class SearchResults:
    """Worst cases by cell id and seed, kept until the last cell that starts from them is finished."""

    def __init__(self, predecessors: Iterable[str] = ()) -> None:
        """Take the cell id of the predecessor of every cell that has one, as often as it is a predecessor."""
        self._uses = Counter(predecessors)
        self._found: dict[str, dict[int, Vulnerability]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def needed(self, cell_id: str) -> bool:
        """Return whether an unfinished cell starts from this one."""
        return self._uses[cell_id] > 0

    def get(self, cell_id: str) -> dict[int, Vulnerability]:
        """Return the worst cases of a cell by seed, as far as they are known."""
        return self._found.get(cell_id, {})

    def add(self, cell_id: str, found: dict[int, Vulnerability]) -> None:
        """Keep worst cases of a cell, by seed."""
        self._found.setdefault(cell_id, {}).update(found)

    def cache(self, cell_id: str, intermediate: IntermediateResults) -> EstimateCache:
        """Return the cache of a cell's worst cases; those that later cells need outlive the cell's record on disk."""

        def cached(seed: int, compute: Callable[[], Any], /) -> Any:
            needed = self.needed(cell_id)
            part = {"part": "worst", "cell": cell_id, "seed": seed}
            found = intermediate.get(part, compute, "" if needed else cell_id)
            if needed:
                self.add(cell_id, {seed: found})
            return found

        return cached

    def release(self, cell_id: str) -> None:
        """Count one use as finished, and drop the worst cases after the last one."""
        self._uses[cell_id] -= 1
        if self._uses[cell_id] <= 0:
            self._found.pop(cell_id, None)


@torch.no_grad()
def runs_before(network: nn.Module, layer: str, later: str, images: Images) -> bool:
    """Return whether a forward pass of images (N, C, H, W) computes a layer before another one, or both are the same.

    False for two calls of one module, whose order is not determined, and for layers that the network does not have.
    """
    layer, later = (resolved_layer(network, each) for each in (layer, later))
    if layer in (later, "input") or later in OUTPUTS:
        return True
    if module_path(layer) == module_path(later):
        return False
    order: list[str] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name in (layer, later):
            handles += _record_calls(network, name, order, images)
        network(images)
    except UsageError:  # reported in the record of that layer's own cell
        return False
    finally:
        for handle in handles:
            handle.remove()
    last = {name: number for number, name in enumerate(order)}
    return last.get(layer, len(order)) < last.get(later, -1)


def _record_calls(
    network: nn.Module, layer: str, order: list[str], images: Images
) -> list[torch.utils.hooks.RemovableHandle]:
    """Append the layer's name to `order` whenever a forward pass reaches it; return the hooks."""
    if layer == "input" or layer in OUTPUTS:
        return []
    if layer != "penultimate":
        module = find_module(network, module_path(layer))
        return [module.register_forward_hook(lambda _module, _inputs, _output: order.append(layer))]
    point = Representation(network, layer).point(images)
    if point is None:
        return []
    module = network.get_submodule(point.module)
    if point.is_input:
        return [module.register_forward_pre_hook(lambda _module, _inputs: order.append(layer))]
    return [module.register_forward_hook(lambda _module, _inputs, _output: order.append(layer))]
