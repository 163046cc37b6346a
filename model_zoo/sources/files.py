"""Models from a weights file and a named architecture: `file:<path>?arch=...&num_classes=...`."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from torch import nn

from audit.errors import AuditError, EnvironmentFault, MismatchError, UnknownNameError, UnsafeError, UsageError
from model_zoo import catalogue, libraries
from model_zoo.adapters import without_classifier
from model_zoo.architectures import build
from model_zoo.entries import ModelEntry, ModelRef, is_model_ref, parse_ref
from model_zoo.model_types import ImageShape, LocatedModel, SourceSettings
from model_zoo.sources.cards import locate_carded
from model_zoo.sources.onnx_files import is_onnx, locate_onnx
from model_zoo.sources.reference_options import (
    parse_images,
    parse_normalisation,
    parse_num_classes,
    read_class_names,
    with_labels,
)
from model_zoo.untrusted import file_sha256
from model_zoo.weights import key_rules
from model_zoo.weights.checkpoints import read_weights
from model_zoo.weights.shards import weights_sha256


@dataclass(frozen=True)
class _Architecture:
    """How to build the network of a `file:` reference; `code_sha256` is set for a user's factory."""

    build: Callable[[], nn.Module]
    name: str
    family: str
    code_sha256: str = ""
    image_shape: ImageShape | None = None


