"""Any named layer of any module as a representation g, with the hook rules that stock models need.

A naive hook reads tensors that a later in-place operation overwrites, misses layers that are called several
times or not at all, and stays behind after an error. This one clones what it reads, asks which call is meant,
and always comes off.
"""

import re
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from audit.errors import UnknownNameError, UsageError
from audit.types import Encoded, Features, Images

Reduction = Literal["flatten", "mean"]
PSEUDO_LAYERS = ("input", "penultimate", "logits")
_SPELLING = re.compile(r"(?P<path>[^@#]+)(@(?P<call>-?\d+))?(#(?P<index>-?\d+))?")


class LayerInfo(NamedTuple):
    """One line of `rvaudit layers`: the layer, its output per image, and what a hook must know of it.

    `calls` is 0 for a layer that one forward pass never calls; `outputs` counts the values it returns, tensors or
    not, so more than one means that `#index` is needed; `shape` is the first tensor's, without the batch axis.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dimension: int
    calls: int
    overwritten: bool
    outputs: int


class Representation(nn.Module):
    """The map from images (N, C, H, W) to the features (N, D) of one named layer of a model.

    `layer` is `input`, `penultimate`, `logits` or `<module.path>[@call][#index]`. `reduce` says how maps and
    token sequences become vectors: `flatten` keeps everything, `mean` averages all positions but the channel
    (the first axis of maps, the last of token sequences). Gradients reach the images. Raises UnknownNameError
    for an unknown layer or reduction, UsageError where the layer is called several times, never, returns several
    tensors, or returns one whose first axis is not the images (windows or tokens, say).
    """

    def __init__(self, model: nn.Module, layer: str, reduce: Reduction = "flatten") -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.reduce = reduce
        self._carries_answer: bool | None = None
        self._path, self._call, self._index = _parse(layer)
        if reduce not in ("flatten", "mean"):
            raise UnknownNameError("reduction", reduce, ("flatten", "mean"))
        if self._path not in PSEUDO_LAYERS:
            find_module(model, self._path)
        elif self._call is not None or (self._index is not None and self._path != "logits"):
            raise UsageError(f"layer {layer!r}: {self._path} is one tensor of one forward pass, leave out @ and #")

    def forward(self, images: Images) -> Features:
        """Return the features (N, D) of images (N, C, H, W)."""
        tapped = self._tap(images)
        vectors = _to_vectors(tapped, self.reduce)
        if len(vectors) != len(images):
            raise UsageError(
                f"layer {self.layer!r} returns the shape {tuple(tapped.shape)} for {len(images)} images: "
                "its first axis is not the images, so it is no representation of them"
            )
        return vectors

    def encode(self, images: Images) -> Encoded:
        """Return, from one forward pass, the features (N, D) and the network's log-probabilities (N, K).

        K is zero where `carries_answer` is false: such a layer says nothing of what the network answers.
        """
        outputs: list[Tensor] = []
        handle = self.model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            features = self(images)
        finally:
            handle.remove()
        if self._carries_answer is None:
            self._carries_answer = self.carries_answer(images[:1])
        if not self._carries_answer:
            return Encoded(features, features.new_empty(len(features), 0))
        logits = outputs[0] if outputs else self.model(images)
        return Encoded(features, logits.log_softmax(1))

    def carries_answer(self, images: Images) -> bool:
        """Return whether the image reaches the network's answer through this layer alone.

        Then the answer is a function of the features, and what it tells of the image they tell too. Measured: with
        the layer's output detached, no gradient of the answer is left at the image. Averages never carry it.
        """
        if self.reduce == "mean" and self._tap(images).dim() > 2:
            return False  # the answer is a function of all positions, not of their average
        if self._path in PSEUDO_LAYERS:
            return True
        calls: list[None] = []

        def detach(_module: nn.Module, _inputs: object, output: object) -> object:
            calls.append(None)
            chosen = self._call is None or self._call < 0 or self._call == len(calls) - 1
            return _detached(output, self._index) if chosen else output

        leaf = images.detach().clone().requires_grad_()
        handle = find_module(self.model, self._path).register_forward_hook(detach)
        with torch.enable_grad():
            logits = _run_and_remove(self.model, leaf, [handle])
            if not logits.requires_grad:
                return True
            weights = torch.arange(1.0, logits.numel() + 1, device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
        return gradient is None or not bool(gradient.any())

    def _tap(self, images: Images) -> Tensor:
        if self._path == "input":
            return images
        if self._path == "logits":
            return _one_tensor(self.model(images), self.layer, self._index)
        if self._path == "penultimate":
            return _penultimate(self.model, images)
        calls: list[object] = []
        handle = find_module(self.model, self._path).register_forward_hook(
            # clone at once: a later in-place operation must not change what we saw
            lambda _module, _inputs, output: calls.append(_cloned(output))
        )
        _run_and_remove(self.model, images, [handle])
        return _one_tensor(self._choose(calls), self.layer, self._index)

    def _choose(self, calls: list[object]) -> object:
        if not calls:
            raise UsageError(f"layer {self.layer!r} is never called in a forward pass (a fused path may bypass it)")
        if self._call is None:
            if len(calls) > 1:
                raise UsageError(
                    f"layer {self.layer!r} is called {len(calls)} times in a forward pass: "
                    f"say which, from {self._path}@0 to {self._path}@{len(calls) - 1} or {self._path}@-1"
                )
            return calls[0]
        if not -len(calls) <= self._call < len(calls):
            raise UsageError(f"layer {self.layer!r} asks for call {self._call}, but there are only {len(calls)}")
        return calls[self._call]


def layer_names(model: nn.Module) -> list[str]:
    """Return every layer name a user may type: the three that always exist, then the modules' paths."""
    return [*PSEUDO_LAYERS, *(name for name, _ in _unwrapped(model).named_modules() if name)]


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its dotted path; raises UnknownNameError with the nearest paths."""
    modules = dict(_unwrapped(model).named_modules())
    if path not in modules or not path:
        raise UnknownNameError("layer", path, layer_names(model))
    return modules[path]


@torch.no_grad()
def describe_layers(model: nn.Module, images: Images) -> list[LayerInfo]:
    """Return what one forward pass of `images` shows of every layer, in the model's own order."""
    seen: dict[str, list[object]] = {}
    kinds = {name: module for name, module in _unwrapped(model).named_modules() if name}
    handles = []
    for name, module in kinds.items():
        calls: list[object] = seen.setdefault(name, [])
        handles.append(module.register_forward_hook(lambda _m, _i, out, calls=calls: calls.append(_stamped(out))))
    logits = _run_and_remove(model, images, handles)
    rows = [_describe(name, type(kinds[name]).__name__, list(calls)) for name, calls in seen.items()]
    ends: list[tuple[str, list[object]]] = [
        ("input", [_stamped(images)]),
        ("penultimate", _penultimate_calls(model, images)),
        ("logits", [_stamped(logits)]),
    ]
    return [_describe(name, "", calls) for name, calls in ends] + rows


