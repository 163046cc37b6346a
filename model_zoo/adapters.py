"""Bring a network into the form that is audited: a plain float32 module that returns scores (N, K).

Networks come compiled, wrapped for several GPUs, in half or double precision, with one output for two classes, with
scores of the shape (N, K, 1, 1), or with outputs in dictionaries, data classes and tuples.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audit.errors import MismatchError
from model_zoo.model_types import ImageShape, Normalized

# Sizes to try where a reference does not state one.
_USUAL_SHAPES: tuple[ImageShape, ...] = ((3, 32, 32), (1, 28, 28), (3, 224, 224))
_CLASSIFIERS = ("fc", "classifier", "head", "heads")  # of torchvision's networks
_FEATURES = ("image_embeds", "pooler_output", "last_hidden_state")
# Steps of autograd that only change the shape of a tensor.
_RESHAPING = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Alias", "Select", "Slice", "Flatten", "T")


@dataclass(frozen=True)
class OutputForm:
    """Where the scores are in what a network returns, and how they become (N, K).

    `field` is the key, attribute or index of the tensor, None where it is returned by itself; `attribute` is whether
    the field is an attribute; `flat` is whether dimensions of size 1 follow the classes; `single` whether one score s
    stands for two classes, whose scores are then 0 and s.
    """

    field: str | int | None = None
    attribute: bool = False
    flat: bool = False
    single: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the outputs, one sentence each."""
        notes = [f"took {self.field!r} of the network's outputs"] if self.field is not None else []
        notes += ["dropped dimensions of size 1 after the classes"] if self.flat else []
        notes += ["its one output s became the scores 0 and s of two classes"] if self.single else []
        return tuple(notes)


class Scores(nn.Module):
    """A network whose outputs are brought into the form of scores: images (N, C, H, W) -> (N, K) in float32."""

    def __init__(self, network: nn.Module, form: OutputForm) -> None:
        super().__init__()
        self.network = network
        self.form = form

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the network."""
        return read_scores(self.network(images), self.form)


class NormalizedScores(Normalized):
    """A network preceded by its normalisation, whose outputs are brought into the form of scores."""

    form: OutputForm

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the network for normalised images."""
        return read_scores(super().forward(images), self.form)


def read_scores(outputs: Any, form: OutputForm) -> Tensor:
    """Return the scores (N, K) in what a network returned."""
    scores = _field(outputs, form)
    if form.flat:
        scores = scores.flatten(1)
    if form.single:
        scores = scores.reshape(-1, 1)
        scores = torch.cat([torch.zeros_like(scores), scores], dim=1)
    result: Tensor = scores.float()
    return result


def with_scores(
    network: nn.Module, form: OutputForm | None, mean: tuple[float, ...], std: tuple[float, ...]
) -> nn.Module:
    """Return a network behind its normalisation, if it has one, with its outputs in the form of scores."""
    if form is None:
        return Normalized(network, mean, std) if mean else network
    if not mean:
        return Scores(network, form)
    wrapped = NormalizedScores(network, mean, std)
    wrapped.form = form
    return wrapped