def locate_file(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Read the options of a `file:` reference, or the card beside its weights where there are none; hash the weights.

    Raises UsageError for missing or invalid options, UnsafeError for a Python factory without `trust_code`,
    EnvironmentFault for a missing file, IntegrityError for another hash than `sha256=`.
    """
    options = ref.options
    if not options and (card := catalogue.card_beside(Path(ref.target))):
        return locate_carded(Path(ref.target), card)
    path = Path(ref.target)
    if is_onnx(path):
        return locate_onnx(path, options)
    num_classes = parse_num_classes(options.get("num_classes", ""))
    shape, preprocessing = parse_images(options)
    architecture = _find_architecture(options.get("arch", ""), num_classes, shape, sources)
    mean, std = parse_normalisation(options.get("mean", ""), options.get("std", ""))
    if not path.exists():
        read_weights(path)  # raises EnvironmentFault
    library = options["arch"].partition(":")[0]
    wanted = options.get("sha256", "")
    entry = ModelEntry(
        ref=f"file:{ref.target}",
        name=path.stem,
        source="file",
        architecture=architecture.name,
        family=architecture.family,
        weights_sha256=weights_sha256(path, wanted),
        pinned=len(wanted) == 64,
        code_trusted=bool(architecture.code_sha256),
        code_sha256=architecture.code_sha256,
    )
    return LocatedModel(
        entry=with_labels(entry, options),
        build=architecture.build,
        build_single=_find_architecture(options["arch"], 1, shape, sources).build if num_classes == 2 else None,
        copy_weights=lambda network: key_rules.copy_file_weights(network, path, library, options.get("key", "")),
        num_classes=num_classes,
        image_shape=shape or architecture.image_shape,
        mean=mean,
        std=std,
        preprocessing=preprocessing,
        class_names=read_class_names(options.get("classes", ""), num_classes),
    )


def _find_architecture(arch: str, num_classes: int, shape: ImageShape | None, sources: SourceSettings) -> _Architecture:
    if not arch:
        message = "a file: reference needs arch=, a model reference (arch=torchvision:resnet18) or a Python factory"
        raise UsageError(f"{message} (arch=nets.py:resnet20)")
    if is_model_ref(arch):
        return _library_architecture(arch, num_classes, shape)
    return _factory_architecture(arch, num_classes, sources)


def _library_architecture(arch: str, num_classes: int, shape: ImageShape | None) -> _Architecture:
    """Build the architecture of a model reference with the number of classes and image shape of this file."""
    parsed = parse_ref(arch)
    name = parsed.target.partition("/")[0]
    if num_classes == 0 and parsed.source not in ("timm", "torchvision"):
        message = f"num_classes=0 does not fit arch={arch!r}: only timm: and torchvision: architectures and factories"
        raise UsageError(f"{message} can omit the classifier; audit a layer below it instead")
    match parsed.source:
        case "torchvision":
            size = shape[1] if shape else None
            family = catalogue.architecture_family(name)
            if num_classes == 0:
                build_whole = partial(libraries.torchvision_build, name, 1, size)
                return _Architecture(lambda: without_classifier(build_whole(), name), arch, family)
            return _Architecture(lambda: libraries.torchvision_build(name, num_classes, size), arch, family)
        case "timm":
            arguments = _timm_arguments(name, num_classes, shape)
            family = libraries.timm_facts(name).family
            return _Architecture(lambda: libraries.timm_build(name, arguments), arch, family)
        case "robustbench":
            dataset, threat, model = parsed.target.split("/")
            row = catalogue.robustbench_row(dataset, threat, model)
            return _Architecture(
                lambda: libraries.robustbench_build(dataset, threat, model),
                arch,
                row.entry.family,
                image_shape=row.image_shape,
            )
        case "bundled":
            return _bundled_architecture(arch, name, num_classes, shape)
    message = f"arch={arch!r} cannot be taken from {parsed.source}:"
    raise UsageError(f"{message}; legal are timm:, torchvision:, robustbench:, bundled: and Python factories")


def _timm_arguments(name: str, num_classes: int, shape: ImageShape | None) -> dict[str, int | tuple[int, int]]:
    arguments: dict[str, int | tuple[int, int]] = {"num_classes": num_classes}
    if shape and shape[0] != 3:
        arguments["in_chans"] = shape[0]
    # Only architectures whose weights depend on the image size take this argument.
    if shape and libraries.timm_facts(name).fixed_size:
        arguments["img_size"] = shape[1:]
    return arguments


def _bundled_architecture(arch: str, name: str, num_classes: int, shape: ImageShape | None) -> _Architecture:
    card = catalogue.read_card(name)
    changed = {"num_classes": num_classes, **({"image_shape": shape} if shape else {})}
    # Change only arguments in the card: not every architecture takes every argument.
    arguments = {key: changed.get(key, value) for key, value in card["arguments"].items()}
    own = shape or tuple(card["image_shape"])
    return _Architecture(lambda: build(card["architecture"], arguments), arch, card["family"], image_shape=own)


def _factory_architecture(arch: str, num_classes: int, sources: SourceSettings) -> _Architecture:
    where, colon, name = arch.rpartition(":")
    if not colon or not name.isidentifier():
        message = f"arch={arch!r} is neither a model reference nor a Python factory"
        raise UsageError(f"{message}; write arch=torchvision:resnet18 or arch=nets.py:resnet20")
    if not sources.trust_code:
        message = f"arch={arch!r} would run Python code; pass --trust-code on the command line"
        raise UnsafeError(f"{message} (trust_code=True in Python) if you trust it")
    code = Path(where) if where.endswith(".py") else None
    origin = _module_origin(where) if code is None else code
    if code is not None and not code.is_file():
        raise EnvironmentFault(f"the factory file {where} does not exist below {Path.cwd()}")
    digest = file_sha256(origin) if origin else "0" * 64
    family = catalogue.architecture_family(name)
    return _Architecture(lambda: _call_factory(where, name, num_classes), arch, family, code_sha256=digest)


def _module_origin(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise EnvironmentFault(f"the factory's module {module!r} cannot be found; install it or name a .py file")
    return Path(spec.origin) if spec.origin and Path(spec.origin).is_file() else None


def _call_factory(where: str, name: str, num_classes: int) -> nn.Module:
    """Import and call the user's factory, converting its exceptions to UsageError."""
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        factory = getattr(module, name, None)
        if not callable(factory):
            legal = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise UnknownNameError(f"factory in {where}", name, legal)
        takes_count = "num_classes" in inspect.signature(factory).parameters
        network = factory(num_classes=num_classes) if takes_count else factory()
    except AuditError:
        raise
    except Exception as error:  # user code may raise anything
        raise UsageError(f"factory {where}:{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise MismatchError(f"factory {where}:{name} returned a {type(network).__name__}, not a torch.nn.Module")
    return network


def _import_file(path: Path) -> ModuleType:
    name = f"_rvaudit_factory_{file_sha256(path)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python code; name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up their module there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
