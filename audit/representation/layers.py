"""The activations of any named layer of a model as a representation of its images.

A layer is `input`, `penultimate`, `logits`, `output` or `<module.path>[@call][#index]`; the index is the number or the
name of a value. `hooks.py` records activations: it copies them before in-place operations overwrite them,
distinguishes repeated calls, removes its hooks after errors and leaves the forward pass early. This module parses layer
names and reduces activations to vectors.
"""

import re
from collections.abc import Iterator, Sequence
from math import prod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.memory.limit import allowed
from audit.adversary.passes import in_full_precision, log_probabilities
from audit.errors import UnknownNameError, UsageError
from audit.representation.headless import OUTPUT, Headless, resolved_layer
from audit.representation.hooks import (
    NO_MODULES,
    OUTPUTS,
    PSEUDO_LAYERS,
    HookPoint,
    LayerReader,
    LayerSpec,
    in_this_thread,
    run_and_remove_hooks,
)
from audit.representation.outputs import Index, parts_of
from audit.types import Encoded, Features, Images, image_slices

Reduction = Literal["flatten", "mean"]
_LAYER_NAME = re.compile(r"(?P<path>[^@#]+)(@(?P<call>-?\d+))?(#(?P<index>-?\d+|[A-Za-z_]\w*))?")


class LayerInfo(NamedTuple):
    """One row of `rvaudit layers`.

    `shape` is that of the layer's first output tensor, without the batch axis, and `dimension` its product. `calls` is
    the number of calls in one forward pass; a layer with several needs `@call`. `outputs` is the number of values that
    the layer returns, tensors or not; with several it needs `#index`. `overwritten` is true if a later
    in-place operation changes the output.
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

    `reduce` maps activations to vectors: `flatten` keeps every position, `mean` averages over all axes but the channel
    (the first axis of maps, the last of token sequences). Gradients reach the images. The first call runs the whole
    network; later calls leave the forward pass at the layer.

    Raises UnknownNameError for an unknown layer or reduction, and UsageError for a layer that is never called, is
    called several times, returns several tensors, or returns a tensor whose first axis is not the batch.
    """

    def __init__(self, model: nn.Module, layer: str, reduce: Reduction = "flatten") -> None:
        super().__init__()
        self.model = model
        self.layer = layer
        self.reduce = reduce
        if reduce not in ("flatten", "mean"):
            raise UnknownNameError("reduction", reduce, ("flatten", "mean"))
        self.spec = _parse_layer(model, resolved_layer(model, layer))
        self._reader = LayerReader([self.spec])
        self._encodes_log_probs: bool | None = None

    def forward(self, images: Images) -> Features:
        """Return the features (N, D) of images (N, C, H, W)."""
        (activations,) = self._reader.read(self.model, images)
        return self.to_features(activations, images)

    def encode_features(self, images: Images) -> Encoded:
        """Return the features (N, D) with empty log-probabilities (N, 0), for estimators that need none."""
        return _without_log_probs(self(images))

    def encode(self, images: Images) -> Encoded:
        """Return the features (N, D) and the network's log-probabilities (N, K), from one forward pass.

        K is 0 unless the logits are a function of the features (`determines_logits`).
        """
        if not self.encodes_log_probs(images[:1]):
            return self.encode_features(images)
        (activations,), logits = self._reader.read_with_output(self.model, images)
        return Encoded(self.to_features(activations, images), log_probabilities(logits))

    def encodes_log_probs(self, images: Images) -> bool:
        """Return whether `encode` includes log-probabilities: the first result of `determines_logits`."""
        if self._encodes_log_probs is None:
            self._encodes_log_probs = self.determines_logits(images)
        return self._encodes_log_probs

    def point(self, images: Images) -> HookPoint | None:
        """Return the call of a module that holds the layer, located by a pass of images; None at the network's ends."""
        return self._reader.point(self.model, images)

    def determines_logits(self, images: Images) -> bool:
        """Return whether the logits are a function of the features, so that they carry no further information.

        They are if every path from the images to the logits passes through the layer (`patching.carries_logits`).
        Averages over positions never determine them; an encoder has no logits.
        """
        if isinstance(self.model, Headless):
            return False
        if self.reduce == "mean" and self._reader.read(self.model, images)[0].dim() > 2:
            return False  # the logits depend on every position, not on the average alone
        if self.spec.path in NO_MODULES:
            return True
        point = self.point(images)
        if point is None:
            return True
        from audit.representation.patching import OutputPart, carries_logits

        return carries_logits(self.model, OutputPart(point, self.spec.index), images)

    def to_features(self, activations: Tensor, images: Images) -> Features:
        """Return the features (N, D) of the layer's activations (N, ...) for images (N, C, H, W)."""
        features = in_full_precision(_to_vectors(activations, self.reduce))
        if len(features) != len(images):
            raise UsageError(
                f"layer {self.layer!r} returns the shape {tuple(activations.shape)} for {len(images)} images: "
                "its first axis must be the batch"
            )
        return features


