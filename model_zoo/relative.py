"""Relative paths of references: as they stand where they exist, else beside the file that names them."""

from dataclasses import replace
from glob import glob
from pathlib import Path
from types import MappingProxyType

from model_zoo.entries import ModelRef

Folders = Path | tuple[Path, ...] | None
"""A folder in which paths are looked for that do not exist as they stand; folders of a tuple come before those."""

_CLASSES = "?classes="
_FILES = ("classes", "templates", "head")  # options that name a file
_PATHS = ("folder", "parquet", "npz", "npy")


def beside(path: str, folder: Folders) -> str:
    """Return a path inside a folder if it exists only there, or inside the first of several; others unchanged."""
    if folder is None or not path or Path(path).is_absolute() or (isinstance(folder, Path) and Path(path).exists()):
        return path
    for each in (folder,) if isinstance(folder, Path) else folder:
        found = each / path
        if found.exists() or ("*" in found.name and any(found.parent.glob(found.name))):
            return str(found.resolve())
    return path


def matching_files(pattern: str, folder: Folders) -> list[str]:
    """Return the relative or absolute paths of the files that match a pattern, in the first folder that has any."""
    places = (None, folder) if isinstance(folder, Path) else (*(folder or ()), None)
    for place in places:
        names = sorted(name for name in glob(pattern, root_dir=place) if Path(place or "", name).is_file())
        if names:
            return names
    return []


def model_beside(ref: ModelRef, folder: Folders) -> ModelRef:
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


def dataset_beside(ref: str, folder: Folders) -> str:
    """Return a data set reference whose path and class map are looked for in a folder too."""
    name, mark, classes = ref.partition(_CLASSES)
    prefix, colon, path = name.partition(":")
    if colon and prefix in _PATHS:
        name = f"{prefix}:{beside(path, folder)}"
    return f"{name}{mark}{beside(classes, folder)}"