def _parse(layer: str) -> tuple[str, int | None, int | None]:
    match = _SPELLING.fullmatch(layer.strip())
    if match is None:
        raise UsageError(
            f"layer {layer!r} is not of the form <module.path>[@call][#index], input, penultimate or logits"
        )
    call, index = match["call"], match["index"]
    return match["path"], None if call is None else int(call), None if index is None else int(index)


def _unwrapped(model: nn.Module) -> nn.Module:
    """A wrapper (normalisation, say) whose one child is called `network` is transparent to layer names."""
    children = dict(model.named_children())
    # a network that merely has a part of this name keeps its other parts in sight
    return children["network"] if children.keys() == {"network"} else model


def _run_and_remove(model: nn.Module, images: Images, handles: list[RemovableHandle]) -> Tensor:
    try:
        output: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return output


def _penultimate(model: nn.Module, images: Images) -> Tensor:
    """Return the input of the last linear (or 1x1 convolution) layer called: what the classifier sees."""
    inputs: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
        for module in model.modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    _run_and_remove(model, images, handles)
    if not inputs:
        raise UsageError(
            "layer 'penultimate' needs a model whose forward ends in a linear layer; name a module instead"
        )
    return inputs[-1]


def _penultimate_calls(model: nn.Module, images: Images) -> list[object]:
    try:
        return [_stamped(_penultimate(model, images))]
    except UsageError:
        return []


def _cloned(output: object) -> object:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple | list):
        return tuple(_cloned(part) for part in output)
    return output


def _detached(output: object, index: int | None) -> object:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple | list) and index is not None:
        return tuple(_detached(part, None) if i == index % len(output) else part for i, part in enumerate(output))
    return output


class _Stamped(NamedTuple):
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    values: int


def _stamped(output: object) -> _Stamped:
    parts = output if isinstance(output, tuple | list) else (output,)
    tensors = tuple(part for part in parts if isinstance(part, Tensor))
    return _Stamped(tensors, tuple(tensor._version for tensor in tensors), len(parts))


def _describe(name: str, kind: str, calls: list[object]) -> LayerInfo:
    stamps = [call for call in calls if isinstance(call, _Stamped) and call.tensors]
    if not stamps:
        return LayerInfo(name, kind, (), 0, len(calls), False, 0)
    first = stamps[0].tensors[0]
    # torch counts in-place writes per storage: a higher count than at return time means it was overwritten
    overwritten = any(t._version != version for s in stamps for t, version in zip(s.tensors, s.versions, strict=True))
    shape = tuple(first.shape[1:])
    return LayerInfo(name, kind, shape, prod(shape), len(calls), overwritten, stamps[0].values)


def _one_tensor(output: object, layer: str, index: int | None) -> Tensor:
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


def _to_vectors(features: Tensor, reduce: Reduction) -> Features:
    if features.dim() < 2:
        raise UsageError(f"a representation needs a batch and a feature axis, not the shape {tuple(features.shape)}")
    if reduce == "mean" and features.dim() > 2:
        return features.mean(1) if features.dim() == 3 else features.flatten(2).mean(2)
    return features.flatten(1)