def encode_layers(
    encoders: Sequence[Representation], images: Images, batch_size: int, *, with_log_probs: bool = True
) -> Iterator[dict[str, Encoded]]:
    """Yield the encodings of several layers of one model, batch by batch: one forward pass a batch, without gradients.

    The values are those of `Representation.encode`, or of `encode_features` if `with_log_probs` is False; then every
    pass is left at the last of the layers. Raises UsageError for a batch size below 1, for representations of several
    models, and for a layer that occurs twice.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size!r} of the images to encode must be at least 1")
    if len({id(each.model) for each in encoders}) > 1:
        raise UsageError("layers encoded in one forward pass must belong to one model")
    names = [each.layer for each in encoders]
    if repeated := next((name for name in names if names.count(name) > 1), ""):
        raise UsageError(f"layer {repeated!r} occurs twice: encode each layer once, with one reduction")
    if not encoders:
        return
    model, reader = encoders[0].model, LayerReader([each.spec for each in encoders])
    determining = {each.layer for each in encoders if with_log_probs and each.encodes_log_probs(images[:1])}
    for part in image_slices(images, allowed(batch_size)):
        batch = images[part]
        with torch.no_grad():
            if determining:
                activations, logits = reader.read_with_output(model, batch)
                log_probs = log_probabilities(logits)
            else:
                activations, log_probs = reader.read(model, batch), batch.new_empty(0)
            features = {
                each.layer: each.to_features(value, batch) for each, value in zip(encoders, activations, strict=True)
            }
        yield {
            layer: Encoded(values, log_probs) if layer in determining else _without_log_probs(values)
            for layer, values in features.items()
        }


def features_of_layers(
    network: nn.Module, layers: Sequence[str], images: Images, batch_size: int, reduce: Reduction = "flatten"
) -> dict[str, Features]:
    """Return the features (N, D) of each layer for images (N, C, H, W), without gradients, in one pass for each batch.

    Values and errors are those of `Representation`. Memory holds the features of all layers.
    """
    encoders = [Representation(network, layer, reduce) for layer in dict.fromkeys(layers)]
    batches = list(encode_layers(encoders, images, batch_size, with_log_probs=False))
    return {each.layer: torch.cat([batch[each.layer].features for batch in batches]) for each in encoders}


def layer_names(model: nn.Module) -> list[str]:
    """Return every layer once: `input`, `penultimate` and `logits`, or the `output` of an encoder, then the modules."""
    ends = ("input", OUTPUT) if isinstance(model, Headless) else PSEUDO_LAYERS
    return [*ends, *(name for name, _ in _inner_network(model).named_modules() if name)]


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Return a submodule by its dotted path; raises UnknownNameError, with the nearest paths, if there is none."""
    modules = dict(_inner_network(model).named_modules())
    if path not in modules or not path:
        raise UnknownNameError("layer", path, layer_names(model))
    return modules[path]


