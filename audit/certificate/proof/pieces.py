"""A piecewise-linear network as a program: what its features are exactly, and along which piece they are affine."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from audit.adversary.gradients import input_gradient
from audit.certificate.proof.arithmetic import Constant, Exact, Slope
from audit.certificate.proof.operations import FUNCTIONS, METHODS, MODULES, Unprovable
from audit.representation.layers import Representation
from audit.types import Images

_COLUMNS = 16  # how many directions are followed at once
_UP = 1 + 1e-9  # bounds are enlarged by this, for the rounding of their own computation


class Choice(NamedTuple):
    """What one ReLU or maximum decided, as a mask or an index, and at least how clearly (negative: not known)."""

    taken: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Pattern:
    """What every ReLU and maximum of one forward pass decided, by the name of its node."""

    choices: dict[str, Choice] = field(default_factory=dict)

    def holds(self, steepness: dict[str, Tensor], omega: float) -> bool:
        """Return whether no decision changes on a way `omega` long, with slopes of at most `steepness`."""
        return all(bool((steepness[name] * omega * _UP <= it.margin / _UP).all()) for name, it in self.choices.items())


class Program:
    """A layer of a network as a program; build it with `Program.of`."""

    def __init__(self, representation: Representation, traced: fx.GraphModule) -> None:
        self._representation, self._traced = representation, traced
        self._constants: dict[str, tuple[Constant, ...]] = {}

    @classmethod
    def of(cls, representation: Representation, image: Images) -> "Program":
        """Return the program of a layer in float64, checked against the layer itself on one image (1, C, H, W).

        Raises Unprovable for what it cannot read.
        """
        mine = copy.deepcopy(representation).cpu()
        program = cls(mine, _trimmed(mine))
        value, _ = program.forward(Exact.of(image.cpu()))
        with torch.no_grad():
            wanted = mine(image.cpu())
        if value.high.shape != wanted.shape or float((value.high - wanted).norm()) > 1e-9 * float(wanted.norm()):
            raise Unprovable(f"layer {mine.layer!r} as it was read is not the layer as it runs")
        return program

    @torch.no_grad()
    def forward(self, images: Exact) -> tuple[Exact, Pattern]:
        """Return the features (1, D) of an image (1, C, H, W), enclosed, and what was decided on the way."""
        walk = _Deciding(self._traced, self._constants)
        return walk.features(images), walk.pattern

    @torch.no_grad()
    def along(self, columns: Slope, pattern: Pattern) -> tuple[Slope, dict[str, Tensor]]:
        """Return the features' slopes (K, D) along columns (K, C, H, W), and how steep each decision is, by node."""
        found: list[Exact] = []
        squares: dict[str, Tensor] = {}
        for some in zip(*(part.split(_COLUMNS) for part in columns.parts), strict=True):
            walk = _Following(self._traced, self._constants, pattern)
            found.append(walk.features(Slope(Exact(*some))).parts)
            for name, steepness in walk.steepness.items():
                squares[name] = squares.get(name, 0) + steepness.square()
        together = Exact(*(torch.cat(part) for part in zip(*found, strict=True)))
        return Slope(together), {name: square.sqrt() * _UP for name, square in squares.items()}

    def jacobian(self, images: Images) -> Tensor:
        """Return about the derivatives (D, P) of the features of an image (1, C, H, W): nothing rests on them."""
        with torch.enable_grad():
            leaf = images.detach().clone().requires_grad_()
            features = self._representation(leaf)
            rows = [
                input_gradient(features, leaf, unit[None], keep=True).flatten()
                for unit in torch.eye(features.shape[1]).to(features)
            ]
        return torch.stack(rows)


def _trimmed(representation: Representation) -> fx.GraphModule:
    """Return the traced network up to the layer; raises Unprovable where it cannot be traced or the layer be found."""
    if representation.reduce != "flatten":
        raise Unprovable(f"features reduced by {representation.reduce!r} are not read; flatten is")
    try:
        traced = fx.symbolic_trace(representation.model)
    except Exception as error:  # tracing runs foreign code on proxies
        raise Unprovable(f"the network's forward pass cannot be traced: {str(error).splitlines()[0]}") from error
    output = next(node for node in traced.graph.nodes if node.op == "output")
    output.args = (_node_of(representation.layer, traced, output),)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _node_of(layer: str, traced: fx.GraphModule, output: fx.Node) -> fx.Node:
    if layer == "logits":
        return output.args[0]  # type: ignore[return-value]
    nodes = [node for node in traced.graph.nodes if node.op == "call_module"]
    if layer == "penultimate":
        heads = [node for node in nodes if _is_head(traced.get_submodule(str(node.target)))]
        if heads:
            return heads[-1].all_input_nodes[0]
    found = [node for node in nodes if str(node.target).removeprefix("network.") == layer]
    if len(found) != 1:
        raise Unprovable(f"layer {layer!r} is not the output of one module that is called once")
    return found[0]


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


