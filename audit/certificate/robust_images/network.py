"""A network read for bounds: every operation on ranges over balls of images, with lines for its activations.

A forward pass of intervals, tightened before every activation by the backward pass of lines where an input may have
either sign. `auto_LiRPA`, which bounds more kinds of networks, has no release for current versions of torch.

Source: Gowal et al. 2018, "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models";
Zhang et al. 2018, "Efficient Neural Network Robustness Certification with General Activation Functions" (CROWN).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from audit.adversary.memory.counting import PassCount
from audit.adversary.threat import Linf, ThreatModel
from audit.certificate.proof.arithmetic import Constant
from audit.certificate.proof.numbers import Unprovable
from audit.certificate.proof.operations import FUNCTIONS, METHODS, MODULES
from audit.certificate.proof.pieces import LayerInterpreter, trace_layer
from audit.certificate.robust_images.balls import box
from audit.certificate.robust_images.bounds import Bounds
from audit.certificate.robust_images.lines import Lines, relu_lines, sigmoid_lines, tanh_lines
from audit.certificate.robust_images.results import BoundEffort
from audit.certificate.robust_images.tape import MaximumRelaxation, Relaxation, RowCost, Rows, Tape
from audit.representation.layers import Representation
from audit.types import Images

_ENTRIES = 2**19  # coefficients of the largest layer that are held at once: they fit into the cache
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the largest logit, between the trace and the network
_LARGE = 32  # rows of one image, on average, that are bounded apart from those of other images
_ON_PATCHES = 4.0  # time of a multiplication on patches, relative to one on full maps
_FIRST_SIDES = 0.7  # largest share of the rows for an activation that bound the first side of its inputs
_NARROW = 0.02  # ranges of sigmoid and tanh that are not worth tightening


class BoundedNetwork(PassCount):
    """A network in eval mode, traced up to its logits, in the precision of its parameters.

    `image` (1, C, H, W) is used to compare the trace with the network. Raises Unprovable, with the name of the
    operation, for a network that cannot be read. `passes` counts forward+backward passes of single images, `cost` the
    multiplications of one forward pass of one image, and `activations` the activations.
    """

    def __init__(self, network: nn.Module, image: Images, effort: BoundEffort | None = None) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.effort, self.passes = effort or BoundEffort(), 0.0
        self._constants: dict[str, tuple[Constant, ...]] = {}
        self.cost, self.activations = 1.0, 1
        with torch.no_grad():
            representation = Representation(self.network, "logits")
            representation(image)
            self._traced = trace_layer(representation)
        tape, _ = self.read(image, Linf(0.0), refine=False)
        self.cost, self.activations = sum(step.cost for step in tape.steps), len(tape.relaxations)

    @torch.no_grad()
    def read(self, clean: Images, threat: ThreatModel, *, refine: bool) -> tuple[Tape, Bounds]:
        """Return the tape of the balls around clean images (N, C, H, W), and the range of their logits (N, K).

        `refine` tightens the inputs of activations by lines, within the budget. Raises Unprovable if the trace does
        not give the logits of the network on every image.
        """
        tape = Tape(clean, threat)
        interpreter = _BoundInterpreter(self, tape, refine=refine)
        start = Bounds(tape, 0, clean, *box(clean, threat), torch.ones_like(clean[:1]))
        logits: Bounds = interpreter.features(start)
        self.spend(len(clean))
        expected = self.network(clean)
        same_shape = logits.value.shape == expected.shape
        error = float((logits.value - expected).abs().max()) if same_shape else torch.inf
        if not error <= _TOLERANCE[expected.dtype] * float(expected.abs().max()):
            raise Unprovable("the trace of the network gives other logits than the network itself")
        return tape, logits

    def row_cost(self, tape: Tape, at: int) -> float:
        """Return the forward+backward passes of one row that is pulled back from a step."""
        return tape.dense_cost(at).multiplications / (2 * self.cost)

    def least(self, tape: Tape, logits: Bounds, rows: Rows, slopes: Mapping[int, Tensor] | None = None) -> Tensor:
        """Return lower bounds (M,) of linear functions of logits; `slopes` as in `Tape.least`."""
        self.spend(len(rows.image) * self.row_cost(tape, logits.at))
        return tape.least(logits.at, logits.value, rows, slopes)

    def constants(self) -> dict[str, tuple[Constant, ...]]:
        """Return the constants of the network's nodes, computed once."""
        return self._constants

    def graph(self) -> fx.GraphModule:
        """Return the traced network."""
        return self._traced


