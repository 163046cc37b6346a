"""Relative paths of references: as they stand, else in the folder of the file that names them."""

from pathlib import Path

import pytest

from model_zoo.entries import parse_ref
from model_zoo.relative import beside, dataset_beside, model_beside


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, beside the working folder, which has one of the same names."""
    (tmp_path / "work").mkdir()
    files = tmp_path / "files"
    (files / "photos").mkdir(parents=True)
    for name in ("net.pth", "nets.py", "names.txt", "a-0.parquet", "both.npz", "map.json"):
        (files / name).touch()
    (tmp_path / "work" / "both.npz").touch()
    monkeypatch.chdir(tmp_path / "work")
    return files


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("net.pth", "files/net.pth"),
        ("photos/../net.pth", "files/net.pth"),
        ("photos", "files/photos"),
        ("a-*.parquet", "files/a-*.parquet"),
        ("both.npz", None),  # the working folder comes first
        ("neither.npz", None),
        ("/neither.npz", None),
        ("", None),
    ],
)
def test_a_path_is_looked_for_in_the_folder_last(path: str, found: str | None, folder: Path) -> None:
    assert beside(path, folder) == (path if found is None else str(folder.parent / found))
    assert beside(path, None) == path


def test_weights_factory_and_class_names_of_a_model(folder: Path) -> None:
    ref = parse_ref("file:net.pth?arch=nets.py:make&num_classes=10&classes=names.txt")
    found = model_beside(ref, folder)
    assert found.target == str(folder / "net.pth")
    assert dict(found.options) == {
        "arch": f"{folder / 'nets.py'}:make",
        "num_classes": "10",
        "classes": str(folder / "names.txt"),
    }
    assert model_beside(ref, None) == ref


@pytest.mark.parametrize("ref", ["timm:resnet18", "bundled:net.pth", "file:both.npz?arch=timm:resnet18&num_classes=2"])
def test_other_references_stay(ref: str, folder: Path) -> None:
    assert model_beside(parse_ref(ref), folder) == parse_ref(ref)


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        ("folder:photos", "folder:{}/photos"),
        ("folder:photos?classes=map.json", "folder:{0}/photos?classes={0}/map.json"),
        ("parquet:a-*.parquet", "parquet:{}/a-*.parquet"),
        ("imagenet?classes=map.json", "imagenet?classes={}/map.json"),
        ("npz:both.npz", "npz:both.npz"),
        ("digits", "digits"),
        ("folder:", "folder:"),
    ],
)
def test_paths_of_data_sets(ref: str, found: str, folder: Path) -> None:
    assert dataset_beside(ref, folder) == found.format(folder)