def plain_network(network: nn.Module, shape: ImageShape | None) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a network out of the wrappers of torch.compile and of several GPUs, in float32, and a note for each.

    A network in another precision that takes float32 images of `shape` by itself keeps its precision.
    """
    network, wrappers = _unwrap(network)
    notes = [f"took the network out of {name}" for name in sorted(wrappers)]
    kinds = {str(p.dtype).removeprefix("torch.") for p in network.parameters() if p.is_floating_point()}
    if kinds - {"float32"} and not (shape is not None and _outputs(network, shape) is not None):
        network.float()
        notes.append(f"converted the network from {', '.join(sorted(kinds - {'float32'}))} to float32")
    return network, tuple(notes)


def _unwrap(network: nn.Module) -> tuple[nn.Module, set[str]]:
    """Take wrappers off a network and off every module in it."""
    found: set[str] = set()
    network = _inner(network, found)
    for module in list(network.modules()):
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
            found.add("torch.compile")
        for name, child in list(module.named_children()):
            inner = _inner(child, found)
            if inner is not child:
                setattr(module, name, _unwrap_into(inner, found))
    return network, found


def _unwrap_into(network: nn.Module, found: set[str]) -> nn.Module:
    network, more = _unwrap(network)
    found |= more
    return network


def _inner(network: nn.Module, found: set[str]) -> nn.Module:
    while True:
        compiled = getattr(network, "_orig_mod", None)
        if isinstance(compiled, nn.Module) and type(network).__name__ == "OptimizedModule":
            network = compiled
            found.add("torch.compile")
        elif isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            found.add(type(network).__name__)
            network = network.module
        else:
            return network


def without_classifier(network: nn.Module, name: str) -> nn.Module:
    """Return a network of torchvision without its classifier, the last of its modules: images -> features (N, D).

    Raises MismatchError for a network whose classifier is not such a module.
    """
    last, head = list(network.named_children())[-1]
    if last not in _CLASSIFIERS or any(isinstance(part, nn.Conv2d) for part in head.modules()):
        message = f"{name} has no classifier that can be left out (its last module is {last!r})"
        raise MismatchError(f"{message}; give it its number of classes, and audit a layer of it")
    setattr(network, last, nn.Identity())
    return network


def find_form(network: nn.Module, num_classes: int, shape: ImageShape | None, name: str) -> OutputForm | None:
    """Return how the outputs of a network become scores (N, num_classes), or features where `num_classes` is 0.

    None for a network that returns them by itself or whose outputs are not understood. The outputs for one blank image
    decide. Raises MismatchError where the one output for two classes is a probability, not a logit.
    """
    shapes = _USUAL_SHAPES if shape is None else (shape,)
    found = next((out for out in (_outputs(network, size) for size in shapes) if out is not None), None)
    form = None if found is None else output_form(found, num_classes)
    if form is None:
        return None
    scores: Tensor = _field(found, form)
    if form.single and _ends_in_sigmoid(scores):
        message = f"{name} returns one probability for an image: its last step is a sigmoid, which hides gradients"
        raise MismatchError(f"{message}; let it return the logit, the input of the sigmoid")
    return None if form == OutputForm() and scores.dtype == torch.float32 else form


def output_form(outputs: Any, num_classes: int) -> OutputForm | None:
    """Return where the scores of one image are in the outputs of a network, None where that is not clear.

    A field called `logits` holds the scores of a classifier; without one, the only tensor of a fitting shape does. An
    encoder's features are `image_embeds`, else `pooler_output`, else `last_hidden_state`.
    """
    if isinstance(outputs, Tensor):
        return _tensor_form(outputs, num_classes)
    parts = _parts(outputs)
    attribute = not isinstance(outputs, Mapping | tuple | list)
    for name in ("logits",) if num_classes else _FEATURES:
        if isinstance(parts.get(name), Tensor):
            found = _tensor_form(parts[name], num_classes)
            by_name = attribute or isinstance(outputs, tuple | list)
            return found and OutputForm(name, by_name, found.flat, found.single)
    fitting = [(key, form) for key, value in parts.items() if (form := _tensor_form(value, num_classes))]
    if num_classes == 0 or len(fitting) != 1:
        return None
    key, form = fitting[0]
    return OutputForm(key, attribute, form.flat, form.single)


def _tensor_form(value: Any, num_classes: int) -> OutputForm | None:
    """Return the form of scores for one image, None for a tensor of another shape; features of any shape are plain."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    if num_classes == 0:
        return OutputForm()
    shape = tuple(value.shape)
    tail = shape[2:]
    if shape[:2] == (1, num_classes) and set(tail) <= {1}:
        return OutputForm(flat=bool(tail))
    if num_classes == 2 and value.numel() == 1 and shape[:1] == (1,):
        return OutputForm(single=True)
    return None


def _parts(outputs: Any) -> dict[Any, Any]:
    """Return the parts of a network's output by key, attribute or index."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    if isinstance(outputs, tuple | list):
        named = {name: getattr(outputs, name) for name in getattr(outputs, "_fields", ())}
        return named if "logits" in named else dict(enumerate(outputs))
    if is_dataclass(outputs):
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    return dict(vars(outputs)) if hasattr(outputs, "__dict__") else {}


def _field(outputs: Any, form: OutputForm) -> Any:
    if form.field is None:
        return outputs
    return getattr(outputs, str(form.field)) if form.attribute else outputs[form.field]


def _outputs(network: nn.Module, shape: ImageShape) -> Any:
    """Return what a network in eval mode returns for one blank image, None where it does not take it."""
    device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), None)
    images = torch.zeros(1, *shape, device=device, requires_grad=True)
    with _evaluated(network), torch.enable_grad():
        try:
            return network(images)
        except Exception:  # networks of users may raise anything; the check of the outputs tells why
            return None


@contextmanager
def _evaluated(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode and back: a batch of one image must not reach statistics of batches."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _ends_in_sigmoid(scores: Tensor) -> bool:
    """Return whether the last step that computes a value is a sigmoid."""
    step: Any = scores.grad_fn
    while step is not None:
        name = type(step).__name__.rstrip("0123456789").removesuffix("Backward")
        if name not in _RESHAPING:
            return name == "Sigmoid"
        step = next((before for before, _ in getattr(step, "next_functions", ()) if before is not None), None)
    return False
