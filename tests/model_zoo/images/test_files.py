"""Images in user files: folders, npz archives, parquet files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from audit.errors import EnvironmentFault, UsageError
from model_zoo.images.datasets import ImageRequest, ImageSet, load_images

RNG = np.random.default_rng(0)


def _pixels(*shape: int) -> "np.ndarray[Any, Any]":
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def _check_contract(images: ImageSet) -> None:
    assert images.images.dtype == torch.float32
    assert images.labels.dtype == torch.int64
    assert images.images.ndim == 4
    assert len(images.images) == len(images.labels) == len(images.indices)
    assert 0 <= float(images.images.min()) <= float(images.images.max()) <= 1
    assert len(images.sha256) == 64


def _folder(path: Path, size: int = 6, mode: str = "RGB") -> Path:
    for name, count in (("cat", 3), ("ant", 2), ("dog", 1)):
        (path / name).mkdir(parents=True)
        for number in range(count):
            colour = Image.fromarray(_pixels(size, size, 3)).convert(mode)
            colour.save(path / name / f"{number}.png")
    (path / "notes.txt").write_text("no class")
    return path


def test_a_folder_alternates_between_classes(tmp_path: Path) -> None:
    images = load_images(f"folder:{_folder(tmp_path / 'set')}")
    _check_contract(images)
    assert images.images.shape == (6, 3, 6, 6)
    assert images.classes == ("ant", "cat", "dog")
    assert images.labels.tolist() == [0, 1, 2, 0, 1, 1]
    assert images.indices == (0, 2, 5, 1, 3, 4)
    first = load_images(f"folder:{tmp_path / 'set'}", ImageRequest(count=2))
    assert first.classes == images.classes
    assert torch.equal(first.images, images.images[:2])


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    assert load_images(f"folder:{_folder(tmp_path / 'set', mode='L')}").images.shape == (6, 1, 6, 6)


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="does not exist; give a folder with one subfolder per class"):
        load_images(f"folder:{tmp_path / 'none'}")
    (tmp_path / "bare").mkdir()
    with pytest.raises(EnvironmentFault, match="has no images in class subfolders"):
        load_images(f"folder:{tmp_path / 'bare'}")
    path = _folder(tmp_path / "set")
    Image.fromarray(_pixels(9, 6, 3)).save(path / "dog" / "0.png")
    with pytest.raises(UsageError, match=r"ant/0\.png and .*dog/0\.png are 3x6x6 and 3x9x6"):
        load_images(f"folder:{path}")
    (path / "dog" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(EnvironmentFault, match=r"dog/0\.png cannot be decoded as an image"):
        load_images(f"folder:{path}")
    Image.fromarray(RNG.integers(0, 9, (6, 6)).astype(np.int32)).save(path / "dog" / "0.tif")
    (path / "dog" / "0.png").unlink()
    with pytest.raises(UsageError, match="has the pixel format I; store 8-bit"):
        load_images(f"folder:{path}")


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (5, 8, 8, 3), (5, 8, 8)])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64"])
def test_npz_layouts(tmp_path: Path, shape: tuple[int, ...], kind: str) -> None:
    pixels = _pixels(*shape) if kind == "uint8" else (_pixels(*shape) / 255).astype(kind)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array([0, 1, 2, 1, 0]))
    images = load_images(f"npz:{tmp_path / 'a.npz'}", ImageRequest(count=3))
    _check_contract(images)
    assert images.images.shape == (3, 1 if len(shape) == 3 else 3, 8, 8)
    assert images.classes == ("0", "1", "2")
    expected = pixels[1] / 255 if kind == "uint8" else pixels[1]
    found = images.images[1].numpy()
    found = found.transpose(1, 2, 0) if shape[-1] == 3 else found.squeeze() if len(shape) == 3 else found
    assert np.allclose(found, expected, atol=1e-6)


def _npz(path: Path, images: Any = None, labels: Any = None, **more: Any) -> str:
    images = _pixels(4, 3, 8, 8) if images is None else images
    labels = np.array([0, 1, 1, 0]) if labels is None else labels
    np.savez(path / "a.npz", images=images, labels=labels, **more)
    return f"npz:{path / 'a.npz'}"


def test_npz_class_names(tmp_path: Path) -> None:
    assert load_images(_npz(tmp_path, classes=np.array(["cat", "dog", "eel"]))).classes == ("cat", "dog", "eel")


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (np.full((4, 3, 8, 8), 254.0), None, r"range from 254 to 254 .*float images with max > 1\.5: divide by 255"),
        (np.full((4, 3, 8, 8), -2.0), None, "they seem to be normalised"),
        (np.full((4, 3, 8, 8), 1.01), None, "instead of .*; clip them"),
        (np.full((4, 3, 8, 8), np.nan), None, "values that are not finite"),
        (np.zeros((4, 3, 8, 8), np.int32), None, "are int32; store uint8, or floats"),
        (np.zeros((4, 3, 8, 3)), None, r"have the shape \(4, 3, 8, 3\); store"),
        (np.zeros((4, 5, 8, 8)), None, r"have the shape \(4, 5, 8, 8\); store"),
        (None, np.zeros(3, np.int64), r"labels of .* are int64 \(3,\) for 4 images"),
        (None, np.zeros(4), "labels of .* are float64"),
        (None, np.array([0, -1, 1, 0]), "range from -1 to 1, its classes are 0 to 1; number the classes from 0"),
    ],
)
def test_npz_faults(tmp_path: Path, images: Any, labels: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_images(_npz(tmp_path, images, labels))


def test_invalid_npz_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with pytest.raises(EnvironmentFault, match=r"npz file .* does not exist"):
        load_images(f"npz:{path}")
    path.write_bytes(b"not an archive")
    with pytest.raises(EnvironmentFault, match="is not an npz archive of plain arrays"):
        load_images(f"npz:{path}")
    np.savez(path, images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1))
    with pytest.raises(EnvironmentFault, match="is not an npz archive of plain arrays"):
        load_images(f"npz:{path}")
    np.savez(path, x=np.zeros(1), y=np.zeros(1))
    with pytest.raises(UsageError, match="needs the arrays 'images' and 'labels'; it has x, y"):
        load_images(f"npz:{path}")


def _png(size: int = 6) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_pixels(size, size, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(path: Path, column: str = "img", label: str = "label", names: Any = None, rows: Any = None) -> str:
    rows = [_png() for _ in range(5)] if rows is None else rows
    structs = [{"bytes": data, "path": None} for data in rows]
    table = pa.table({column: structs, label: pa.array([index % 3 for index in range(len(rows))], pa.int64())})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, path / "a.parquet", row_group_size=2)
    return f"parquet:{path / 'a.parquet'}"


@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_in_the_hugging_face_layout(tmp_path: Path, column: str) -> None:
    ref = _parquet(tmp_path, column, names=["cat", "dog", "eel", "fox"])
    images = load_images(ref, ImageRequest(count=4))
    _check_contract(images)
    assert images.images.shape == (4, 3, 6, 6)
    assert images.labels.tolist() == [0, 1, 2, 0]
    assert images.classes == ("cat", "dog", "eel", "fox")
    with pytest.raises(UsageError, match=r"6 images were asked for; .* has 5"):
        load_images(ref, ImageRequest(count=6))


def test_parquet_without_names_counts_all_labels(tmp_path: Path) -> None:
    assert load_images(_parquet(tmp_path), ImageRequest(count=1)).classes == ("0", "1", "2")


def test_parquet_faults(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"parquet file .* does not exist"):
        load_images(f"parquet:{tmp_path / 'none'}")
    (tmp_path / "b").write_bytes(b"not a parquet file")
    with pytest.raises(EnvironmentFault, match="cannot be read as a Hugging Face image parquet"):
        load_images(f"parquet:{tmp_path / 'b'}")
    with pytest.raises(UsageError, match="needs a column 'image' or 'img' and a column 'label'; it has photo, label"):
        load_images(_parquet(tmp_path, "photo"))
    with pytest.raises(UsageError, match="has no rows"):
        load_images(_parquet(tmp_path, rows=[], names=["a"]))
    with pytest.raises(EnvironmentFault, match=r"row 1 of .*a\.parquet cannot be decoded"):
        load_images(_parquet(tmp_path, rows=[_png(), b"junk"]))
    pq.write_table(pa.table({"img": ["a"], "label": [0]}), tmp_path / "c.parquet")
    with pytest.raises(EnvironmentFault, match="cannot be read as a Hugging Face image parquet"):
        load_images(f"parquet:{tmp_path / 'c.parquet'}")


def test_more_images_than_there_are_is_said_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [f"folder:{_folder(tmp_path / 'set')}", _parquet(tmp_path)]
    for module in ("files", "tables"):
        monkeypatch.setattr(f"model_zoo.images.{module}.decode", lambda *_, **__: pytest.fail("an image was decoded"))
    for ref, available in zip(refs, (6, 5), strict=True):
        with pytest.raises(UsageError, match=f"7 images were asked for; .* has {available}$"):
            load_images(ref, ImageRequest(count=7))
