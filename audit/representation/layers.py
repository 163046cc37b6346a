"""Any named layer of any module as a representation g, with the hook rules that stock models need.

A naive hook reads tensors that a later in-place operation overwrites, misses layers that are called several
times or not at all, stays behind after an error, and lets the network run on for nothing. `taps.py` knows better;
this module gives names to layers and makes vectors of what they return.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.errors import UnknownNameError, UsageError
from audit.representation.hooks import PSEUDO_LAYERS, Place, Reader, run_and_remove
from audit.types import Encoded, Features, Images

Reduction = Literal["flatten", "mean"]
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
    (the first axis of maps, the last of token sequences). Gradients reach the images. The first use runs the whole
    network; later ones leave it at the layer, so what comes after is not run. Raises UnknownNameError
    for an unknown layer or reduction, UsageError where the layer is called several times, never, returns several
    tensors, or returns one whose first axis is not the images (windows or tokens, say).
    """

    def __init__(self, model: nn.Module, layer: str, reduce: Reduction = "flatten") -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.reduce = reduce
        if reduce not in ("flatten", "mean"):
            raise UnknownNameError("reduction", reduce, ("flatten", "mean"))
        self.place = _place(model, layer)
        self._reader = Reader([self.place])
        self._carries_answer: bool | None = None

    def forward(self, images: Images) -> Features:
        """Return the features (N, D) of images (N, C, H, W)."""
        (tapped,) = self._reader.read(self.model, images)
        return self.vectors(tapped, images)

    def encode_features(self, images: Images) -> Encoded:
        """Return the features (N, D) and no answers (N, 0), for estimators that need none."""
        return _unanswered(self(images))

    def encode(self, images: Images) -> Encoded:
        """Return, from one forward pass, the features (N, D) and the network's log-probabilities (N, K).

        K is zero where `carries_answer` is false: such a layer says nothing of what the network answers.
        """
        if not self.answers(images[:1]):
            return self.encode_features(images)
        (tapped,), output = self._reader.read_through(self.model, images)
        return Encoded(self.vectors(tapped, images), output.log_softmax(1))

    def answers(self, images: Images) -> bool:
        """Return `carries_answer` as it was measured first."""
        if self._carries_answer is None:
            self._carries_answer = self.carries_answer(images)
        return self._carries_answer

    def carries_answer(self, images: Images) -> bool:
        """Return whether the image reaches the network's answer through this layer alone.

        Then the answer is a function of the features, and what it tells of the image they tell too. Measured: with
        the layer's output detached, no gradient of the answer is left at the image. Averages never carry it.
        """
        if self.reduce == "mean" and self._reader.read(self.model, images)[0].dim() > 2:
            return False  # the answer is a function of all positions, not of their average
        if self.place.path in PSEUDO_LAYERS:
            return True
        call, calls = self.place.call, list[None]()

        def detach(_module: nn.Module, _inputs: object, output: object) -> object:
            calls.append(None)
            chosen = call is None or call < 0 or call == len(calls) - 1
            return _detached(output, self.place.index) if chosen else output

        leaf = images.detach().clone().requires_grad_()
        handle = self.model.get_submodule(self.place.module).register_forward_hook(detach)
        with torch.enable_grad():
            logits = run_and_remove(self.model, leaf, [handle])
            if not logits.requires_grad:
                return True
            weights = torch.arange(1.0, logits.numel() + 1, device=logits.device).view_as(logits)
            (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf, allow_unused=True)
        return gradient is None or not bool(gradient.any())

    def vectors(self, tapped: Tensor, images: Images) -> Features:
        """Return the features (N, D) that the layer's output (N, ...) for images (N, C, H, W) makes."""
        vectors = _to_vectors(tapped, self.reduce)
        if len(vectors) != len(images):
            raise UsageError(
                f"layer {self.layer!r} returns the shape {tuple(tapped.shape)} for {len(images)} images: "
                "its first axis is not the images, so it is no representation of them"
            )
        return vectors


