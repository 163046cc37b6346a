"""ImageNet as a named set: torchvision's layout, class folders, Hugging Face shards, RobustBench's list."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from audit.errors import EnvironmentFault, MismatchError, UnknownNameError
from model_zoo import libraries
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.libraries import imagenet_names
from model_zoo.lookup import check_dataset

WNIDS = [wnid for wnid, _ in imagenet_names(1000)]
CHOSEN = ("n01443537", "n01440764", "n15075141")  # places 1, 0, 999
SMALL = Preprocessing(resize=(8,), crop=(8, 8))


def _image(seed: int, size: tuple[int, int] = (9, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def _folders(root: Path) -> None:
    for number, wnid in enumerate(CHOSEN):
        (root / wnid).mkdir(parents=True)
        _image(number, (9 + number, 12)).save(root / wnid / f"ILSVRC2012_val_{number:08d}.JPEG")


def _request(folder: Path, split: str = "test", count: int | None = None) -> ImageRequest:
    return ImageRequest(count, split, data_dir=folder, preprocessing=SMALL)


@pytest.mark.parametrize("below", ["imagenet/val", "imagenet/validation", "imagenet"])
def test_class_folders_are_numbered_among_all_classes(tmp_path: Path, below: str) -> None:
    check_dataset("imagenet")
    _folders(tmp_path / below)
    found = load_images("imagenet", _request(tmp_path))
    assert found.images.shape == (3, 3, 8, 8)
    assert found.classes == tuple(WNIDS)
    assert [WNIDS[label] for label in found.labels] == sorted(CHOSEN)
    first = load_images("imagenet", _request(tmp_path, count=2))
    assert torch.equal(first.images, found.images[:2])


def test_the_training_split_is_another_folder(tmp_path: Path) -> None:
    _folders(tmp_path / "imagenet" / "train")
    assert load_images("imagenet", _request(tmp_path, "train")).labels.tolist() == [0, 1, 999]
    with pytest.raises(EnvironmentFault, match=r"no ImageNet images are below .*imagenet; put class folders"):
        load_images("imagenet", _request(tmp_path))


@pytest.mark.parametrize("below", ["data", "."])
def test_shards_of_the_hub(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "imagenet" / below
    folder.mkdir(parents=True, exist_ok=True)
    names = [text for _, text in imagenet_names(1000)]
    for shard, labels in enumerate([[7, 999], [0]]):
        rows = []
        for label in labels:
            buffer = io.BytesIO()
            _image(label).save(buffer, "PNG")
            rows.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": rows, "label": labels})
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"validation-0000{shard}-of-00002.parquet")
    found = load_images("imagenet", _request(tmp_path))
    assert found.labels.tolist() == [7, 999, 0]
    assert found.classes == tuple(WNIDS)


def test_folders_that_are_no_classes_are_named(tmp_path: Path) -> None:
    _folders(tmp_path / "imagenet" / "val")
    (tmp_path / "imagenet" / "val" / "extras").mkdir()
    with pytest.raises(
        MismatchError, match=r"val/extras is no ImageNet class; its folders are named n01440764, \.\.\."
    ):
        load_images("imagenet", _request(tmp_path))


def test_orientation_is_ignored_as_by_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet" / "val" / CHOSEN[0]
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6
    _image(0).save(folder / "a.png", exif=exif)
    found = load_images("imagenet", ImageRequest(data_dir=tmp_path)).images[0]
    assert np.array_equal(np.asarray((found * 255).round().byte().permute(1, 2, 0)), np.asarray(_image(0)))


def test_the_list_of_robustbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_dataset("imagenet:robustbench-5k")
    ids = libraries.robustbench_image_ids()
    assert (len(ids), len(set(ids))) == (5000, 5000)
    assert {name.partition("/")[0] for name in ids} <= set(WNIDS)
    _folders(tmp_path / "imagenet" / "val")
    listed = [f"{CHOSEN[2]}/ILSVRC2012_val_00000002.JPEG", f"{CHOSEN[0]}/ILSVRC2012_val_00000000.JPEG"]
    monkeypatch.setattr(libraries, "robustbench_image_ids", lambda: listed)
    found = load_images("imagenet:robustbench-5k", _request(tmp_path))
    assert found.labels.tolist() == [999, 1]
    every = load_images("imagenet", _request(tmp_path))
    assert torch.equal(found.images, every.images[[2, 1]])
    listed.append(f"{CHOSEN[0]}/other.JPEG")
    with pytest.raises(EnvironmentFault, match=r"other\.JPEG, which RobustBench lists, does not exist"):
        load_images("imagenet:robustbench-5k", _request(tmp_path))
    with pytest.raises(UnknownNameError, match="unknown subset of imagenet 'robustbench-50k'; did you mean"):
        load_images("imagenet:robustbench-50k", _request(tmp_path))
