"""Networks in ONNX files: `file:net.onnx`, converted to a module of torch by onnx2torch (extra `onnx`).

A file is data of unknown origin: names of its nodes are rewritten before torch generates code from them, and weights
in other files are not followed.
"""

import re
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from audit.errors import CheckpointError, EnvironmentFault, MismatchError, UsageError
from model_zoo.entries import ModelEntry
from model_zoo.model_types import ImageShape, LocatedModel
from model_zoo.sources.reference_options import (
    parse_images,
    parse_normalisation,
    parse_num_classes,
    read_class_names,
    with_labels,
)
from model_zoo.untrusted import check_file, printable, reason, verify_sha256

_OPSET = 13  # that the converter knows best; older operators have bugs there
_TRIED = 3  # images that show whether a graph takes batches


class OnnxFacts(NamedTuple):
    """What an ONNX graph says of its images and outputs: shape (C, H, W) and number of outputs, None where unknown."""

    image_shape: ImageShape | None
    outputs: int | None


def is_onnx(path: Path) -> bool:
    """Return whether a path has the name of an ONNX file."""
    return path.suffix.lower() == ".onnx"


def locate_onnx(path: Path, options: Mapping[str, str]) -> LocatedModel:
    """Read the options of a reference to an ONNX file, and hash it; else its graph tells classes and shape.

    Raises UsageError for options that an ONNX file does not have or lacks, and what `onnx_facts` raises.
    """
    if wrong := [name for name in ("arch", "key") if name in options]:
        raise UsageError(f"an ONNX file holds its own architecture and weights; leave out {wrong[0]}= of file:{path}")
    facts = onnx_facts(path)
    stated = options.get("num_classes", str(max(2, facts.outputs)) if facts.outputs else "")
    shape, preprocessing = parse_images(options)
    mean, std = parse_normalisation(options.get("mean", ""), options.get("std", ""))
    num_classes, wanted = parse_num_classes(stated), options.get("sha256", "")
    entry = ModelEntry(
        ref=f"file:{path}",
        name=path.stem,
        source="file",
        architecture="onnx",
        family="onnx",
        weights_sha256=verify_sha256(path, wanted),
        pinned=len(wanted) == 64,
    )
    return LocatedModel(
        entry=with_labels(entry, options),
        build=lambda: build_onnx(path),
        copy_weights=lambda _network: ("converted from ONNX by onnx2torch",),
        num_classes=num_classes,
        image_shape=shape or facts.image_shape,
        mean=mean,
        std=std,
        preprocessing=preprocessing,
        class_names=read_class_names(options.get("classes", ""), num_classes),
    )


def onnx_facts(path: Path) -> OnnxFacts:
    """Return what the graph of an ONNX file says of its images and outputs.

    Raises EnvironmentFault without the libraries or the file, CheckpointError for another content, UsageError for
    weights in other files, MismatchError for a graph with several inputs.
    """
    model = _read(path)
    given = _inputs(model)
    if len(given) != 1:
        names = ", ".join(printable(each.name, 40) for each in given)
        raise MismatchError(f"{path} takes {len(given)} inputs ({names}), not images alone")
    shape, out = _sizes(given[0]), _sizes(model.graph.output[0]) if model.graph.output else ()
    known = len(shape) == 4 and all(shape[1:])
    outputs = out[1] if len(out) >= 2 and out[1] and all(size == 1 for size in out[2:]) else None
    return OnnxFacts((shape[1], shape[2], shape[3]) if known else None, outputs)


def build_onnx(path: Path) -> nn.Module:
    """Return the network of an ONNX file as a module of torch, in eval mode, with its weights.

    A graph that takes one image at a time is called once for each. Raises as `onnx_facts`, MismatchError for operations
    that onnx2torch does not have.
    """
    model = _read(path)
    for number, node in enumerate(model.graph.node):
        # torch writes these names into source code
        node.name = f"{re.sub('[^A-Za-z0-9_]', '_', node.name)[:60] or 'node'}_{number}"
    network = _converted(model, path)
    _replace_slices(network)
    shape = _sizes(_inputs(model)[0])
    if not all(shape[1:]) or len(shape) != 4 or _takes_batches(network, shape[1:]):
        return network
    return OneByOne(network)


class OneByOne(nn.Module):
    """A network for one image at a time, called once for each image: (N, C, H, W) -> (N, ...)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of every image."""
        return torch.cat([self.network(image) for image in images.split(1)])