@torch.no_grad()
def describe_layers(model: nn.Module, images: Images) -> list[LayerInfo]:
    """Return the calls and outputs of every layer in one forward pass of images (N, C, H, W), in the model's order."""
    modules = {name: module for name, module in _inner_network(model).named_modules() if name}
    outputs: dict[str, list[_Output]] = {name: [] for name in modules}
    handles = [
        module.register_forward_hook(
            in_this_thread(lambda _m, _i, output, seen=outputs[name]: seen.append(_with_versions(output)))
        )
        for name, module in modules.items()
    ]
    logits = run_and_remove_hooks(model, images, handles)
    rows = [_describe(name, type(modules[name]).__name__, calls) for name, calls in outputs.items()]
    pseudo = {"input": [_with_versions(images)]}
    if isinstance(model, Headless):
        pseudo[OUTPUT] = [_with_versions(logits)]
    else:
        pseudo |= {"penultimate": _penultimate_output(model, images), "logits": [_with_versions(logits)]}
    return [*(_describe(name, "", calls) for name, calls in pseudo.items()), *rows]


def _parse_layer(model: nn.Module, layer: str) -> LayerSpec:
    match = _LAYER_NAME.fullmatch(layer.strip())
    if match is None:
        raise UsageError(
            f"layer {layer!r} is not of the form <module.path>[@call][#index], input, penultimate, logits or output"
        )
    path, named = match["path"], match["index"]
    call = None if match["call"] is None else int(match["call"])
    index: Index | None = int(named) if named and named.lstrip("-").isdigit() else named
    if path not in NO_MODULES:
        find_module(model, path)
    elif call is not None or (index is not None and path not in OUTPUTS):
        raise UsageError(f"layer {layer!r}: {path} is a single tensor, leave out @ and #")
    return LayerSpec(layer, path, _wrapper_prefix(model) + path, call, index)


def _inner_network(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers, such as a normalisation, whose only child is called `network`."""
    return model.get_submodule(_wrapper_prefix(model).rstrip("."))


def _wrapper_prefix(model: nn.Module) -> str:
    """Return the dotted prefix of the wrapped network's layers, empty if there is no wrapper."""
    children = dict(model.named_children())
    # a model with further children beside `network` is no wrapper
    return "network." + _wrapper_prefix(children["network"]) if children.keys() == {"network"} else ""


def _without_log_probs(features: Features) -> Encoded:
    return Encoded(features, features.new_empty(len(features), 0))


class _Output(NamedTuple):
    """The tensors of one output, their version counters when it was returned, and its number of values."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    values: int


def _with_versions(output: object) -> _Output:
    parts = parts_of(output)
    values = (output,) if parts is None else tuple(parts.values())
    tensors = tuple(value for value in values if isinstance(value, Tensor))
    return _Output(tensors, tuple(tensor._version for tensor in tensors), len(values))


def _penultimate_output(model: nn.Module, images: Images) -> list[_Output]:
    try:
        return [_with_versions(*LayerReader([_parse_layer(model, "penultimate")]).read(model, images))]
    except UsageError:
        return []


def _describe(name: str, kind: str, calls: Sequence[_Output]) -> LayerInfo:
    outputs = [call for call in calls if call.tensors]
    if not outputs:
        return LayerInfo(name, kind, (), 0, len(calls), False, 0)
    shape = tuple(outputs[0].tensors[0].shape[1:])
    # an in-place operation increases the version counter that all views of a storage share
    overwritten = any(
        tensor._version != version
        for output in outputs
        for tensor, version in zip(output.tensors, output.versions, strict=True)
    )
    return LayerInfo(name, kind, shape, prod(shape), len(calls), overwritten, outputs[0].values)


def _to_vectors(features: Tensor, reduce: Reduction) -> Features:
    if features.dim() < 2:
        raise UsageError(f"a representation needs a batch and a feature axis, not the shape {tuple(features.shape)}")
    if reduce == "mean" and features.dim() > 2:
        return features.mean(1) if features.dim() == 3 else features.flatten(2).mean(2)
    return features.flatten(1)
