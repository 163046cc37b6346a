"""Forward passes that are read at named layers, and left as soon as nothing more is wanted of them.

The first pass runs to its end, because only the whole of it shows how often a layer is called. Later ones are left
inside the hook that sees the last wanted call, by an exception that is no `Exception`: networks that catch those do
not catch it, and one that does all the same is run to its end from then on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from audit.errors import UsageError
from audit.types import Images

PSEUDO_LAYERS = ("input", "penultimate", "logits")


@dataclass(frozen=True)
class Place:
    """What the name of a layer says; `module` is the path from the model's root, which a wrapper makes longer."""

    layer: str
    path: str
    module: str
    call: int | None
    index: int | None


class Stop(NamedTuple):
    """One call of a module (by its path from the root, counted from 0), at its output or, `entering`, at its input."""

    module: str
    call: int
    entering: bool = False


class Reader:
    """The tensors that a model shows at some places, of one forward pass each time.

    It remembers where the places are, once for training and once for evaluation. A network that calls its layers now
    more, now less often is read at the calls that the first pass had; where one does not come, all is asked anew.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._stops: dict[bool, tuple[Stop | None, ...]] = {}
        self._may_leave = all(place.path != "logits" for place in places)

    def read(self, model: nn.Module, images: Images) -> tuple[Tensor, ...]:
        """Return one tensor a place, first axis N, of images (N, C, H, W), by the shortest pass that gives them.

        Raises UsageError for places that the pass does not have, or that hold no single tensor.
        """
        if all(place.path == "input" for place in self.places):
            return (images,) * len(self.places)
        return self._read(model, images, self._may_leave)[0]

    def read_through(self, model: nn.Module, images: Images) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what `read` does and, of the same pass, what the model returns."""
        return self._read(model, images, may_leave=False)

    def _read(self, model: nn.Module, images: Images, may_leave: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        stops = self._stops.get(model.training)
        if stops is not None:
            visit = _Visit([stop for stop in stops if stop is not None], may_leave)
            output = visit.run(model, images)
            if visit.complete:
                seen = [None if stop is None else visit.seen[stop] for stop in stops]
                return self._tensors(seen, images, output), output
            self._may_leave = self._may_leave and not visit.asked_to_leave
        survey = _Survey(self.places)
        output = survey.run(model, images)
        found = [survey.find(place) for place in self.places]
        self._stops[model.training] = tuple(stop for stop, _ in found)
        return self._tensors([value for _, value in found], images, output), output

    def _tensors(self, seen: Sequence[object], images: Images, output: Tensor) -> tuple[Tensor, ...]:
        ends = {"input": images, "logits": output}
        values = [ends.get(place.path, value) for place, value in zip(self.places, seen, strict=True)]
        return tuple(one_tensor(value, place) for place, value in zip(self.places, values, strict=True))


class _Survey:
    """A whole forward pass, with every call of the layers it is asked for and the last call of a linear layer."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.calls: dict[str, list[object]] = {p.module: [] for p in places if p.path not in PSEUDO_LAYERS}
        self.linear: tuple[Stop, Tensor] | None = None
        self._entered: Counter[str] = Counter()
        self._wants_linear = any(place.path == "penultimate" for place in places)

    def run(self, model: nn.Module, images: Images) -> Tensor:
        handles = [
            model.get_submodule(name).register_forward_hook(
                # clone at once: a later in-place operation must not change what we saw
                lambda _module, _inputs, output, calls=calls: calls.append(_cloned(output))
            )
            for name, calls in self.calls.items()
        ]
        for name, module in model.named_modules() if self._wants_linear else ():
            if is_linear(module):
                handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: self._enter(name, args[0])))
        return run_and_remove(model, images, handles)

    def find(self, place: Place) -> tuple[Stop | None, object]:
        """Return which call a place is, and what was seen there; neither for the two ends of the network."""
        if place.path == "penultimate":
            if self.linear is None:
                raise UsageError(
                    "layer 'penultimate' needs a model whose forward ends in a linear layer; name a module instead"
                )
            return self.linear
        if place.path in PSEUDO_LAYERS:
            return None, None
        calls = self.calls[place.module]
        number = _call_number(place, len(calls))
        return Stop(place.module, number), calls[number]

    def _enter(self, name: str, value: Tensor) -> None:
        self.linear = Stop(name, self._entered[name], entering=True), value.clone()
        self._entered[name] += 1


class _Left(BaseException):
    """Ends a forward pass from inside, for the visit that raised it and no other: representations may be nested."""

    def __init__(self, visit: "_Visit") -> None:
        super().__init__()
        self.visit = visit


class _Visit:
    """A forward pass that is read at known calls and, where it may be left, goes no further than the last of them."""

    def __init__(self, stops: Sequence[Stop], may_leave: bool) -> None:
        self.wanted = frozenset(stops)
        self.seen: dict[Stop, object] = {}
        self.asked_to_leave = False
        self.complete = False
        self._may_leave = may_leave
        self._calls: Counter[tuple[str, bool]] = Counter()

    def run(self, model: nn.Module, images: Images) -> Tensor:
        """Return the model's output, an empty tensor where the pass was left."""
        handles = [self._hook(model, *key) for key in {(stop.module, stop.entering) for stop in self.wanted}]
        nothing = images.new_empty(0)
        try:
            output = run_and_remove(model, images, handles)
        except _Left as left:
            # not kept: its traceback holds every activation of the pass
            if left.visit is not self:
                raise
            self.complete = True
            return nothing
        except Exception:
            if not self.asked_to_leave:
                raise
            return nothing  # the network made an error of its own out of ours
        self.complete = not self.asked_to_leave and len(self.seen) == len(self.wanted)
        return output

    def _hook(self, model: nn.Module, name: str, entering: bool) -> RemovableHandle:
        module = model.get_submodule(name)
        if entering:
            return module.register_forward_pre_hook(lambda _module, args: self._see(name, True, args[0]))
        return module.register_forward_hook(lambda _module, _inputs, output: self._see(name, False, output))

    def _see(self, name: str, entering: bool, value: object) -> None:
        stop = Stop(name, self._calls[name, entering], entering)
        self._calls[name, entering] += 1
        if stop not in self.wanted or self.asked_to_leave:
            return
        self.asked_to_leave = self._may_leave and len(self.seen) == len(self.wanted) - 1
        # only what still runs can overwrite it
        self.seen[stop] = value if self.asked_to_leave else _cloned(value)
        if self.asked_to_leave:
            raise _Left(self)


def run_and_remove(model: nn.Module, images: Images, handles: Sequence[RemovableHandle]) -> Tensor:
    """Return what a model returns for images (N, C, H, W); the hooks come off whatever happens."""
    try:
        output: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return output


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is what classifiers end in: a linear layer or a 1x1 convolution."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def one_tensor(output: object, place: Place) -> Tensor:
    """Return the one tensor that a place means of a layer's output; raises UsageError where there is not one."""
    layer, index = place.layer, place.index
    if isinstance(output, Tensor):
        if index is not None:
            raise UsageError(f"layer {layer!r} returns one tensor: leave out #{index}")
        return output
    if isinstance(output, tuple | list):
        tensors = [i for i, part in enumerate(output) if isinstance(part, Tensor)]
        if index is None:
            raise UsageError(
                f"layer {layer!r} returns {len(output)} values: say which, such as {layer}#{(tensors or [0])[0]}"
            )
        if -len(output) <= index < len(output) and isinstance(output[index], Tensor):
            chosen: Tensor = output[index]
            return chosen
        raise UsageError(f"layer {layer!r}: output {index} is not a tensor; tensors are at {tensors}")
    raise UsageError(f"layer {layer!r} returns a {type(output).__name__}, not a tensor")


def _call_number(place: Place, count: int) -> int:
    layer, path, call = place.layer, place.path, place.call
    if not count:
        raise UsageError(f"layer {layer!r} is never called in a forward pass (a fused path may bypass it)")
    if call is None:
        if count > 1:
            raise UsageError(
                f"layer {layer!r} is called {count} times in a forward pass: "
                f"say which, from {path}@0 to {path}@{count - 1} or {path}@-1"
            )
        return 0
    if not -count <= call < count:
        raise UsageError(f"layer {layer!r} asks for call {call}, but there are only {count}")
    return call % count


def _cloned(output: object) -> object:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple | list):
        return tuple(_cloned(part) for part in output)
    return output
