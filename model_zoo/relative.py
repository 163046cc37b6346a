"""Relative paths of references: as they stand where they exist, else beside the file that names them."""

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from model_zoo.entries import ModelRef

_CLASSES = "?classes="
_FILES = ("classes", "templates", "head")  # options that name a file
_PATHS = ("folder", "parquet", "npz", "npy")


def beside(path: str, folder: Path | None) -> str:
    """Return a path inside a folder if it exists only there; any other path unchanged."""
    if folder is None or not path or Path(path).is_absolute() or Path(path).exists():
        return path
    found = folder / path
    exists = found.exists() or ("*" in found.name and any(found.parent.glob(found.name)))
    return str(found.resolve()) if exists else path


def model_beside(ref: ModelRef, folder: Path | None) -> ModelRef:
    """Return a model reference whose weights, factory and class names are looked for in a folder too."""
    if ref.source not in ("file", "open_clip", "transformers"):
        return ref
    options = dict(ref.options)
    for name in _FILES:
        if name in options:
            options[name] = beside(options[name], folder)
    name, slash, file = ref.target.partition("/")
    if ref.source == "open_clip" and (found := beside(file, folder)) != file:
        return replace(ref, target=f"{name}{slash}{found}", options=MappingProxyType(options))
    code, colon, factory = options.get("arch", "").rpartition(":")
    if colon and code.endswith(".py"):
        options["arch"] = f"{beside(code, folder)}:{factory}"
    return replace(ref, target=beside(ref.target, folder), options=MappingProxyType(options))


def dataset_beside(ref: str, folder: Path | None) -> str:
    """Return a data set reference whose path and class map are looked for in a folder too."""
    name, mark, classes = ref.partition(_CLASSES)
    prefix, colon, path = name.partition(":")
    if colon and prefix in _PATHS:
        name = f"{prefix}:{beside(path, folder)}"
    return f"{name}{mark}{beside(classes, folder)}"
