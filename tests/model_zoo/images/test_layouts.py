"""Labels and layouts that were read as something else: floats, lists, labels from 1, nested folders, npy pairs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from audit.errors import EnvironmentFault, UnsafeError, UsageError
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.lookup import check_dataset

RNG = np.random.default_rng(0)


def _pixels(*shape: int) -> "np.ndarray[Any, Any]":
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def _png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def _parquet(path: Path, labels: list[Any], name: str = "a.parquet") -> str:
    buffer = io.BytesIO()
    Image.fromarray(_pixels(4, 4, 3)).save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None} for _ in labels]
    pq.write_table(pa.table({"image": rows, "label": labels}), path / name)
    return f"parquet:{path / name}"


@pytest.mark.parametrize("labels", [[0.0, 2.7, 1.0], [0.5, 0.0, 1.0], [0.0, float("nan"), 1.0], [0.0, None, 1.0]])
def test_labels_that_are_no_whole_numbers_are_refused(tmp_path: Path, labels: list[Any]) -> None:
    (wrong,) = [label for label in labels if label not in (0.0, 1.0)]
    with pytest.raises(UsageError, match=rf"label {wrong} of row \d of .*a\.parquet is not a whole number; store one"):
        load_images(_parquet(tmp_path, labels))


@pytest.mark.parametrize("labels", [[0.0, 2.0, 1.0], [[0], [2], [1]], [[0.0], [2.0], [1.0]]])
def test_whole_numbers_and_lists_of_one_are_labels(tmp_path: Path, labels: list[Any]) -> None:
    found = load_images(_parquet(tmp_path, labels)).labels
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 2, 1]


@pytest.mark.parametrize("labels", [["cat", "dog"], [[0, 1], [1, 0]], [[], [0]]])
def test_other_labels_are_refused(tmp_path: Path, labels: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"of row 0 of .* is not a whole number; store one class an image"):
        load_images(_parquet(tmp_path, labels))


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32])
def test_npz_labels_in_a_column_are_labels(tmp_path: Path, kind: Any) -> None:
    np.savez(tmp_path / "a.npz", images=_pixels(3, 4, 4), labels=np.array([[0], [2], [1]], kind))
    assert load_images(f"npz:{tmp_path / 'a.npz'}").labels.tolist() == [0, 2, 1]


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_labels_that_count_from_one_are_refused(tmp_path: Path, classes: int) -> None:
    labels = np.arange(1, classes + 1)
    sentence = rf"range from 1 to {classes}, which counts the classes from 1; number the classes from 0"
    np.savez(tmp_path / "a.npz", images=_pixels(classes, 4, 4), labels=labels)
    with pytest.raises(UsageError, match=sentence):
        load_images(f"npz:{tmp_path / 'a.npz'}", ImageRequest(count=1))
    with pytest.raises(UsageError, match=sentence):
        load_images(_parquet(tmp_path, labels.tolist()))


@pytest.mark.parametrize("labels", [[1, 3, 7], [1, 1, 1], [0, 1, 2]])
def test_a_sample_may_lack_classes(tmp_path: Path, labels: list[int]) -> None:
    found = load_images(_parquet(tmp_path, labels))
    assert found.labels.tolist() == labels
    assert len(found.classes) == max(labels) + 1


def test_named_classes_may_lack_the_first(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=_pixels(2, 4, 4), labels=np.array([1, 2]), classes=np.array(["a", "b", "c"]))
    assert load_images(f"npz:{tmp_path / 'a.npz'}").labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    "files",
    [
        ["cat/1.png", "cat/indoors/2.png", "dog/1.png"],
        ["cat/a/b/1.png", "cat/a/2.png", "dog/c/1.png"],
        ["cat/2.png", "cat/10/1.png", "dog/1.png", "dog/x/1.png"],
    ],
)
def test_nested_class_folders_keep_all_images(tmp_path: Path, files: list[str]) -> None:
    from torchvision.datasets import ImageFolder

    for number, name in enumerate(files):
        _png(tmp_path / name, number)
    found = load_images(f"folder:{tmp_path}")
    own = ImageFolder(str(tmp_path))
    by_position = sorted(zip(found.indices, found.labels.tolist(), found.images, strict=True), key=lambda row: row[0])
    assert [label for _, label, _ in by_position] == own.targets
    for (_, _, image), (expected, _) in zip(by_position, own, strict=True):
        assert np.array_equal(np.asarray((image * 255).round().byte().permute(1, 2, 0)), np.asarray(expected))


def test_circles_of_links_are_followed_once(tmp_path: Path) -> None:
    _png(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat", target_is_directory=True)
    assert len(load_images(f"folder:{tmp_path}").images) == 1


def test_empty_class_folders_are_classes_without_images(tmp_path: Path) -> None:
    _png(tmp_path / "cat" / "1.png")
    (tmp_path / "bat").mkdir()
    found = load_images(f"folder:{tmp_path}")
    assert (found.classes, found.labels.tolist()) == (("bat", "cat"), [1])


@pytest.mark.parametrize("name", ["a.heic", "a.npy", "a.txt"])
def test_class_folders_of_other_files_are_refused(tmp_path: Path, name: str) -> None:
    _png(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"class folder .*dog has 1 files, such as {name}, and no images; legal end"):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("splits", [("train", "val"), ("test", "train"), ("validation",)])
def test_splits_are_not_read_as_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        for name in ("cat", "dog"):
            _png(tmp_path / split / name / "1.png")
    with pytest.raises(
        UsageError, match=rf"holds the splits .*not classes; name one of them, such as folder:.*{splits[-1]}"
    ):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 3, 8, 8), (4, 8, 8)])
def test_an_npy_file_is_read_with_the_labels_beside_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The layout of CIFAR-10-C: one array a corruption, and labels.npy."""
    pixels, labels = _pixels(*shape), np.array([2, 0, 1, 2], np.uint8)
    np.save(tmp_path / "fog.npy", pixels)
    np.save(tmp_path / "labels.npy", labels)
    check_dataset(f"npy:{tmp_path / 'fog.npy'}")
    found = load_images(f"npy:{tmp_path / 'fog.npy'}", ImageRequest(count=3))
    assert found.labels.tolist() == [2, 0, 1]
    assert found.classes == ("0", "1", "2")
    first = torch.from_numpy(pixels[:3].copy())
    expected = first[:, None] if first.ndim == 3 else first.permute(0, 3, 1, 2) if shape[-1] == 3 else first
    assert torch.equal(found.images, expected.float() / 255)


