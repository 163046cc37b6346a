"""Read a folder of image files with one subfolder per class."""

import os
from itertools import islice, zip_longest
from pathlib import Path

import torch

from audit.errors import EnvironmentFault, UsageError
from model_zoo.images.decoding import decode
from model_zoo.images.named import RawImages, check_count, stack
from model_zoo.images.preprocessing import Preprocessing

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read_folder(
    path: Path, count: int | None, preprocessing: Preprocessing | None = None, *, upright: bool = True
) -> RawImages:
    """Return the images of a folder with one subfolder per class, alternating between the classes.

    A class takes the images of its subfolder at any depth, as in torchvision's ImageFolder; hidden files are left out.
    Images are turned upright by their EXIF orientation, as by the `imagefolder` of `datasets`, unless `upright` is
    false. Raises EnvironmentFault for a folder without such images, UsageError for images of unequal size, a class
    whose files are no images, and splits in the place of classes.
    """
    if not path.is_dir():
        raise EnvironmentFault(f"folder {path} does not exist; give a folder with one subfolder per class")
    folders = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    _refuse_splits(path, folders)
    listed = [_images_below(folder) for folder in folders]
    files = [(file, label) for label, members in enumerate(listed) for file in members]
    if not files:
        raise EnvironmentFault(f"folder {path} has no images in class subfolders ({', '.join(_SUFFIXES)})")
    check_count(count, len(files), f"folder {path}")
    position = {file: index for index, (file, _) in enumerate(files)}
    turns = ((file, label) for turn in zip_longest(*listed) for label, file in enumerate(turn) if file is not None)
    chosen = list(islice(turns, count))
    decoded = ((str(file), decode(str(file), file, preprocessing, upright=upright)) for file, _ in chosen)
    pixels = stack(decoded, len(chosen))
    labels = torch.tensor([label for _, label in chosen])
    classes = tuple(folder.name for folder in folders)
    return RawImages(pixels, labels, classes, tuple(position[file] for file, _ in chosen), len(files))


def _images_below(folder: Path) -> list[Path]:
    """Return the image files of a class at any depth, folder by folder, each in the order of names."""
    files = [Path(root) / name for root in _folders_below(folder) for name in sorted(os.listdir(root))]
    files = [file for file in files if not file.name.startswith(".") and not file.is_dir()]
    found = [file for file in files if file.suffix.lower() in _SUFFIXES]
    if files and not found:
        message = f"class folder {folder} has {len(files)} files, such as {files[0].name}, and no images"
        raise UsageError(f"{message}; legal endings are {', '.join(_SUFFIXES)}")
    return found


def _folders_below(folder: Path) -> list[str]:
    """Return the folders below one, itself included, without hidden ones; a circle of links is followed once."""
    found: dict[str, str] = {}
    for root, inner, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        inner[:] = [] if real in found else [name for name in inner if not name.startswith(".")]
        found.setdefault(real, root)
    return sorted(found.values())


def _refuse_splits(path: Path, folders: list[Path]) -> None:
    """Raise UsageError where the subfolders are splits that hold the classes: they would be read as classes."""
    if not folders or not {folder.name.lower() for folder in folders} <= _SPLITS:
        return
    if all(any(child.is_dir() for child in folder.iterdir()) for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        message = f"folder {path} holds the splits {names}, not classes"
        raise UsageError(f"{message}; name one of them, such as folder:{folders[-1]}")
