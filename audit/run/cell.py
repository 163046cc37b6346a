"""Cells of a benchmark: what they are, the order in which they are computed, and their warm starts.

Warm starts: a worst-case search within a larger ball starts from the result for the next smaller ball at the same
layer. At the smallest radius it starts from the result for the next later layer, because images that collide at a
layer collide at every later one. The chain of warm starts is part of what decides a cell's numbers.

An estimator that `reads_later_layers` is run from the first layer to the last: the worst-case images of a layer are
a candidate at the next one, at the same radius. A later layer holds at most the information of an earlier one about
the same images, so that its worst case, and bounds on heads, are then at most the earlier layer's.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from audit.adversary.threat import ThreatModel, threat_model
from audit.config.benchmark import BenchmarkConfig
from audit.config.settings import AuditSettings
from model_zoo.lookup import expand_ref
from model_zoo.relative import Folders

_NAMED_DEPTHS = {"input": 0, "penultimate": 2, "logits": 3, "output": 3}
_INNER_DEPTH = 1


@dataclass(frozen=True)
class InputRules:
    """How images and classes of a data set meet a model; neither decides a number where it changes nothing.

    `preprocess` is whether images pass through the model's own resize and crop; `restrict_classes` is whether the
    network's outputs outside the data set's classes are left out; `balanced` takes equally many images of each class
    instead of the first.
    """

    preprocess: bool = True
    restrict_classes: bool = False
    balanced: bool = False


DEFAULT_RULES = InputRules()


@dataclass(frozen=True)
class Cell:
    """One audit of a benchmark: a model at a layer under a threat model, on the first `images` images of a data set.

    The worst-case search starts from the worst-case images of `after`, if there is such a cell; see `sources`. Values
    read at the layers `later` count for this layer, too.
    """

    ref: str
    name: str | None
    dataset: str
    images: int | None
    layer: str
    threat: ThreatModel
    settings: AuditSettings
    after: "Cell | None" = None
    rules: InputRules = DEFAULT_RULES
    later: tuple[str, ...] = ()


def cells(config: BenchmarkConfig) -> list[Cell]:
    """Return the cells of a benchmark, all cells of a model together; patterns of references stay as they are."""
    rules = input_rules(config)
    settings = dict(zip((section.shown for section in config.estimators), config.settings(), strict=True))
    return [
        Cell(
            ref=planned.model.ref,
            name=planned.model.name,
            dataset=planned.dataset,
            images=planned.images,
            layer=planned.layer,
            threat=threat_model(planned.norm, planned.eps),
            settings=settings[planned.estimator.shown],
            rules=rules,
        )
        for planned in config.planned()
    ]


def input_rules(config: BenchmarkConfig) -> InputRules:
    """Return how images and classes meet the models of a benchmark."""
    return InputRules(config.preprocess == "model", config.restrict_classes, config.balanced)


def expand(config: BenchmarkConfig, base: Folders = None) -> list[Cell]:
    """Return the cells of a benchmark with patterns such as `bundled:digits-*` expanded, and with their warm starts.

    The cells of one model stay together, so that it is loaded and attacked once. Patterns of files are matched in the
    working folder and in `base`. Raises UnknownNameError for a pattern without a match.
    """
    found = [replace(cell, ref=ref) for cell in cells(config) for ref in expand_ref(cell.ref, base)]
    first = {cell.ref: number for number, cell in reversed(list(enumerate(found)))}
    return with_warm_starts(sorted(found, key=lambda cell: first[cell.ref]))


def with_warm_starts(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, each with the cell that its search starts from, in the same order.

    At the smallest radius a layer starts from the next later layer, as far as names tell; a larger radius starts from
    the next smaller one at the same layer. Models, images, norms, estimators and attacks never share searches.
    """
    found = list(cells)
    for group in search_groups(cells):
        if cells[group[0]].settings.estimator.reads_later_layers:
            _chain(found, group)
            continue
        smallest: dict[str, Cell] = {}
        searched = [number for number in group if cells[number].threat.eps > 0]
        for (_, norm), radii in groupby(searched, key=lambda number: (cells[number].layer, cells[number].threat.norm)):
            first, *larger = radii
            found[first] = replace(cells[first], after=smallest.get(norm))
            for lower, higher in pairwise([first, *larger]):
                found[higher] = replace(cells[higher], after=found[lower])
            smallest[norm] = found[first]
    return found


def _chain(cells: list[Cell], group: Sequence[int]) -> None:
    """Let every cell of a group follow the one before it under the same norm, and name the layers after its own."""
    layers = list(dict.fromkeys(cells[number].layer for number in group))
    last: dict[str, Cell] = {}
    for number in group:
        cell, norm = cells[number], cells[number].threat.norm
        searched = cell.threat.eps > 0
        later = tuple(layers[layers.index(cell.layer) + 1 :])
        cells[number] = replace(cell, after=last.get(norm) if searched else None, later=later)
        last |= {norm: cells[number]} if searched else {}


def sources(cell: Cell) -> list[Cell]:
    """Return the cells whose worst-case images a cell's search uses: the one of the next smaller radius, or none.

    With an estimator that `reads_later_layers`, also the one of the same radius at the layer before.
    """
    if not cell.settings.estimator.reads_later_layers:
        return [cell.after] if cell.after else []
    before = list(_predecessors(cell))
    smaller = next((each for each in before if each.layer == cell.layer), None)
    earlier = next((each for each in before if each.layer != cell.layer and each.threat == cell.threat), None)
    return [each for each in (smaller, earlier) if each is not None]


def _predecessors(cell: Cell) -> Iterator[Cell]:
    while cell.after is not None:
        yield cell.after
        cell = cell.after


def search_groups(cells: Sequence[Cell]) -> list[list[int]]:
    """Return the numbers of the cells in groups that share results or warm starts, in the order of computation."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, cell in enumerate(cells):
        groups.setdefault((cell.ref, cell.name, cell.dataset, cell.images, cell.settings), []).append(number)
    for group in groups.values():
        group.sort(key=lambda number: (cells[number].threat.norm, cells[number].threat.eps))
        forward = cells[group[0]].settings.estimator.reads_later_layers
        group.sort(key=lambda number: _depth(cells[number].layer), reverse=not forward)
    return list(groups.values())


def warm_start_path(cell: Cell) -> list[list[object]]:
    """Return layer and radius of every cell in the chain of warm starts before a cell, the first one first.

    Those of larger radii have no effect on it.
    """
    chain = [each for each in _predecessors(cell) if each.threat.eps <= cell.threat.eps]
    return [[each.layer, each.threat.eps] for each in reversed(chain)]


def module_path(layer: str) -> str:
    """Return the module path of a layer's name, without call and output numbers.

    >>> module_path("features.3@1#0")
    'features.3'
    """
    return re.split("[@#]", layer)[0]


def _depth(layer: str) -> tuple[object, ...]:
    """Return a key that sorts layers in the order of execution, as far as names tell, and is unique for each layer."""
    path = module_path(layer)
    tokens = [(0, int(token)) if token.isdigit() else (1, token) for token in re.findall(r"\d+|[^\d.]+", path)]
    # (2,) sorts after each token: a stage ends after its parts
    return _NAMED_DEPTHS.get(path, _INNER_DEPTH), *tokens, (2,), layer