class _Slice(nn.Module):
    """The operator Slice: parts of the axes `axes`, by lists of starts, ends and steps."""

    def forward(
        self, values: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
    ) -> Tensor:
        firsts, lasts = starts.tolist(), ends.tolist()
        along = list(range(len(firsts))) if axes is None else axes.tolist()
        strides = [1] * len(firsts) if steps is None else steps.tolist()
        for axis, first, last, step in zip(along, firsts, lasts, strides, strict=True):
            places = range(*slice(first, last, step).indices(values.shape[axis]))
            if step == 1:
                values = values.narrow(axis, places.start, len(places))
            else:
                values = values.index_select(axis, torch.tensor(list(places), device=values.device))
        return values


def _read(path: Path) -> Any:
    onnx = _library("onnx", path)
    if not path.exists():
        raise EnvironmentFault(f"weights file {path} does not exist")
    check_file(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
        if not (elsewhere := any(each.external_data for each in model.graph.initializer)):
            onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise many types
        message = f"{path} is not a valid ONNX file ({reason(error)}); export it again"
        raise CheckpointError("not_a_checkpoint", message) from error
    if elsewhere:
        message = f"{path} keeps weights in other files"
        raise UsageError(
            f"{message}; save it as one file: onnx.save(onnx.load(path), new, save_as_external_data=False)"
        )
    return model


def _library(name: str, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module("onnx2torch") if name == "onnx2torch" else import_module("onnx")
    except ImportError as error:
        message = f"file:{path.name} needs {name}, which is not installed"
        raise EnvironmentFault(f"{message}; pip install 'rvaudit[onnx]'") from error


def _inputs(model: Any) -> list[Any]:
    """Return the inputs of a graph that are no weights."""
    weights = {each.name for each in model.graph.initializer}
    return [each for each in model.graph.input if each.name not in weights]


def _sizes(value: Any) -> tuple[int, ...]:
    """Return the sizes of a value's axes, 0 for those that the graph leaves open."""
    return tuple(int(each.dim_value) for each in value.type.tensor_type.shape.dim)


def _converted(model: Any, path: Path) -> nn.Module:
    """Return the module of a graph: as its values state them, else with the ranks that a run shows."""
    convert, failed = _library("onnx2torch", path).convert, None
    for prepare in (_with_present_operators, _with_ranks):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network: nn.Module = convert(prepare(model))
        except Exception as error:  # the converters of single operations raise many types
            failed = error
        else:
            return network.eval().requires_grad_(False)
    message = f"onnx2torch cannot convert {path}: {reason(failed or ValueError())}"
    raise MismatchError(f"{message}; load its weights as a state dict with arch= instead") from failed


def _with_present_operators(model: Any) -> Any:
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if max(versions, default=_OPSET) >= _OPSET:
        return model
    return import_module("onnx.version_converter").convert_version(model, _OPSET)


def _with_ranks(model: Any) -> Any:
    """Return a model in which every intermediate value states its number of axes, as a run on a blank image shows."""
    model = _with_present_operators(model)
    helper, evaluator = import_module("onnx.helper"), import_module("onnx.reference").ReferenceEvaluator
    (given,) = _inputs(model)
    blank = np.zeros([size or 1 for size in _sizes(given)], dtype=np.float32)
    values = evaluator(model).run(None, {given.name: blank}, intermediate=True)
    del model.graph.value_info[:]
    ends = {each.name for each in (*model.graph.input, *model.graph.output, *model.graph.initializer)}
    for name, value in values.items():
        if name and name not in ends:
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            model.graph.value_info.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
    return model


def _replace_slices(network: nn.Module) -> None:
    """Replace onnx2torch's Slice, which indexes in a way that torch is giving up."""
    for name, child in network.named_children():
        if type(child).__name__ == "OnnxSlice":
            setattr(network, name, _Slice())
        else:
            _replace_slices(child)


@torch.no_grad()
def _takes_batches(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether outputs of a batch are those of its images, each by itself."""
    images = torch.rand(_TRIED, *shape, generator=torch.Generator().manual_seed(0))
    each = torch.cat([network(image) for image in images.split(1)])
    try:
        together: Tensor = network(images)
    except (RuntimeError, ValueError, IndexError):
        return False
    return together.shape == each.shape and bool(torch.allclose(together, each, rtol=1e-4, atol=1e-5))