def test_faults_of_npy_pairs(tmp_path: Path) -> None:
    ref = f"npy:{tmp_path / 'fog.npy'}"
    with pytest.raises(EnvironmentFault, match=r"npy file .*fog\.npy does not exist"):
        load_images(ref)
    np.save(tmp_path / "fog.npy", _pixels(4, 8, 8, 3))
    with pytest.raises(
        EnvironmentFault, match=r"the labels of .*fog\.npy are not beside it; put an array .*labels\.npy"
    ):
        load_images(ref)
    np.save(tmp_path / "labels.npy", np.zeros(5, np.int64))
    with pytest.raises(UsageError, match=r"labels of .* are int64 \(5,\) for 4 images"):
        load_images(ref)
    with pytest.raises(UsageError, match=r"names the labels; name the images beside them"):
        load_images(f"npy:{tmp_path / 'labels.npy'}")
    np.save(tmp_path / "labels.npy", np.array([{}], dtype=object))
    with pytest.raises(EnvironmentFault, match=r"labels\.npy is not an npy file of a plain array"):
        load_images(ref)
    (tmp_path / "fog.npy").write_bytes(b"not an array")
    with pytest.raises(EnvironmentFault, match=r"fog\.npy is not an npy file of a plain array"):
        load_images(ref)


@pytest.mark.parametrize("count", [100, 3000, 60_000])
def test_black_images_are_no_bomb(tmp_path: Path, count: int) -> None:
    labels = np.arange(count) % 10
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((count, 28, 28), np.uint8), labels=labels)
    assert len(load_images(f"npz:{tmp_path / 'a.npz'}", ImageRequest(count=5)).images) == 5


def test_an_archive_far_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((350_000, 28, 28), np.uint8), labels=np.zeros(1, np.int64))
    with pytest.raises(UnsafeError, match="unpacks to"):
        load_images(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("value", [1.0000001, 1.000001, -1e-7])
def test_values_outside_by_rounding_are_clipped(tmp_path: Path, value: float) -> None:
    images = np.full((3, 1, 4, 4), 0.5, np.float64)
    images[0, 0, 0, 0] = value
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2]))
    found = load_images(f"npz:{tmp_path / 'a.npz'}").images
    assert float(found[0, 0, 0, 0]) == min(max(value, 0.0), 1.0)
    assert float(found.flatten()[1:].min()) == float(found.flatten()[1:].max()) == 0.5


@pytest.mark.parametrize(("value", "shown"), [(1.0001, r"1\.0001"), (1.00002, r"1\.00002"), (-0.0001, r"-0\.0001")])
def test_a_range_is_told_to_the_digit_that_is_wrong(tmp_path: Path, value: float, shown: str) -> None:
    images = np.full((3, 1, 4, 4), 0.5)
    images[0, 0, 0, 0] = value
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2]))
    with pytest.raises(UsageError, match=rf"range from .*{shown}.* instead of \[0, 1\]; clip them"):
        load_images(f"npz:{tmp_path / 'a.npz'}")


@pytest.mark.parametrize("form", ["{folder}", "{folder}/data", "{folder}/data/validation-*.parquet"])
def test_shards_of_one_split_are_one_set(tmp_path: Path, form: str) -> None:
    (tmp_path / "data").mkdir()
    for number, labels in enumerate([[0, 1], [2, 0, 1]]):
        _parquet(tmp_path / "data", labels, f"validation-0000{number}-of-00002.parquet")
    ref = f"parquet:{form.format(folder=tmp_path)}"
    check_dataset(ref)
    assert load_images(ref).labels.tolist() == [0, 1, 2, 0, 1]
    assert load_images(ref, ImageRequest(count=3)).labels.tolist() == [0, 1, 2]


def test_folders_of_parquet_files_that_name_no_one_set(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="holds no parquet files"):
        load_images(f"parquet:{tmp_path}")
    for split in ("train", "validation"):
        _parquet(tmp_path, [0, 1], f"{split}-00000-of-00001.parquet")
    with pytest.raises(UsageError, match=r"holds the splits train, validation; name one, such as .*validation-\*"):
        load_images(f"parquet:{tmp_path}")
    with pytest.raises(EnvironmentFault, match=r"parquet file .* does not exist"):
        load_images(f"parquet:{tmp_path}/test-*.parquet")
