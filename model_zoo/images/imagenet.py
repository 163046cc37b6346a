"""The ImageNet validation set as a named set: class folders, torchvision's layout, or Hugging Face shards.

Labels are places in the sorted list of the 1,000 classes, which is the order of the outputs of ImageNet networks.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from audit.errors import EnvironmentFault, MismatchError, UnknownNameError
from model_zoo.images.decoding import decode
from model_zoo.images.files import read_folder
from model_zoo.images.named import RawImages, check_count, stack
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.images.tables import read_parquet

SUBSETS = ("robustbench-5k",)
_FOLDERS = {"test": ("val", "validation", "."), "train": ("train",)}
_SHARDS = {"test": ("data/validation-*.parquet", "validation-*.parquet"), "train": ("data/train-*.parquet",)}
_CLASSES = 1000


def read_imagenet(
    data_dir: Path, subset: str, split: str, count: int | None, preprocessing: Preprocessing | None
) -> RawImages:
    """Return images of ImageNet below `data_dir`/imagenet; the split `test` is the validation set.

    `subset` is '' or `robustbench-5k`, the 5,000 images that RobustBench evaluates on, in its order. Class folders are
    read as torchvision does, without regard to EXIF orientation. Raises UnknownNameError for another subset,
    EnvironmentFault where no layout is found, MismatchError for folders that are no ImageNet classes.
    """
    from model_zoo.libraries import imagenet_names

    if subset and subset not in SUBSETS:
        raise UnknownNameError("subset of imagenet", subset, SUBSETS)
    root, wnids = data_dir / "imagenet", [wnid for wnid, _ in imagenet_names(_CLASSES)]
    for name in _FOLDERS[split]:
        folder = root / name
        if folder.is_dir() and any((folder / wnid).is_dir() for wnid in wnids):
            if subset:
                return _read_listed(folder, wnids, count, preprocessing)
            return _by_wnid(read_folder(folder, count, preprocessing, upright=False), wnids, folder)
    for pattern in _SHARDS[split]:
        if not subset and any(root.glob(pattern)):
            found = read_parquet(root / pattern, count, preprocessing)
            if found.numbered or len(found.classes) == _CLASSES:
                return replace(found, classes=tuple(wnids), numbered=False)
            raise MismatchError(f"{root / pattern} has {len(found.classes)} classes; ImageNet has {_CLASSES}")
    message = f"no ImageNet images are below {root}"
    raise EnvironmentFault(f"{message}; put class folders (val/n01440764/...) or Hugging Face shards (data/...) there")


def _by_wnid(found: RawImages, wnids: list[str], folder: Path) -> RawImages:
    """Number the labels of class folders, which may be some of the classes, as ImageNet does."""
    position = {wnid: place for place, wnid in enumerate(wnids)}
    foreign = [name for name in found.classes if name not in position]
    if foreign:
        raise MismatchError(f"{folder / foreign[0]} is no ImageNet class; its folders are named {wnids[0]}, ...")
    places = torch.tensor([position[name] for name in found.classes])
    return replace(found, labels=places[found.labels], classes=tuple(wnids))


def _read_listed(folder: Path, wnids: list[str], count: int | None, preprocessing: Preprocessing | None) -> RawImages:
    """Return the images that RobustBench lists, in its order."""
    from model_zoo.libraries import robustbench_image_ids

    ids = robustbench_image_ids()
    position = {wnid: place for place, wnid in enumerate(wnids)}
    check_count(count, len(ids), "imagenet:robustbench-5k")
    chosen = list(islice(ids, count))
    absent = next((name for name in chosen if not (folder / name).is_file()), None)
    if absent:
        raise EnvironmentFault(f"{folder / absent}, which RobustBench lists, does not exist; put the whole set there")
    decoded = ((name, decode(str(folder / name), folder / name, preprocessing, upright=False)) for name in chosen)
    pixels = stack(decoded, len(chosen))
    labels = torch.tensor([position[Path(name).parent.name] for name in chosen])
    return RawImages(pixels, labels, tuple(wnids), tuple(range(len(chosen))), len(ids))
