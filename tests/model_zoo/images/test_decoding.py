"""Image files and rows as Pillow reads them: orientation, pixel formats, damaged and stray files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from audit.errors import EnvironmentFault, UsageError
from model_zoo.images.datasets import load_images

ORIENTATION = 274  # the EXIF tag
Array = np.ndarray[Any, Any]


def pixels(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(pixels(5, 7, 3, seed=seed))


def with_orientation(image: Image.Image, value: int) -> bytes:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = value
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def as_loaded(tensor: torch.Tensor) -> Array:
    """Return an image (C, H, W) in [0, 1] as 8-bit pixels (H, W, C)."""
    return np.asarray((tensor * 255).round().to(torch.uint8).permute(1, 2, 0))


def parquet(path: Path, rows: list[bytes]) -> str:
    structs = [{"bytes": data, "path": None} for data in rows]
    pq.write_table(pa.table({"image": structs, "label": [row % 2 for row in range(len(rows))]}), path / "a.parquet")
    return f"parquet:{path / 'a.parquet'}"


def folder(path: Path, rows: list[bytes]) -> str:
    (path / "set" / "cat").mkdir(parents=True)
    for number, data in enumerate(rows):
        (path / "set" / "cat" / f"{number}.png").write_bytes(data)
    return f"folder:{path / 'set'}"


@pytest.mark.parametrize("layout", [parquet, folder])
@pytest.mark.parametrize("value", [2, 3, 4, 5, 6, 7, 8])
def test_images_are_turned_upright(tmp_path: Path, layout: Callable[[Path, list[bytes]], str], value: int) -> None:
    turned = with_orientation(picture(), value)
    found = load_images(layout(tmp_path, [turned, turned])).images[0]
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
    assert np.array_equal(as_loaded(found), expected)
    assert not np.array_equal(expected.reshape(-1), pixels(5, 7, 3).reshape(-1))


def test_images_of_a_camera_held_three_ways_are_the_same_scene(tmp_path: Path) -> None:
    """The stored pixels of one scene differ with the orientation; the loaded ones do not."""
    scene = picture()
    undo = {1: scene, 3: scene.rotate(180), 6: scene.rotate(90, expand=True), 8: scene.rotate(270, expand=True)}
    rows = [with_orientation(stored, value) for value, stored in undo.items()]
    for row in load_images(parquet(tmp_path, rows)).images:
        assert np.array_equal(as_loaded(row), np.asarray(scene))


def test_images_without_a_legal_orientation_stay_as_they_are(tmp_path: Path) -> None:
    plain = io.BytesIO()
    picture().save(plain, "PNG")
    rows = [plain.getvalue(), with_orientation(picture(), 1), with_orientation(picture(), 99)]
    for row in load_images(parquet(tmp_path, rows)).images:
        assert np.array_equal(as_loaded(row), pixels(5, 7, 3))


def _palette() -> Image.Image:
    return picture().quantize(16)


def _transparent_palette() -> Image.Image:
    image = picture().quantize(16)
    image.info["transparency"] = 3
    return image


MODES: dict[str, tuple[Callable[[], Image.Image], str]] = {
    "palette": (_palette, "png"),
    "palette with transparency": (_transparent_palette, "png"),
    "alpha": (lambda: Image.fromarray(pixels(5, 7, 4), "RGBA"), "png"),
    "grey with alpha": (lambda: Image.fromarray(pixels(5, 7, 2), "LA"), "png"),
    "cmyk": (lambda: Image.fromarray(pixels(5, 7, 4), "CMYK"), "jpg"),
    "cmyk tiff": (lambda: Image.fromarray(pixels(5, 7, 4), "CMYK"), "tif"),
    "jpeg": (picture, "JPG"),
    "bitmap": (picture, "BMP"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", MODES)
def test_pixel_formats_become_colour_as_by_pillow(tmp_path: Path, kind: str) -> None:
    make, ending = MODES[kind]
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / f"a.{ending}"
    make().save(file)
    found = load_images(f"folder:{tmp_path}").images[0]
    with Image.open(file) as image:
        assert np.array_equal(as_loaded(found), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "ending"), [("L", "png"), ("1", "png"), ("L", "jpeg")])
def test_grey_images_have_one_channel(tmp_path: Path, mode: str, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / f"a.{ending}"
    picture().convert(mode).save(file)
    found = load_images(f"folder:{tmp_path}").images[0]
    with Image.open(file) as image:
        assert np.array_equal(as_loaded(found)[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("ending", ["png", "tif", "ppm"])
def test_deeper_images_are_refused_in_one_sentence(tmp_path: Path, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "cat" / f"a.{ending}")
    with pytest.raises(UsageError, match=r"has the pixel format I(;16)?; store 8-bit grey or colour images"):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, ending: str) -> None:
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / f"a.{ending}"
    picture(0).save(file, save_all=True, append_images=[picture(1), picture(2)], **_lossless(ending))
    found = load_images(f"folder:{tmp_path}").images[0]
    with Image.open(file) as image:
        assert image.n_frames == 3
        assert np.array_equal(as_loaded(found), np.asarray(image.convert("RGB")))


def _lossless(ending: str) -> dict[str, bool]:
    return {"lossless": True} if ending == "webp" else {}


@pytest.mark.parametrize(("ending", "kept"), [("png", 0.6), ("jpg", 0.6), ("gif", 0.5)])
def test_truncated_files_are_named(tmp_path: Path, ending: str, kept: float) -> None:
    (tmp_path / "cat").mkdir()
    file = tmp_path / "cat" / f"a.{ending}"
    Image.fromarray(pixels(40, 40, 3)).save(file)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(EnvironmentFault, match=rf"a\.{ending} cannot be decoded as an image .*; remove or replace it"):
        load_images(f"folder:{tmp_path}")


@pytest.mark.parametrize("stray", [".DS_Store", "._a.png", ".hidden/b.png", "Thumbs.db", "notes.txt"])
def test_stray_files_are_left_out(tmp_path: Path, stray: str) -> None:
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "a.PNG")
    (tmp_path / "cat" / stray).parent.mkdir(exist_ok=True)
    (tmp_path / "cat" / stray).write_bytes(b"\0\5\x16\7")
    found = load_images(f"folder:{tmp_path}")
    assert (len(found.images), found.classes) == (1, ("cat",))
    assert np.array_equal(as_loaded(found.images[0]), pixels(5, 7, 3))
