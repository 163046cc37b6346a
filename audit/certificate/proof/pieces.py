"""A layer of a piecewise-linear network, traced: rigorous values and derivatives on its current affine piece."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, fx

from audit.adversary.passes import input_gradient
from audit.certificate.proof.arithmetic import Constant, Derivatives, Enclosure
from audit.certificate.proof.numbers import Number, Unprovable
from audit.certificate.proof.operations import FUNCTIONS, METHODS, MODULES
from audit.representation.headless import resolved_layer
from audit.representation.hooks import OUTPUTS, HookPoint
from audit.representation.layers import Representation
from audit.types import Images

_DIRECTIONS = 16  # directions differentiated at once
_TRACE_TOLERANCE = 1e-9  # relative difference between the trace and the layer
_UP = 1 + 1e-9  # enlarges bounds to cover the rounding of their own computation


class Decision(NamedTuple):
    """The active branch of one ReLU (mask) or maximum (index), and a lower bound on its margin (negative: unknown)."""

    active: Tensor
    margin: Tensor


@dataclass(frozen=True)
class ActivationPattern:
    """The decisions of every ReLU and maximum in one forward pass, by the name of the node."""

    decisions: dict[str, Decision] = field(default_factory=dict)

    def is_constant_within(self, radius: float, slopes: dict[str, Tensor]) -> bool:
        """Return whether no decision changes over a distance, given bounds on the slopes of the pre-activations."""
        return all(
            bool((slopes[name] * radius * _UP <= decision.margin / _UP).all())
            for name, decision in self.decisions.items()
        )


class TracedLayer:
    """A layer of a traced network in float64; build it with `TracedLayer.of`."""

    def __init__(self, representation: Representation, traced: fx.GraphModule) -> None:
        self._representation, self._traced = representation, traced
        self._constants: dict[str, tuple[Constant, ...]] = {}

    @classmethod
    def of(cls, representation: Representation, image: Images) -> "TracedLayer":
        """Trace a float64 layer, and compare the trace with the layer itself on one image (1, C, H, W).

        Raises Unprovable for unsupported operations.
        """
        layer = copy.deepcopy(representation).cpu()
        traced = cls(layer, trace_layer(layer, layer.point(image.cpu())))
        value, _ = traced.forward(Enclosure.of(image.cpu()))
        with torch.no_grad():
            expected = layer(image.cpu())
        error = float((value.high - expected).norm()) if value.high.shape == expected.shape else inf
        if error > _TRACE_TOLERANCE * float(expected.norm()):
            raise Unprovable(f"the trace of layer {layer.layer!r} gives other features than the layer itself")
        return traced

    @torch.no_grad()
    def forward(self, images: Enclosure) -> tuple[Enclosure, ActivationPattern]:
        """Return enclosed features (1, D) of an image (1, C, H, W), and its activation pattern."""
        interpreter = _ValueInterpreter(self._traced, self._constants)
        return interpreter.features(images), interpreter.pattern

    @torch.no_grad()
    def derivatives(self, directions: Derivatives, pattern: ActivationPattern) -> tuple[Derivatives, dict[str, Tensor]]:
        """Return the features' derivatives (K, D) along directions (K, C, H, W), and the slopes of each decision.

        A slope is a bound on the Euclidean norm of the K derivatives of a pre-activation, by the name of the node.
        """
        found: list[Enclosure] = []
        squares: dict[str, Tensor] = {}
        for batch in zip(*(part.split(_DIRECTIONS) for part in directions.parts), strict=True):
            interpreter = _DerivativeInterpreter(self._traced, self._constants, pattern)
            found.append(interpreter.features(Derivatives(Enclosure(*batch))).parts)
            for name, slope in interpreter.slopes.items():
                squares[name] = squares.get(name, 0) + slope.square()
        joined = Enclosure(*(torch.cat(part) for part in zip(*found, strict=True)))
        return Derivatives(joined), {name: square.sqrt() * _UP for name, square in squares.items()}

    def jacobian(self, images: Images) -> Tensor:
        """Return the approximate Jacobian (D, P) of the features of an image (1, C, H, W), without error bounds."""
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            features = self._representation(leaf)
            rows = [
                input_gradient(features, leaf, unit[None], keep=True).flatten()
                for unit in torch.eye(features.shape[1]).to(features)
            ]
        return torch.stack(rows)


def trace_layer(representation: Representation, point: HookPoint | None = None) -> fx.GraphModule:
    """Return the traced network up to the layer; raises Unprovable if tracing fails or the layer is not found.

    `point` is where the representation reads its layer; `penultimate` cannot be found without it.
    """
    if representation.reduce != "flatten":
        raise Unprovable(f"features reduced by {representation.reduce!r} are not supported; legal: flatten")
    try:
        traced = fx.symbolic_trace(representation.model)
    except Exception as error:  # tracing runs foreign code on proxies
        raise Unprovable(f"the network's forward pass cannot be traced: {str(error).splitlines()[0]}") from error
    output = next(node for node in traced.graph.nodes if node.op == "output")
    layer = resolved_layer(representation.model, representation.layer)
    output.args = (_layer_node(layer, traced, output, point),)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _layer_node(layer: str, traced: fx.GraphModule, output: fx.Node, point: HookPoint | None) -> fx.Node:
    if layer in OUTPUTS:
        return output.args[0]  # type: ignore[return-value]
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    if layer == "penultimate" and point is not None:
        calls = [node for node in nodes if node.target == point.module][point.call :]
        if calls:
            return calls[0].all_input_nodes[0] if point.is_input else calls[0]
    found = [node for node in nodes if str(node.target).removeprefix("network.") == layer]
    if len(found) != 1:
        raise Unprovable(f"layer {layer!r} is not the output of one module that is called once")
    return found[0]


class LayerInterpreter(fx.Interpreter):
    """Evaluation of the traced network on one kind of numbers, node by node."""

    modules: ClassVar[Mapping[Any, Callable[..., Any]]] = MODULES
    functions: ClassVar[Mapping[Any, Callable[..., Any]]] = FUNCTIONS
    methods: ClassVar[Mapping[Any, Callable[..., Any]]] = METHODS
    supported: ClassVar[str] = "piecewise-linear operation"

    def __init__(self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]]) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self._constants, self._node = constants, ""

    def relu(self, value: Any) -> Any:
        """Return max(value, 0)."""
        raise NotImplementedError

    def maximum(self, windows: Any) -> Any:
        """Return the maximum (N, C, L) along axis 2 of windows (N, C, K, L)."""
        raise NotImplementedError

    def features(self, value: Any) -> Any:
        """Return the layer's features (N, D) of the numbers of images (N, C, H, W)."""
        found = self.run(value)
        if not isinstance(found, Number):
            raise Unprovable("the layer does not depend on the image")
        return found.rearrange(lambda part: part.flatten(1))

    def run_node(self, n: fx.Node) -> Any:
        """Evaluate one node, and remember its name."""
        self._node = n.name
        return super().run_node(n)

    def constant(self, make: Callable[[], tuple[Constant, ...]]) -> tuple[Constant, ...]:
        """Return this node's constants, computed once."""
        if self._node not in self._constants:
            self._constants[self._node] = make()
        return self._constants[self._node]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule of a module; raises Unprovable for unsupported ones."""
        module = self.fetch_attr(target)
        rule = self.modules.get(type(module))
        if rule is None or kwargs or len(args) != 1 or not isinstance(args[0], Number):
            raise Unprovable(f"{type(module).__name__} {target!r} is not a supported {self.supported}")
        return rule(self, module, args[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule of a function; raises Unprovable for unsupported ones."""
        return self._apply(self.functions.get(target), getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply the rule of a method; raises Unprovable for unsupported ones."""
        return self._apply(self.methods.get(target), target, args, kwargs)

    def _apply(self, rule: Callable[..., Any] | None, name: str, args: Any, kwargs: Any) -> Any:
        if rule is None:
            raise Unprovable(f"the function {name!r} is not a supported {self.supported}")
        try:
            return rule(self, *args, **kwargs)
        except TypeError as error:
            raise Unprovable(f"the function {name!r} is called with unsupported arguments: {error}") from error


class _ValueInterpreter(LayerInterpreter):
    """Evaluation on enclosed values, which records the decision of every ReLU and maximum."""

    def __init__(self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]]) -> None:
        super().__init__(traced, constants)
        self.pattern = ActivationPattern()

    def relu(self, value: Enclosure) -> Enclosure:
        active = value.high > 0
        margin = value.high.abs() - (value.low.abs() + value.error) * _UP
        self.pattern.decisions[self._node] = Decision(active, margin)
        return value.where(active)

    def maximum(self, windows: Enclosure) -> Enclosure:
        active = windows.high.argmax(2, keepdim=True)
        best = windows.rearrange(lambda part: part.gather(2, active))
        lead = best.rearrange(lambda part: part.expand_as(windows.high)).add(windows.negate())
        margin = lead.high - (lead.low.abs() + lead.error) * _UP
        self.pattern.decisions[self._node] = Decision(active, margin.scatter(2, active, torch.inf))
        return best.rearrange(lambda part: part.squeeze(2))


class _DerivativeInterpreter(LayerInterpreter):
    """Evaluation on derivatives, with the decisions of a given activation pattern."""

    def __init__(
        self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]], pattern: ActivationPattern
    ) -> None:
        super().__init__(traced, constants)
        self._pattern = pattern
        self.slopes: dict[str, Tensor] = {}

    def relu(self, value: Derivatives) -> Derivatives:
        self.slopes[self._node] = value.norm()
        return value.where(self._pattern.decisions[self._node].active)

    def maximum(self, windows: Derivatives) -> Derivatives:
        active = self._pattern.decisions[self._node].active
        best = windows.rearrange(lambda part: part.gather(2, active.expand(len(part), -1, -1, -1)))
        lead = best.rearrange(lambda part: part.expand(-1, -1, windows.shape[2], -1)).add(windows.negate())
        self.slopes[self._node] = lead.norm().scatter(2, active, 0.0)
        return best.rearrange(lambda part: part.squeeze(2))
