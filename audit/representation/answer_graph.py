"""Data flow of one forward pass, and the layer whose output the last weighted map turns into the logits.

Every operation below autograd is recorded with the operations whose results it reads, so that the graph needs no
gradients: rounding, `no_grad`, custom autograd functions and in-place operations are followed as well.
"""

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_IMAGES = 0  # the node of the images
_LISTED = 5  # candidates that an error names
_KEPT = 8  # inputs and outputs of modules whose values are kept at a time
_MOST_VALUES = 2**17  # of one image, in a value that is kept

# parts of names of operations that multiply by, or measure distances to, one of their operands
_MAPS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "bilinear"),
    *("convolution", "conv1d", "conv2d", "conv3d", "cdist", "dist", "trilinear", "attention", "transformer"),
    *("rnn", "lstm", "gru"),
}
_NO_MAPS = re.compile(r"upsample|cat$|stack$|pad|index|scatter|copy|where|fill|scaled_dot_product")
_CONSTANT = re.compile(r"_like$|^new_|^lift")  # results that do not depend on the values of the operands


Place = tuple[str, int, bool]
"""A module's path from the root, the number of its call from 0, and whether its input is meant, not its output."""


class Located(NamedTuple):
    """The place of the penultimate features, or None with the layers that could be named instead."""

    place: Place | None
    candidates: tuple[str, ...] = ()


