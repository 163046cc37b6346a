"""Model references and the metadata of a model that is available before its weights are read. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from urllib.parse import unquote

from audit.errors import UnknownNameError, UsageError
from model_zoo.images.preprocessing import Preprocessing

SOURCES = ("timm", "torchvision", "robustbench", "hf-hub", "open_clip", "transformers", "bundled", "file")
TRAININGS = ("standard", "robust", "certified", "unknown")
FILE_OPTIONS = (
    "arch",
    "num_classes",
    "mean",
    "std",
    "shape",
    "key",
    "resize",
    "crop",
    "interpolation",
    "classes",
    "name",
    "training",
    "trained_eps",
    "trained_norm",
    "family",
    "sha256",
)
TOWER_OPTIONS = ("classes", "templates", "head", "name", "training", "trained_eps", "trained_norm", "family")
"""Options of image towers: a zero-shot head from class names or a saved matrix, and what is known of the training."""
_OPTIONS = {"file": FILE_OPTIONS, "open_clip": TOWER_OPTIONS, "transformers": TOWER_OPTIONS}
_WITH_PATHS = tuple(_OPTIONS)  # sources whose targets may be paths
GRAMMAR = {
    "timm": "timm:<name>",
    "torchvision": "torchvision:<arch>/<weights>",
    "robustbench": "robustbench:<dataset>/<threat>/<id>",
    "hf-hub": "hf-hub:<org>/<repo>",
    "open_clip": "open_clip:<name>/<pretrained or file>",
    "transformers": "transformers:<repo or folder>",
    "bundled": "bundled:<id>",
    "file": "file:<path>?arch=<model ref or path.py:factory>&num_classes=10&mean=..&std=..",
}
_TARGET_COMPONENTS = {"timm": (1, 1), "torchvision": (1, 2), "robustbench": (3, 3), "hf-hub": (2, 2), "bundled": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class PublishedNumber:
    """A published number: metric name, value as a fraction in [0, 1], and its source."""

    metric: str
    value: float
    source: str


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """Origin, training and provenance of a model.

    `trained_eps` is in pixel units of images in [0, 1] (0.0 for standard or unknown training); `pinned` is whether
    the hash of the weights was compared with a published one; `renames` lists every unwrapping and renaming of keys;
    `code_sha256` is the hash of the user's factory file where one was run.
    """

    ref: str
    name: str
    source: str
    architecture: str = ""
    family: str = ""
    dataset: str = ""
    training: str = "unknown"
    trained_norm: str = ""
    trained_eps: float = 0.0
    weights_sha256: str = ""
    pinned: bool = False
    licence: str = ""
    reference: str = ""
    published: tuple[PublishedNumber, ...] = ()
    renames: tuple[str, ...] = ()
    code_trusted: bool = False
    code_sha256: str = ""

    @property
    def published_on(self) -> str:
        """The data set that the published numbers are for; RobustBench evaluates on a part of ImageNet."""
        part = self.source == "robustbench" and self.dataset == "imagenet"
        return "imagenet:robustbench-5k" if part else self.dataset


@dataclass(frozen=True, kw_only=True)
class PretrainedFacts:
    """Metadata of pretrained weights in a library: location, input images, training."""

    name: str
    family: str
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    url: str = ""
    hub_repo: str = ""
    hub_file: str = ""
    tag: str = ""
    licence: str = ""
    reference: str = ""
    fixed_size: bool = False
    accuracy: float | None = None
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRef:
    """A parsed model reference: source, target within the source, and options."""

    source: str
    target: str
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def parse_ref(ref: str) -> ModelRef:
    """Split a model reference into source, target and options.

    Raises UnknownNameError for an unknown source or option, UsageError for a malformed reference.

    >>> parse_ref("torchvision:resnet18/IMAGENET1K_V1").target
    'resnet18/IMAGENET1K_V1'
    """
    source, colon, rest = ref.partition(":")
    if not colon:
        forms = ", ".join(GRAMMAR.values())
        raise UsageError(f"model reference {ref!r} does not name its source; legal forms: {forms}")
    if source not in SOURCES:
        raise UnknownNameError("model source", source, SOURCES)
    target, mark, query = rest.partition("?")
    _check_target(ref, source, target)
    options = _parse_options(ref, source, query) if mark else {}
    return ModelRef(source, unquote(target) if source in _WITH_PATHS else target, MappingProxyType(options))


def is_model_ref(text: str) -> bool:
    """Return whether a string starts with the name of a model source."""
    return text.partition(":")[0] in SOURCES


def _check_target(ref: str, source: str, target: str) -> None:
    """Raise UsageError where the target does not have the number of path components of its source."""
    low, high = _TARGET_COMPONENTS.get(source, (1, 10**6))
    parts = target.split("/")
    named = target if source in _WITH_PATHS else all(part not in ("", ".", "..") for part in parts)
    if not named or not low <= len(parts) <= high or "\\" in target or "\0" in target:
        raise UsageError(f"model reference {ref!r} is malformed; write {GRAMMAR[source]}")


def _parse_options(ref: str, source: str, query: str) -> dict[str, str]:
    legal = _OPTIONS.get(source, ())
    options: dict[str, str] = {}
    for item in query.split("&"):
        name, equals, value = item.partition("=")
        if name not in legal:
            raise UnknownNameError(f"option of a {source}: reference", name, legal)
        if not equals or not value:
            raise UsageError(f"option {name!r} of {ref!r} has no value; write {name}=...")
        if name in options:
            raise UsageError(f"option {name!r} is given twice in {ref!r}; give it once")
        options[name] = unquote(value)
    return options


def parse_fraction(text: str, name: str) -> float:
    """Parse a finite number written as a decimal or a fraction; raises UsageError for anything else.

    >>> parse_fraction("8/255", "trained_eps")
    0.03137254901960784
    """
    try:
        value = float(Fraction(text.strip())) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        message = f"{name}={text!r} is not a number; write a decimal or a fraction such as 8/255"
        raise UsageError(message) from error
    if not math.isfinite(value):
        raise UsageError(f"{name}={text!r} is not finite; write a decimal or a fraction such as 8/255")
    return value
