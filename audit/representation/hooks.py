"""Forward hooks that record the outputs of named layers and leave the forward pass at the last of them.

The first pass of a model runs to its end, because only a complete pass shows how often each layer is called. Later
passes are left inside the hook of the last recorded call, by a `BaseException`: networks that catch `Exception` do not
catch it, and a network that catches it all the same is run to its end from then on.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from audit.adversary.passes import outputs_of
from audit.errors import UsageError
from audit.representation.outputs import Index, copied, select_tensor
from audit.types import Images

PSEUDO_LAYERS = ("input", "penultimate", "logits")
OUTPUTS = ("logits", "output")
"""Names of a model's output: the logits of a classifier, the features of an encoder."""
NO_MODULES = (*PSEUDO_LAYERS, "output")


@dataclass(frozen=True)
class LayerSpec:
    """A parsed layer name `<path>[@call][#index]`.

    `module` is the module's path from the root of the model; it is longer than `path` where a wrapper surrounds the
    network.
    """

    name: str
    path: str
    module: str
    call: int | None
    index: Index | None


class HookPoint(NamedTuple):
    """One call of a module (path from the root, calls counted from 0): its output, or its input if `is_input`."""

    module: str
    call: int
    is_input: bool = False


class LayerReader:
    """Records the outputs of some layers of a model, in one forward pass for each batch.

    Hook points are located in the first pass, separately for training and evaluation mode. Where a later pass misses
    one of them, because the network calls its layers another number of times, they are located again.
    """

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        self.specs = tuple(specs)
        self._points: dict[bool, tuple[HookPoint | None, ...]] = {}
        self._exits_early = all(spec.path not in OUTPUTS for spec in self.specs)
        self._compared = False  # with complete passes; searches follow gradients through exits that are exact only

    def read(self, model: nn.Module, images: Images) -> tuple[Tensor, ...]:
        """Return one tensor (N, ...) a layer for images (N, C, H, W), leaving the forward pass as early as possible.

        Raises UsageError for a layer or call that the forward pass lacks, or whose output is not one tensor.
        """
        if all(spec.path == "input" for spec in self.specs):
            return (images,) * len(self.specs)
        return self._read(model, images, self._exits_early)[0]

    def read_with_output(self, model: nn.Module, images: Images) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the tensors of `read` and the model's output, from one complete forward pass."""
        return self._read(model, images, exits_early=False)

    def _read(self, model: nn.Module, images: Images, exits_early: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        points = self._points.get(model.training)
        if points is not None and exits_early and images.requires_grad and not self._compared:
            self._exits_early = exits_early = self._exit_is_exact(model, images)
        if points is not None:
            recording = _PointRecording([point for point in points if point is not None], exits_early)
            output = recording.run(model, images)
            if recording.complete:
                values = [None if point is None else recording.values[point] for point in points]
                return self._select(values, images, output), output
            self._exits_early = self._exits_early and not recording.exit_raised
        survey = _CallSurvey(self.specs)
        output = survey.run(model, images)
        located = [survey.locate(spec) for spec in self.specs]
        self._points[model.training] = tuple(point for point, _ in located)
        values = [value for _, value in located]
        if any(point is not None and value is None for point, value in located):  # its value was not kept
            recording = _PointRecording([point for point, _ in located if point is not None], exits_early=False)
            output = recording.run(model, images)
            values = [None if point is None else recording.values.get(point) for point, _ in located]
        return self._select(values, images, output), output

    def _exit_is_exact(self, model: nn.Module, images: Images) -> bool:
        from audit.representation.early_exit import exit_is_exact

        self._compared, other = True, LayerReader(self.specs)
        other._compared = True
        return exit_is_exact(lambda twin, few, exits: other._read(twin, few, exits)[0], model, images)

    def point(self, model: nn.Module, images: Images) -> HookPoint | None:
        """Return the hook point of the first layer, located by a pass of `images` (N, C, H, W); None at the ends.

        Raises as `read` does.
        """
        if model.training not in self._points:
            self._read(model, images, exits_early=False)
        return self._points[model.training][0]

    def _select(self, values: Sequence[object], images: Images, output: Tensor) -> tuple[Tensor, ...]:
        ends = {"input": images, **dict.fromkeys(OUTPUTS, output)}
        return tuple(
            select_tensor(ends.get(spec.path, value), spec.name, spec.index)
            for spec, value in zip(self.specs, values, strict=True)
        )


class _CallSurvey:
    """A complete forward pass that records every call of some layers, and by what the logits are computed last."""

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        self.outputs: dict[str, list[object]] = {s.module: [] for s in specs if s.path not in NO_MODULES}
        self._penultimate: tuple[HookPoint | None, object] = None, None
        self._candidates: tuple[str, ...] = ()
        self._follows_logits = any(spec.path == "penultimate" for spec in specs)

    def run(self, model: nn.Module, images: Images) -> Tensor:
        handles = [
            model.get_submodule(name).register_forward_hook(
                # cloned at once: a later in-place operation must not change the recorded value
                in_this_thread(lambda _module, _inputs, output, outputs=outputs: outputs.append(copied(output)))
            )
            for name, outputs in self.outputs.items()
        ]
        if not self._follows_logits:
            return run_and_remove_hooks(model, images, handles)
        from audit.representation.answer_graph import AnswerGraph

        graph = AnswerGraph(images)
        for name, module in model.named_modules():
            handles += _report_calls(module, name, graph.passed)
        with graph:
            output = run_and_remove_hooks(model, images, handles)
        located, self._candidates = graph.locate(model, output)
        if located is not None:
            self._penultimate = HookPoint(*located), graph.value(located)
        return output

    def locate(self, spec: LayerSpec) -> tuple[HookPoint | None, object]:
        """Return the hook point of a layer and its recorded value; (None, None) for `input` and `logits`."""
        if spec.path == "penultimate":
            if self._penultimate[0] is None:
                prefix = spec.module.removesuffix(spec.path)  # of a wrapper
                raise UsageError(_no_penultimate([name.removeprefix(prefix) for name in self._candidates]))
            return self._penultimate
        if spec.path in NO_MODULES:
            return None, None
        outputs = self.outputs[spec.module]
        call = _resolve_call(spec, len(outputs))
        return HookPoint(spec.module, call), outputs[call]


def _report_calls(module: nn.Module, name: str, passed: Callable[[HookPoint, object], None]) -> list[RemovableHandle]:
    """Report the first argument and the output of every call of a module; return the hooks."""
    calls: Counter[bool] = Counter()

    def report(is_input: bool, value: object) -> None:
        passed(HookPoint(name, calls[is_input], is_input), value)
        calls[is_input] += 1

    return [
        module.register_forward_pre_hook(in_this_thread(lambda _m, args: report(True, args[0] if args else None))),
        module.register_forward_hook(in_this_thread(lambda _m, _i, output: report(False, output))),
    ]


class _EarlyExit(BaseException):
    """Ends a forward pass; only the recording that raised it catches it, since representations may be nested."""

    def __init__(self, recording: "_PointRecording") -> None:
        super().__init__()
        self.recording = recording


class _PointRecording:
    """A forward pass that records known hook points and, if `exits_early`, stops at the last of them."""

    def __init__(self, points: Sequence[HookPoint], exits_early: bool) -> None:
        self.points = frozenset(points)
        self.values: dict[HookPoint, object] = {}
        self.exit_raised = False
        self.complete = False
        self._exits_early = exits_early
        self._calls: Counter[tuple[str, bool]] = Counter()

    def run(self, model: nn.Module, images: Images) -> Tensor:
        """Return the model's output; an empty tensor after an early exit."""
        handles = [self._register(model, *key) for key in {(point.module, point.is_input) for point in self.points}]
        no_output = images.new_empty(0)
        try:
            output = run_and_remove_hooks(model, images, handles)
        except _EarlyExit as early_exit:
            # not kept: its traceback holds every activation of the pass
            if early_exit.recording is not self:
                raise
            self.complete = True
            return no_output
        except Exception:
            if not self.exit_raised:
                raise
            return no_output  # the network replaced the early exit by an exception of its own
        self.complete = not self.exit_raised and len(self.values) == len(self.points)
        return output

    def _register(self, model: nn.Module, name: str, is_input: bool) -> RemovableHandle:
        module = model.get_submodule(name)
        if is_input:
            return module.register_forward_pre_hook(in_this_thread(lambda _m, args: self._record(name, True, args[0])))
        return module.register_forward_hook(in_this_thread(lambda _m, _i, output: self._record(name, False, output)))

    def _record(self, name: str, is_input: bool, value: object) -> None:
        point = HookPoint(name, self._calls[name, is_input], is_input)
        self._calls[name, is_input] += 1
        if point not in self.points or self.exit_raised:
            return
        self.exit_raised = self._exits_early and len(self.values) == len(self.points) - 1
        # after an early exit no later operation can overwrite the value
        self.values[point] = value if self.exit_raised else copied(value)
        if self.exit_raised:
            raise _EarlyExit(self)


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that ignores calls in other threads, which may use the same network at the same time."""
    thread = get_ident()
    return lambda *values: hook(*values) if get_ident() == thread else None


def run_and_remove_hooks(model: nn.Module, images: Images, handles: Sequence[RemovableHandle]) -> Tensor:
    """Return the model's output for images (N, C, H, W); remove the hooks even if the forward pass raises."""
    try:
        output = outputs_of(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return output


def _no_penultimate(candidates: Sequence[str]) -> str:
    named = f", such as {' or '.join(candidates)}" if candidates else ""
    message = "layer 'penultimate' needs a model whose forward ends in a linear layer on the features of one module"
    return f"{message}; name a module instead{named}"


def _resolve_call(spec: LayerSpec, count: int) -> int:
    layer, path, call = spec.name, spec.path, spec.call
    if not count:
        raise UsageError(f"layer {layer!r} is never called in a forward pass (a fused path may bypass it)")
    if call is None:
        if count > 1:
            raise UsageError(
                f"layer {layer!r} is called {count} times in a forward pass: "
                f"select a call, from {path}@0 to {path}@{count - 1} or {path}@-1"
            )
        return 0
    if not -count <= call < count:
        raise UsageError(f"layer {layer!r} selects call {call}, but a forward pass has only {count}")
    return call % count