def encode_layers(
    encoders: Sequence[Representation], images: Images, batch_size: int, *, answers: bool = True
) -> Iterator[dict[str, Encoded]]:
    """Yield, batch by batch and without gradients, what each layer of one model encodes: one forward pass a batch.

    The values are those of `Representation.encode`, or with `answers` off of `encode_features`; then the pass is left
    at the last of the layers. Raises UsageError for a batch size under 1, for representations of several models and
    for a layer that is there twice.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size!r} of the images to encode must be at least 1")
    if len({id(each.model) for each in encoders}) > 1:
        raise UsageError("layers are read from one forward pass: all representations must be of one model")
    names = [each.layer for each in encoders]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"layer {twice!r} is asked for twice: once is enough, with one reduction")
    if not encoders:
        return
    model, reader = encoders[0].model, Reader([each.place for each in encoders])
    answering = {each.layer for each in encoders if answers and each.answers(images[:1])}
    for batch in images.split(batch_size):
        with torch.no_grad():
            if answering:
                tapped, output = reader.read_through(model, batch)
                spoken = output.log_softmax(1)
            else:
                tapped, spoken = reader.read(model, batch), batch.new_empty(0)
            found = {each.layer: each.vectors(value, batch) for each, value in zip(encoders, tapped, strict=True)}
        yield {
            layer: Encoded(features, spoken) if layer in answering else _unanswered(features)
            for layer, features in found.items()
        }


def features_of_layers(
    network: nn.Module, layers: Sequence[str], images: Images, batch_size: int, reduce: Reduction = "flatten"
) -> dict[str, Features]:
    """Return the features (N, D) of each layer for images (N, C, H, W), without gradients, from one pass over them.

    They are those of `Representation`, and it raises what that does. It holds all of them: N times the sum of the
    layers' dimensions.
    """
    encoders = [Representation(network, layer, reduce) for layer in dict.fromkeys(layers)]
    parts = list(encode_layers(encoders, images, batch_size, answers=False))
    return {each.layer: torch.cat([part[each.layer].features for part in parts]) for each in encoders}


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
    logits = run_and_remove(model, images, handles)
    rows = [_describe(name, type(kinds[name]).__name__, list(calls)) for name, calls in seen.items()]
    ends: list[tuple[str, list[object]]] = [
        ("input", [_stamped(images)]),
        ("penultimate", _penultimate_calls(model, images)),
        ("logits", [_stamped(logits)]),
    ]
    return [_describe(name, "", calls) for name, calls in ends] + rows


def _place(model: nn.Module, layer: str) -> Place:
    match = _SPELLING.fullmatch(layer.strip())
    if match is None:
        raise UsageError(
            f"layer {layer!r} is not of the form <module.path>[@call][#index], input, penultimate or logits"
        )
    path, call, index = (
        match["path"],
        *(None if match[part] is None else int(match[part]) for part in ("call", "index")),
    )
    if path not in PSEUDO_LAYERS:
        find_module(model, path)
    elif call is not None or (index is not None and path != "logits"):
        raise UsageError(f"layer {layer!r}: {path} is one tensor of one forward pass, leave out @ and #")
    return Place(layer, path, path if _unwrapped(model) is model else f"network.{path}", call, index)


def _unwrapped(model: nn.Module) -> nn.Module:
    """A wrapper (normalisation, say) whose one child is called `network` is transparent to layer names."""
    children = dict(model.named_children())
    # a network that merely has a part of this name keeps its other parts in sight
    return children["network"] if children.keys() == {"network"} else model


def _penultimate_calls(model: nn.Module, images: Images) -> list[object]:
    try:
        return [_stamped(*Reader([_place(model, "penultimate")]).read(model, images))]
    except UsageError:
        return []


def _unanswered(features: Features) -> Encoded:
    return Encoded(features, features.new_empty(len(features), 0))


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


def _to_vectors(features: Tensor, reduce: Reduction) -> Features:
    if features.dim() < 2:
        raise UsageError(f"a representation needs a batch and a feature axis, not the shape {tuple(features.shape)}")
    if reduce == "mean" and features.dim() > 2:
        return features.mean(1) if features.dim() == 3 else features.flatten(2).mean(2)
    return features.flatten(1)