def _curve(function: Callable[[Tensor], Tensor], lines: Callable[[Tensor, Tensor], Lines]) -> Callable[..., Bounds]:
    return lambda interpreter, *arguments: interpreter.curve(arguments[-1], function, lines)


_SIGMOID, _TANH = _curve(torch.sigmoid, sigmoid_lines), _curve(torch.tanh, tanh_lines)


class _BoundInterpreter(LayerInterpreter):
    """Evaluation on bounds, which records every activation on the tape and tightens the range of its input."""

    modules: ClassVar[Mapping[Any, Callable[..., Any]]] = {**MODULES, nn.Sigmoid: _SIGMOID, nn.Tanh: _TANH}
    functions: ClassVar[Mapping[Any, Callable[..., Any]]] = {
        **FUNCTIONS,
        torch.sigmoid: _SIGMOID,
        torch.tanh: _TANH,
        nn.functional.sigmoid: _SIGMOID,
        nn.functional.tanh: _TANH,
    }
    methods: ClassVar[Mapping[Any, Callable[..., Any]]] = {**METHODS, "sigmoid": _SIGMOID, "tanh": _TANH}
    supported: ClassVar[str] = "operation for bounds"

    def __init__(self, network: BoundedNetwork, tape: Tape, *, refine: bool) -> None:
        super().__init__(network.graph(), network.constants())
        self._network, self._tape = network, tape
        # per image, so that the bounds of an image do not depend on the others of its batch
        self._budget = torch.full((len(tape.clean),), network.effort.passes if refine else 0.0, dtype=torch.float64)

    def relu(self, value: Bounds) -> Bounds:
        """Return max(value, 0)."""
        value = self._tightened(value, torch.minimum(-value.low, value.high), one_side_first=True)
        ends = (value.low.clamp_min(0), value.high.clamp_min(0))
        return self._activated(value, value.value.clamp_min(0), ends, relu_lines(value.low, value.high))

    def curve(
        self,
        value: Bounds,
        function: Callable[[Tensor], Tensor],
        lines: Callable[[Tensor, Tensor], Lines],
    ) -> Bounds:
        """Return an increasing function of the values, with the lines that belong to it."""
        value = self._tightened(value, value.high - value.low - _NARROW)
        unit = 8 * torch.finfo(value.value.dtype).eps  # more than the error of the library's functions
        ends = (function(value.low) - unit, function(value.high) + unit)
        return self._activated(value, function(value.value), ends, lines(value.low, value.high))

    def maximum(self, windows: Bounds) -> Bounds:
        """Return the maximum (N, C, L) along axis 2 of windows (N, C, K, L)."""
        low, entry = windows.low.max(2, keepdim=True)
        others = windows.high.scatter(2, entry, -torch.inf).amax(2, keepdim=True)
        ceiling = windows.high.amax(2, keepdim=True)
        relaxation = MaximumRelaxation(entry, low >= others, ceiling, windows.value)
        value = windows.value.amax(2)
        at = self._tape.activate(windows.at, value.shape[1:], relaxation)
        return Bounds(self._tape, at, value, low.squeeze(2), ceiling.squeeze(2), None)

    def _activated(self, value: Bounds, after: Tensor, ends: tuple[Tensor, Tensor], lines: Lines) -> Bounds:
        relaxation = Relaxation(lines, value.value, after)
        at = self._tape.activate(value.at, after.shape[1:], relaxation)
        return Bounds(self._tape, at, after, *ends, None)

    def _tightened(self, value: Bounds, doubt: Tensor, *, one_side_first: bool = False) -> Bounds:
        """Return the values with ranges tightened by lines where `doubt` (N, ...) is positive, largest doubt first.

        With `one_side_first`, the side of each range that is nearer to the other sign is bounded first, and the other
        side only where the range still contains zero: a ReLU has no use for it elsewhere.
        """
        tape, exact = self._tape, not self._tape.relaxations and self._tape.threat.norm == "linf"
        if exact or not bool((self._budget > 0).any()):
            return value
        # an equal share of what is left for every activation still to come: the last ones matter as much as the first
        share = self._budget / max(1, self._network.activations - len(tape.relaxations))
        local, dense = tape.local_cost(value.at), tape.dense_cost(value.at)
        is_local = local is not None and _ON_PATCHES * local.multiplications < dense.multiplications
        sides = _Sides(value, local if local is not None and is_local else dense, is_local=is_local)
        # by the fewest multiplications, so that the budget does not depend on the faster way to compute them
        fewest = min(each.multiplications for each in (local, dense) if each is not None)
        row_cost = max(fewest / (2 * self._network.cost), 1e-12)
        affordable = (share / row_cost).long().to(doubt.device)
        doubt, spent = doubt.flatten(1), torch.zeros_like(affordable)
        nearer = torch.where(value.value.flatten(1) > 0, 1.0, -1.0).to(value.value)
        rounds = ((nearer, _FIRST_SIDES), (-nearer, 1.0)) if one_side_first else ((nearer, 0.5), (-nearer, 1.0))
        for side, limit in rounds:
            rank = doubt.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            left = ((affordable * limit).long() - spent).clamp_min(0)
            image, entry = ((doubt > 0) & (rank < left[:, None])).nonzero(as_tuple=True)
            sides.bound(image, entry, side[image, entry])
            spent = spent + image.bincount(minlength=len(spent))
            if one_side_first:
                doubt = torch.minimum(-sides.low, sides.high)
            else:
                doubt = torch.where(rank < left[:, None], doubt, torch.zeros_like(doubt))
        cost = row_cost * spent.cpu().double()
        self._budget = self._budget - cost
        self._network.spend(float(cost.sum()))
        return value._replace(low=sides.low.view(value.shape), high=sides.high.view(value.shape))


