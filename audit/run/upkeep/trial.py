"""Trial of a model: load it and compute each of its layers on two images."""

from collections.abc import Iterator
from dataclasses import replace

from audit.config.validation import Finding, Request
from audit.errors import AuditError, UsageError
from audit.representation.layers import Representation
from audit.run.cell import InputRules
from audit.run.gates.inputs import check_inputs
from audit.run.loading import RunOptions, open_images, open_representation
from model_zoo.fitting import for_outputs
from model_zoo.images.datasets import ImageSet
from model_zoo.load import locate
from model_zoo.lookup import expand_ref
from model_zoo.model_types import LocatedModel


def try_model(request: Request, options: RunOptions) -> Iterator[Finding]:
    """Yield the faults of a model or of all models that a pattern matches, each once, on the CPU."""
    try:
        refs = expand_ref(request.ref, options.sources.base)
    except AuditError as error:
        yield Finding("ref", error)
        return
    options = replace(options, device="cpu")
    seen: set[str] = set()
    for ref in refs:
        for finding in _try_one(ref, request, options):
            if (key := f"{finding.part} {finding.error}") not in seen:
                seen.add(key)
                yield finding


def _try_one(ref: str, request: Request, options: RunOptions) -> Iterator[Finding]:
    try:
        model = locate(ref, options.sources)
    except Exception as error:  # a third-party library may raise anything
        yield Finding("ref", _as_audit_error(error))
        model = None
    try:
        images = _images(model, request, request.images, options)
    except AuditError as error:
        yield Finding("images" if _only_the_count_is_wrong(model, request, options) else "dataset", error)
        return
    if model is None:
        return
    try:
        images = for_outputs(images, model, options.sources, restrict=request.restrict_classes)
    except Exception as error:  # a third-party network may raise anything
        yield Finding("ref", _as_audit_error(error))
        return
    yield from _try_layers(ref, request, images, options)


def _rules(request: Request) -> InputRules:
    return InputRules(request.preprocess == "model", request.restrict_classes, request.balanced)


def _images(model: LocatedModel | None, request: Request, count: int | None, options: RunOptions) -> ImageSet:
    chosen = model.preprocessing if model and _rules(request).preprocess else None
    balanced = request.balanced and count == request.images
    asked = replace(options.request(count, balanced=balanced), preprocessing=chosen)
    return open_images(request.dataset, options, asked)


def _only_the_count_is_wrong(model: LocatedModel | None, request: Request, options: RunOptions) -> bool:
    """Return whether one image of the data set can be loaded, so that the requested number is at fault."""
    try:
        _images(model, request, 1, options)
    except AuditError:
        return False
    return request.images is not None


def _try_layers(ref: str, request: Request, images: ImageSet, options: RunOptions) -> Iterator[Finding]:
    try:
        model = open_representation(ref, images, options)
        check_inputs(model, images, min_images=1)
    except Exception as error:  # a third-party network may raise anything
        yield Finding("ref", _as_audit_error(error))
        return
    for number, layer in enumerate(request.layers):
        try:
            Representation(model.network, layer, request.reduce)(images.images[:2])
        except Exception as error:
            yield Finding(number, _as_audit_error(error))


def _as_audit_error(error: Exception) -> AuditError:
    if isinstance(error, AuditError):
        return error
    first = next(iter(str(error).splitlines()), "")
    return UsageError(f"{type(error).__name__}: {first}".removesuffix(": "))
