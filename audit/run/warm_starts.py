"""Which search starts where another one ended: radii from small to large, layers from the last to the first.

What a ball allows a larger ball allows. What merges at a layer merges at every later one, so images that are worst for
a layer are the first to try at the layers before it. A cell follows one other at most, and that is a part of what
decides its numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import torch
from torch import nn

from audit.errors import UnknownNameError
from audit.representation.hooks import is_linear
from audit.representation.layers import find_module
from audit.run.cell import Cell
from audit.types import Images

_PLACES = {"input": 0, "penultimate": 2, "logits": 3}
_INSIDE = 1


def climbed(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, each with the one that its search follows; in their order.

    At the smallest radius a layer follows the one behind it, as far as names tell; a larger radius follows the next
    smaller one at its layer. Models, images, norms, estimators and attacks never follow each other.
    """
    found = list(cells)
    for group in sharing(cells):
        roots: dict[str, Cell] = {}
        searched = [number for number in group if cells[number].threat.eps > 0]
        for (_, norm), rungs in groupby(searched, key=lambda number: (cells[number].layer, cells[number].threat.norm)):
            first, *larger = rungs
            found[first] = replace(cells[first], after=roots.get(norm))
            for lower, higher in pairwise([first, *larger]):
                found[higher] = replace(cells[higher], after=found[lower])
            roots[norm] = found[first]
    return found


def sharing(cells: Sequence[Cell]) -> list[list[int]]:
    """Return the numbers of the cells in groups that share cases or searches, in the order to compute them in."""
    groups: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        key = repr((cell.ref, cell.name, cell.dataset, cell.images, cell.settings))
        groups.setdefault(key, []).append(number)
    for group in groups.values():
        group.sort(key=lambda number: (cells[number].threat.norm, cells[number].threat.eps))
        group.sort(key=lambda number: _depth(cells[number].layer), reverse=True)
    return list(groups.values())


def path(cell: Cell) -> list[list[object]]:
    """Return the layers and radii that a cell's search comes from, the first one first."""
    return [*path(cell.after), [cell.after.layer, cell.after.threat.eps]] if cell.after else []


@torch.no_grad()
def runs_before(network: nn.Module, layer: str, later: str, images: Images) -> bool:
    """Return whether one forward pass of images (N, C, H, W) leaves a layer before a later one, or it is the same."""
    if layer in (later, "input") or later == "logits":
        return True
    if _module(layer) == _module(later):
        return False  # two calls of one module: which is which is not worth finding out
    seen: list[str] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for name in (layer, later):
            handles += _noted(network, name, seen)
        network(images)
    except UnknownNameError:  # whose record says it
        return False
    finally:
        for handle in handles:
            handle.remove()
    last = {name: number for number, name in enumerate(seen)}
    return last.get(layer, len(seen)) < last.get(later, -1)


def _noted(network: nn.Module, layer: str, seen: list[str]) -> list[torch.utils.hooks.RemovableHandle]:
    if layer == "penultimate":
        linear = [part for part in network.modules() if is_linear(part)]
        return [part.register_forward_pre_hook(lambda _module, _inputs: seen.append(layer)) for part in linear]
    if layer in _PLACES:
        return []
    module = find_module(network, _module(layer))
    return [module.register_forward_hook(lambda _module, _inputs, _output: seen.append(layer))]


def _module(layer: str) -> str:
    """Return a layer's name without the call and the output that it means."""
    return re.split("[@#]", layer)[0]


def _depth(layer: str) -> tuple[object, ...]:
    """Return a key that sorts layers as a network runs through them, as far as names tell; never the same for two."""
    path = _module(layer)
    tokens = [(0, int(token)) if token.isdigit() else (1, token) for token in re.findall(r"\d+|[^\d.]+", path)]
    return _PLACES.get(path, _INSIDE), *tokens, (2,), layer  # a stage ends after its parts: (2,) is beyond each token
