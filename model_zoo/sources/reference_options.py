"""Read the options of model references: classes, image shape, preprocessing, normalisation, training."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from audit.errors import MismatchError, UnknownNameError, UsageError
from model_zoo.entries import TRAININGS, ModelEntry, parse_fraction
from model_zoo.images.classes import read_class_file
from model_zoo.images.preprocessing import Preprocessing, from_options
from model_zoo.model_types import ImageShape

_NORMS = ("linf", "l2", "l1")


def with_labels(entry: ModelEntry, options: Mapping[str, str]) -> ModelEntry:
    """Return an entry with the name, family and training that the options of a reference state.

    Raises UnknownNameError, UsageError for values that are not legal.
    """
    training, norm = parse_training(options)
    eps = parse_fraction(options.get("trained_eps", "0"), "trained_eps")
    entry = replace(entry, name=options.get("name", entry.name), family=options.get("family", entry.family))
    stated = "training" in options or norm or eps
    return replace(entry, training=training, trained_norm=norm, trained_eps=eps) if stated else entry


def parse_training(options: Mapping[str, str]) -> tuple[str, str]:
    """Return how a model was trained and the norm; raises UnknownNameError."""
    training, norm = options.get("training", "unknown"), options.get("trained_norm", "")
    if training not in TRAININGS:
        raise UnknownNameError("training", training, TRAININGS)
    if norm and norm not in _NORMS:
        raise UnknownNameError("trained_norm", norm, _NORMS)
    return training, norm


def parse_num_classes(text: str) -> int:
    """Return the number of classes, 0 for an encoder; raises UsageError."""
    if not text.isascii() or not text.isdigit() or int(text) == 1:
        message = f"num_classes={text!r} of a file: reference is not a number of at least 2; write num_classes=10"
        message += ", num_classes=2 for one output that decides between two classes"
        raise UsageError(f"{message}, or num_classes=0 for an encoder without a classifier")
    return int(text)


def parse_shape(text: str) -> ImageShape:
    """Return an image shape (C, H, W) written as `3x32x32`; raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"shape={text!r} is not channels x height x width; write shape=3x32x32")
    return int(parts[0]), int(parts[1]), int(parts[2])


def parse_images(options: Mapping[str, str]) -> tuple[ImageShape | None, Preprocessing | None]:
    """Return the shape of images and their resize and crop; raises UsageError where these do not fit each other."""
    shape = parse_shape(options["shape"]) if "shape" in options else None
    preprocessing = parse_preprocessing(options, shape)
    return shape or (preprocessing.shape if preprocessing else None), preprocessing


def parse_preprocessing(options: Mapping[str, str], shape: ImageShape | None) -> Preprocessing | None:
    """Return resize and crop; raises UsageError where they do not give images of the stated shape."""
    resize, crop, interpolation = (options.get(name, "") for name in ("resize", "crop", "interpolation"))
    found = from_options(resize, crop, interpolation, shape[0] if shape else 3)
    if found and shape and found.shape not in (None, shape):
        stated = "x".join(map(str, shape))
        raise UsageError(f"shape={stated} is not that of images with crop={options.get('crop', '')!r}; give one size")
    return found


def read_class_names(path: str, num_classes: int) -> tuple[str, ...]:
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


def parse_normalisation(mean: str, std: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of each channel, () without them; raises UsageError."""
    if not mean and not std:
        return (), ()
    means = tuple(parse_fraction(value, "mean") for value in mean.split(","))
    stds = tuple(parse_fraction(value, "std") for value in std.split(","))
    if len(means) != len(stds) or not all(value > 0 for value in stds):
        message = f"mean={mean!r} and std={std!r} do not fit"
        raise UsageError(f"{message}; give one number per channel in both, the std above 0")
    return means, stds