class _Sides:
    """Ranges (N, E) of the flattened values of a step, of which single sides are tightened by lines."""

    def __init__(self, value: Bounds, cost: RowCost, *, is_local: bool) -> None:
        self._value, self._is_local = value, is_local
        self._rows = max(1, _ENTRIES // cost.entries)
        self.low, self.high = value.low.flatten(1).clone(), value.high.flatten(1).clone()

    def bound(self, image: Tensor, entry: Tensor, side: Tensor) -> None:
        """Bound entries of images (M,) from below where `side` (M,) is 1, and from above where it is -1."""
        if len(image) == 0:
            return
        parts = zip(*(each.split(self._sizes(image)) for each in (image, entry, side)), strict=True)
        least = torch.cat([self._least(*part) for part in parts])
        below, above = side > 0, side < 0
        places = image[below], entry[below]
        self.low[places] = torch.maximum(self.low[places], least[below])
        places = image[above], entry[above]
        self.high[places] = torch.minimum(self.high[places], -least[above])

    def _sizes(self, image: Tensor) -> list[int]:
        """Return the sizes of parts of rows that are bounded at once: of one image each, if that gives large ones."""
        counts = image.bincount().tolist()
        if self._is_local or len(image) < _LARGE * sum(count > 0 for count in counts):
            counts = [len(image)]
        return [min(self._rows, count - start) for count in counts for start in range(0, count, self._rows)]

    def _least(self, image: Tensor, entry: Tensor, side: Tensor) -> Tensor:
        """Return lower bounds (M,) of `side` times single entries."""
        value = self._value
        if self._is_local:
            return value.tape.least_of_entries(value.at, value.value, (image, entry), side)
        unit = torch.zeros(len(image), value.shape[1:].numel()).to(value.value)
        unit[torch.arange(len(image)), entry] = side
        return value.tape.least(value.at, value.value, Rows(unit.view(-1, *value.shape[1:]), image))