@dataclass
class _Memory:
    """The node that wrote a storage last, and the nodes of views of it by offset, sizes and strides."""

    writer: int
    views: dict[tuple[Any, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Flow:
    """Operations as nodes, numbered in the order of execution: what each reads, and which of them apply weights."""

    parents: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    weighted: set[int] = field(default_factory=set)

    def add(self, parents: tuple[int, ...], *, weighted: bool) -> int:
        """Return the number of a new node."""
        node = len(self.parents)
        self.parents.append(parents)
        if weighted:
            self.weighted.add(node)
        return node

    def maps_below(self, nodes: Sequence[int]) -> set[int]:
        """Return the weighted maps that some nodes are computed from with no other weighted map in between."""
        return self.reached(nodes, stop=self.weighted) & self.weighted

    def carried_by(self, answer: int) -> set[int]:
        """Return the nodes that every path from the images to the answer passes through.

        Source: Cooper, Harvey & Kennedy 2001, immediate dominators, in one sweep because parents precede their results.
        """
        above = [_IMAGES]
        for parents in self.parents[1 : answer + 1]:
            one = parents[0]
            for other in parents[1:]:
                while one != other:
                    one, other = (above[one], other) if one > other else (one, above[other])
            above.append(one)
        found, node = {_IMAGES}, answer
        while node != _IMAGES:
            found.add(node)
            node = above[node]
        return found

    def reached(self, nodes: Sequence[int], stop: set[int]) -> set[int]:
        """Return the nodes that some nodes are computed from, themselves included, looking no further than `stop`."""
        found, left = set[int](), list(nodes)
        while left:
            node = left.pop()
            if node not in found:
                found.add(node)
                left += () if node in stop else self.parents[node]
        return found


class AnswerGraph(TorchDispatchMode):
    """Records which operations the logits are computed by; use it as a context around one forward pass.

    Hooks report inputs and outputs of modules to `passed`, which relates them to operations.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._flow = _Flow()
        self._memory: dict[int, _Memory] = {}
        self._places: list[tuple[Place, int]] = []
        self._values: deque[tuple[Place, Tensor, int | None]] = deque(maxlen=_KEPT)
        self._lost = False
        self._write(images, _IMAGES)

    def passed(self, place: Place, value: object) -> None:
        """Record the input or output of a module's call."""
        if not isinstance(value, Tensor) or (node := self._node(value)) is None:
            return
        self._places.append((place, node))
        if value.dim() and value.numel() <= _MOST_VALUES * len(value):
            self._values.append((place, value, None if value.is_inference() else value._version))

    def value(self, place: Place) -> Tensor | None:
        """Return what a place held, None if it was not kept or has been overwritten since."""
        for kept, value, version in self._values:
            if kept == place and version is not None and value._version == version:
                return value.clone()
        return None

    def locate(self, model: nn.Module, logits: object) -> Located:
        """Return the nearest point before the last weighted map that all paths from images to logits pass through.

        The weighted map is a linear layer, convolution or distance with weights of its own, as a module or not; between
        it and the logits there may be scales, activations, averages and reshapes, but no further map.
        """
        answer = self._node(logits) if isinstance(logits, Tensor) else None
        if answer is None or self._lost:
            return Located(None)
        flow = self._flow
        unmapped = flow.reached([answer], stop=flow.weighted)  # what no further weights are applied to
        heads = unmapped & flow.weighted
        reached = flow.reached([parent for head in heads for parent in flow.parents[head]], stop=flow.weighted)
        carried = flow.carried_by(answer)
        carrying = [each for each in reversed(self._places) if each[1] in carried]
        for place, node in carrying:
            linear = place[2] and _is_linear(model.get_submodule(place[0]))
            if node in reached and (linear or flow.maps_below([node])):
                return Located(place)
        outputs = [
            place
            for place, node in carrying
            if place[0] and not place[2] and node not in unmapped and flow.maps_below([node])
        ]
        several = {module for (module, call, _), _ in self._places if call}
        names = [f"{module}@{call}" if module in several else module for module, call, _ in outputs]
        return Located(None, tuple(dict.fromkeys(names))[:_LISTED])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and record what it reads and writes."""
        kwargs = kwargs or {}
        read = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        nodes = [self._node(tensor) for tensor in read]
        output = func(*args, **kwargs)
        self._record(func, read, nodes, _written(func, args, kwargs), output)
        return output

    def _record(
        self, func: Any, read: Sequence[Tensor], nodes: Sequence[int | None], written: list[Tensor], output: Any
    ) -> None:
        outputs = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        name = func._schema.name.partition("::")[2]
        parents = tuple(dict.fromkeys(node for node in nodes if node is not None))
        owners = {key for tensor in read if (key := _storage(tensor)) is not None}
        changed = {_storage(tensor) for tensor in written}
        if not parents or _CONSTANT.search(name):
            for tensor in outputs:
                if name.startswith("lift") or _storage(tensor) not in owners:
                    self._memory.pop(_storage(tensor) or 0, None)
            return
        weighted = _is_map(name, read, nodes, outputs)
        for tensor in {id(each): each for each in (*written, *outputs)}.values():
            key, node = _storage(tensor), self._flow.add(parents, weighted=weighted)
            if key in owners and key not in changed:
                self._memory.setdefault(key or 0, _Memory(parents[0])).views[_geometry(tensor)] = node
            else:
                self._write(tensor, node)

    def _write(self, tensor: Tensor, node: int) -> None:
        key = _storage(tensor)
        self._lost = self._lost or key is None
        self._memory[key or 0] = _Memory(node)

    def _node(self, tensor: Tensor) -> int | None:
        found = self._memory.get(_storage(tensor) or 0)
        return None if found is None else found.views.get(_geometry(tensor), found.writer)


def _is_map(name: str, read: Sequence[Tensor], nodes: Sequence[int | None], outputs: Sequence[Tensor]) -> bool:
    """Return whether an operation applies weights, which do not depend on the images, to what does depend on them.

    Besides the named operations that is any one that is not elementwise in the largest value that depends on the
    images: differences to every prototype of a class, for instance.
    """
    weights = [each for each, node in zip(read, nodes, strict=True) if node is None and each.numel() > 1]
    if not any(each.is_floating_point() for each in weights) or _NO_MAPS.search(name):
        return False
    if not _MAPS.isdisjoint(name.split("_")):
        return True
    largest = max((each.numel() for each, node in zip(read, nodes, strict=True) if node is not None), default=0)
    return bool(outputs) and outputs[0].numel() > largest


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation overwrites."""
    return [value for value in _overwritten(func, args, kwargs) if isinstance(value, Tensor)]


def _overwritten(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[object]:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))


def _storage(tensor: Tensor) -> int | None:
    """Return a number that views of one storage share; None for a tensor without a storage."""
    try:
        return int(_plain(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other opaque tensors
        return None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    plain = _plain(tensor)
    try:
        return plain.storage_offset(), plain.size(), plain.stride()
    except (NotImplementedError, RuntimeError):
        return ()


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of `torch.func`."""
    from torch._C import _functorch

    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
