"""The classes of transformers by name: which network a configuration stands for."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from audit.errors import EnvironmentFault, UnknownNameError, UsageError
from model_zoo.untrusted import printable, reason

_TOWERS = ("VisionModelWithProjection", "VisionModel")


class Architecture(NamedTuple):
    """The class of a network, its settings and number of classes; the features of an encoder, 0 for a classifier."""

    kind: type[nn.Module]
    settings: Any
    classes: int
    features: int
    whole: Any


@contextmanager
def quietly() -> Iterator[Any]:
    """Give the library, without the warnings and progress bars of loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            library = import_module("transformers")
        except ImportError as error:
            message = "transformers: references need transformers, which is not installed"
            raise EnvironmentFault(f"{message}; pip install 'rvaudit[transformers]'") from error
        before = library.utils.logging.get_verbosity()
        bars = library.utils.logging.is_progress_bar_enabled()
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
        try:
            yield library
        finally:
            library.utils.logging.set_verbosity(before)
            if bars:
                library.utils.logging.enable_progress_bar()


def find_architecture(config: Mapping[str, Any], name: str) -> Architecture:
    """Return the network of a configuration: a classifier of images, an encoder, or the image tower of a pair."""
    kinds = config.get("architectures") or [""]
    kind_name = kinds[0] if isinstance(kinds, list) and isinstance(kinds[0], str) else ""
    with quietly() as library:
        if config.get("model_type") not in library.CONFIG_MAPPING:
            known = sorted(library.CONFIG_MAPPING.keys())
            raise UnknownNameError(f"model_type of {name}", str(config.get("model_type")), known)
        try:
            settings = library.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        except Exception as error:  # untrusted values can fail in any line of a constructor
            raise UsageError(f"config.json of {name} is refused by transformers: {reason(error)}") from error
        inner = getattr(settings, "vision_config", None)
        if inner is not None and not kind_name.endswith("ForImageClassification"):
            tower = _tower(library, kind_name, name)
            return Architecture(tower, inner, 0, _tower_features(tower, inner), settings)
        kind: Any = getattr(library, kind_name, None) if kind_name.isidentifier() else None
        if not (isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)):
            raise UnknownNameError(f"architecture of {name}", kind_name, _known_networks(library))
        if getattr(kind, "main_input_name", "") != "pixel_values":
            raise UsageError(f"{name} is a {kind_name}, which does not take images")
        if "ForImageClassification" in kind_name:
            return Architecture(kind, settings, int(settings.num_labels), 0, settings)
        return Architecture(kind, settings, 0, _tower_features(kind, settings), settings)


def _tower(library: Any, kind_name: str, name: str) -> type[nn.Module]:
    """Return the class of the image tower of a pair such as CLIPModel or SiglipModel."""
    family = kind_name.removesuffix("Model").removesuffix("VisionModelWithProjection").removesuffix("Vision")
    for end in _TOWERS:
        found = getattr(library, family + end, None) if family.isidentifier() else None
        if isinstance(found, type) and issubclass(found, library.PreTrainedModel):
            return found
    raise UsageError(f"{name} is a {printable(kind_name, 60)}, whose image tower transformers does not have by itself")


def _known_networks(library: Any) -> list[str]:
    auto = library.models.auto.modeling_auto
    found = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    return [name for each in found.values() for name in ((each,) if isinstance(each, str) else each)]


def _tower_features(kind: type[nn.Module], settings: Any) -> int:
    names = ("projection_dim",) if kind.__name__.endswith("WithProjection") else ("hidden_size", "embed_dim")
    sizes = getattr(settings, "hidden_sizes", None)
    found = next((getattr(settings, each) for each in names if getattr(settings, each, None)), None)
    return int(found or (sizes[-1] if sizes else 0))