class _Walk(fx.Interpreter):
    """One kind of numbers going through the network, node by node."""

    def __init__(self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]]) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self._constants, self._node = constants, ""

    def relu(self, value: Any) -> Any:
        raise NotImplementedError

    def largest(self, windows: Any) -> Any:
        """Return the largest along axis 2 of windows (N, C, K, L), without that axis."""
        raise NotImplementedError

    def features(self, value: Any) -> Any:
        found = self.run(value)
        if not isinstance(found, Exact | Slope):
            raise Unprovable("the layer is not computed from the image")
        return found.shaped(lambda part: part.flatten(1))

    def run_node(self, n: fx.Node) -> Any:
        self._node = n.name
        return super().run_node(n)

    def constant(self, make: Callable[[], tuple[Constant, ...]]) -> tuple[Constant, ...]:
        """Return this node's constants, made once."""
        if self._node not in self._constants:
            self._constants[self._node] = make()
        return self._constants[self._node]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        rule = MODULES.get(type(module))
        if rule is None or kwargs or len(args) != 1 or not isinstance(args[0], Exact | Slope):
            raise Unprovable(f"{type(module).__name__} {target!r} is no piecewise-linear part that can be read")
        return rule(self, module, args[0])

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._called(FUNCTIONS.get(target), getattr(target, "__name__", str(target)), args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._called(METHODS.get(target), target, args, kwargs)

    def _called(self, rule: Callable[..., Any] | None, name: str, args: Any, kwargs: Any) -> Any:
        if rule is None:
            raise Unprovable(f"the function {name!r} is no piecewise-linear part that can be read")
        try:
            return rule(self, *args, **kwargs)
        except TypeError as error:
            raise Unprovable(f"the function {name!r} is called in a way that cannot be read: {error}") from error


class _Deciding(_Walk):
    """Exact numbers, which decide what every ReLU and maximum takes."""

    def __init__(self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]]) -> None:
        super().__init__(traced, constants)
        self.pattern = Pattern()

    def relu(self, value: Exact) -> Exact:
        taken = value.high > 0
        margin = value.high.abs() - (value.low.abs() + value.error) * _UP
        self.pattern.choices[self._node] = Choice(taken, margin)
        return value.masked(taken)

    def largest(self, windows: Exact) -> Exact:
        taken = windows.high.argmax(2, keepdim=True)
        best = windows.shaped(lambda part: part.gather(2, taken))
        ahead = best.shaped(lambda part: part.expand_as(windows.high)).add(windows.negated())
        margin = ahead.high - (ahead.low.abs() + ahead.error) * _UP
        self.pattern.choices[self._node] = Choice(taken, margin.scatter(2, taken, torch.inf))
        return best.shaped(lambda part: part.squeeze(2))


class _Following(_Walk):
    """Slopes, which go where the pattern says."""

    def __init__(self, traced: fx.GraphModule, constants: dict[str, tuple[Constant, ...]], pattern: Pattern) -> None:
        super().__init__(traced, constants)
        self._pattern = pattern
        self.steepness: dict[str, Tensor] = {}

    def relu(self, value: Slope) -> Slope:
        self.steepness[self._node] = value.norm()
        return value.masked(self._pattern.choices[self._node].taken)

    def largest(self, windows: Slope) -> Slope:
        taken = self._pattern.choices[self._node].taken
        best = windows.shaped(lambda part: part.gather(2, taken.expand(len(part), -1, -1, -1)))
        ahead = best.shaped(lambda part: part.expand(-1, -1, windows.shape[2], -1)).add(windows.negated())
        self.steepness[self._node] = ahead.norm().scatter(2, taken, 0.0)
        return best.shaped(lambda part: part.squeeze(2))
