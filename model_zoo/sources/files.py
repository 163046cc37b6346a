"""Models from a weights file and a named architecture: `file:<path>?arch=...&num_classes=...`."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from audit.errors import AuditError, EnvironmentFault, MismatchError, UnknownNameError, UnsafeError, UsageError
from model_zoo import catalogue, libraries
from model_zoo.architectures import build
from model_zoo.entries import TRAININGS, ModelEntry, ModelRef, is_model_ref, parse_fraction, parse_ref
from model_zoo.images.classes import read_class_file
from model_zoo.images.preprocessing import Preprocessing, from_options
from model_zoo.model_types import ImageShape, LocatedModel, SourceSettings
from model_zoo.sources.cards import locate_carded
from model_zoo.untrusted import file_sha256
from model_zoo.weights import key_rules
from model_zoo.weights.checkpoints import read_weights
from model_zoo.weights.shards import weights_sha256

_NORMS = ("linf", "l2", "l1")


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
    num_classes = _parse_num_classes(options.get("num_classes", ""))
    shape = _parse_shape(options["shape"]) if "shape" in options else None
    preprocessing = _parse_preprocessing(options, shape)
    shape = shape or (preprocessing.shape if preprocessing else None)
    architecture = _find_architecture(options.get("arch", ""), num_classes, shape, sources)
    mean, std = _parse_normalisation(options.get("mean", ""), options.get("std", ""))
    path = Path(ref.target)
    if not path.exists():
        read_weights(path)  # raises EnvironmentFault
    library = options["arch"].partition(":")[0]
    wanted = options.get("sha256", "")
    training, norm = _parse_training(options)
    entry = ModelEntry(
        ref=f"file:{ref.target}",
        name=options.get("name", path.stem),
        source="file",
        architecture=architecture.name,
        family=options.get("family", architecture.family),
        training=training,
        trained_norm=norm,
        trained_eps=parse_fraction(options.get("trained_eps", "0"), "trained_eps"),
        weights_sha256=weights_sha256(path, wanted),
        pinned=len(wanted) == 64,
        code_trusted=bool(architecture.code_sha256),
        code_sha256=architecture.code_sha256,
    )
    return LocatedModel(
        entry=entry,
        build=architecture.build,
        build_single=_find_architecture(options["arch"], 1, shape, sources).build if num_classes == 2 else None,
        copy_weights=lambda network: key_rules.copy_file_weights(network, path, library, options.get("key", "")),
        num_classes=num_classes,
        image_shape=shape or architecture.image_shape,
        mean=mean,
        std=std,
        preprocessing=preprocessing,
        class_names=_read_class_names(options.get("classes", ""), num_classes),
    )


def _parse_training(options: Mapping[str, str]) -> tuple[str, str]:
    training, norm = options.get("training", "unknown"), options.get("trained_norm", "")
    if training not in TRAININGS:
        raise UnknownNameError("training", training, TRAININGS)
    if norm and norm not in _NORMS:
        raise UnknownNameError("trained_norm", norm, _NORMS)
    return training, norm


def _parse_num_classes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 1:
        message = f"num_classes={text!r} of a file: reference is not a number of at least 2; write num_classes=10"
        message += ", num_classes=2 for one output that decides between two classes"
        raise UsageError(f"{message}, or num_classes=0 for an encoder without a classifier")
    return int(text)


def _parse_shape(text: str) -> ImageShape:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"shape={text!r} is not channels x height x width; write shape=3x32x32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _parse_preprocessing(options: Mapping[str, str], shape: ImageShape | None) -> Preprocessing | None:
    """Return resize and crop; raises UsageError where they do not give images of the stated shape."""
    resize, crop, interpolation = (options.get(name, "") for name in ("resize", "crop", "interpolation"))
    found = from_options(resize, crop, interpolation, shape[0] if shape else 3)
    if found and shape and found.shape not in (None, shape):
        stated = "x".join(map(str, shape))
        raise UsageError(f"shape={stated} is not that of images with crop={options.get('crop', '')!r}; give one size")
    return found


def _read_class_names(path: str, num_classes: int) -> tuple[str, ...]:
    """Return the names of the outputs in a JSON file: a list, or a mapping from names to outputs or the other way.

    Outputs that a mapping leaves out are named ''. Raises UsageError, EnvironmentFault, MismatchError.
    """
    if not path:
        return ()
    held = read_class_file(Path(path))
    pairs = list(enumerate(held)) if isinstance(held, list) else [_output_and_name(*item) for item in held.items()]
    if len({output for output, _ in pairs} & set(range(num_classes))) < len(pairs):
        message = f"{path} does not name outputs 0 to {num_classes - 1}, each once"
        raise MismatchError(f"{message}; a map of a data set is given as folder:photos?classes=map.json")
    names = dict(pairs)
    return tuple(str(names.get(output, "")) for output in range(num_classes))


def _output_and_name(key: str, value: Any) -> tuple[Any, Any]:
    """Return output and name of an entry `"cat": 281` or, as in the `id2label` of configurations, `"281": "cat"`."""
    return (value, key) if isinstance(value, int) else (int(key) if key.isdecimal() else None, value)


def _parse_normalisation(mean: str, std: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not mean and not std:
        return (), ()
    means = tuple(parse_fraction(value, "mean") for value in mean.split(","))
    stds = tuple(parse_fraction(value, "std") for value in std.split(","))
    if len(means) != len(stds) or not all(value > 0 for value in stds):
        message = f"mean={mean!r} and std={std!r} do not fit"
        raise UsageError(f"{message}; give one number per channel in both, the std above 0")
    return means, stds


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
    if num_classes == 0 and parsed.source != "timm":
        message = f"num_classes=0 does not fit arch={arch!r}: only timm: architectures and Python factories"
        raise UsageError(f"{message} can omit the classifier; audit a layer below it instead")
    match parsed.source:
        case "torchvision":
            size = shape[1] if shape else None
            family = catalogue.architecture_family(name)
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
