"""Preprocessing equals each library's own transform on photographs of any size, in pixels and in decisions."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from audit.errors import MismatchError, UnknownNameError, UsageError
from model_zoo import libraries
from model_zoo.images.datasets import ImageRequest, check_fit, load_images
from model_zoo.images.preprocessing import Preprocessing, from_crop_fraction, from_options
from model_zoo.load import SourceSettings, load_model, locate

SIZES = [
    (300, 400),
    (500, 333),
    (224, 224),
    (600, 250),
    (90, 130),
    (256, 256),
    (231, 512),
    (1000, 700),
    (64, 64),
    (375, 500),
]
Transform = Callable[[Image.Image], Tensor]


@pytest.fixture(scope="module", autouse=True)
def _timm_without_warnings() -> None:
    libraries._timm()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of unequal size with structure at every scale, two of them grey and one with a palette."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "cat").mkdir()
    for number, (height, width) in enumerate(SIZES):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((width, height), 3)
        noise = generator.normal(0, 25, (height, width, 3))
        image = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
        image = {3: image.convert("L"), 6: image.convert("L"), 8: image.quantize(64)}.get(number, image)
        image.save(folder / "cat" / f"{number}.{'png' if number % 2 else 'bmp'}")
    return folder


def opened(folder: Path) -> list[Image.Image]:
    files = sorted((folder / "cat").iterdir())
    return [Image.open(file).convert("RGB") for file in files]


def ours(folder: Path, chosen: Preprocessing | None) -> Tensor:
    return load_images(f"folder:{folder}", ImageRequest(preprocessing=chosen)).images


def decisions(normalised: Tensor) -> Tensor:
    """Return the classes that a small random network sees in normalised images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 10))
    with torch.no_grad():
        scores: Tensor = network(normalised)
    return scores.argmax(1)


def check_equal(found: Tensor, images: list[Image.Image], own: Transform, mean: Any, std: Any) -> None:
    """Compare images in [0, 1] with a library's transform, which normalises."""
    shift, width = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    expected = torch.stack([own(image) for image in images])
    assert expected.shape == found.shape
    assert float((expected * width + shift - found).abs().max()) <= 1 / 255 + 1e-6
    assert torch.equal(decisions((found - shift) / width), decisions(expected))


TIMM = [
    "resnet18.a1_in1k",
    "mobileone_s1.apple_in1k",
    "dm_nfnet_f0.dm_in1k",
    "volo_d1_224.sail_in1k",
    "tf_efficientnet_lite0.in1k",
]


@pytest.mark.parametrize("name", TIMM)
def test_timm(photographs: Path, name: str) -> None:
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    chosen = libraries.timm_facts(name).preprocessing
    own = create_transform(**config, is_training=False)
    check_equal(ours(photographs, chosen), opened(photographs), own, config["mean"], config["std"])


@pytest.mark.parametrize(
    "config",
    [
        {"crop_pct": 0.9, "crop_mode": "border", "interpolation": "bicubic", "mean": (0.5, 0.4, 0.3)},
        {"crop_pct": 1.0, "crop_mode": "border", "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3)},
        {"crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": None, "crop_mode": None, "interpolation": None},
        {"crop_pct": 1.15, "crop_mode": "center", "interpolation": "bicubic"},
    ],
)
@pytest.mark.parametrize("size", [(3, 96, 96), (3, 96, 128)])
def test_timm_crop_modes(photographs: Path, config: dict[str, Any], size: tuple[int, int, int]) -> None:
    from timm.data import create_transform, resolve_data_config

    resolved = resolve_data_config(pretrained_cfg={**config, "input_size": size})
    chosen = from_crop_fraction(size, config)
    assert chosen.shape == size
    own = create_transform(**resolved, is_training=False)
    check_equal(ours(photographs, chosen), opened(photographs), own, resolved["mean"], resolved["std"])


@pytest.mark.parametrize(
    "name",
    [
        "resnet18/IMAGENET1K_V1",
        "resnet50/IMAGENET1K_V2",
        "efficientnet_b1/IMAGENET1K_V2",
        "regnet_y_16gf/IMAGENET1K_SWAG_LINEAR_V1",
    ],
)
def test_torchvision(photographs: Path, name: str) -> None:
    from torchvision.models import get_model_weights

    arch, _, weights = name.partition("/")
    preset = get_model_weights(arch)[weights].transforms()
    chosen = libraries.torchvision_facts(arch, weights)[1].preprocessing
    check_equal(ours(photographs, chosen), opened(photographs), preset, preset.mean, preset.std)


@pytest.mark.parametrize(
    ("threat", "name", "preset"),
    [
        ("Linf", "Salman2020Do_R18", "Res256Crop224"),
        ("Linf", "Liu2023Comprehensive_Swin-B", "BicubicRes256Crop224"),
        ("Linf", "Wong2020Fast", "Res256Crop224"),
        ("Linf", "Peng2023Robust", "Res224"),
        ("corruptions", "Hendrycks2020AugMix", "Res256Crop224"),
    ],
)
def test_robustbench(photographs: Path, threat: str, name: str, preset: str) -> None:
    libraries._robustbench_models()  # makes robustbench importable
    tables, enums = import_module("robustbench.data"), import_module("robustbench.model_zoo.enums")
    own = tables.get_preprocessing(enums.BenchmarkDataset.imagenet, enums.ThreatModel(threat), name, None)
    chosen = libraries.robustbench_preprocessing("imagenet", threat, name)
    assert chosen is not None, preset
    check_equal(ours(photographs, chosen), opened(photographs), own, (0.0,) * 3, (1.0,) * 3)
    assert "robustbench" in sys.modules
    assert libraries.robustbench_preprocessing("cifar10", "Linf", "Standard") is None


@pytest.mark.parametrize("name", ["Res256Crop224", "Crop288", "Res224", "BicubicRes256Crop224"])
def test_every_preprocessing_name_of_robustbench_is_known(photographs: Path, name: str, monkeypatch: Any) -> None:
    libraries._robustbench_models()
    own = import_module("robustbench.data").PREPROCESSINGS[name]
    monkeypatch.setattr(libraries, "_robustbench_entry", lambda *_: {"preprocessing": name})
    monkeypatch.setattr(libraries, "robustbench_timm_name", lambda *_: "")
    chosen = libraries.robustbench_preprocessing("imagenet", "Linf", "any")
    check_equal(ours(photographs, chosen), opened(photographs), own, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ("resize=256&crop=224&interpolation=bicubic", 224),
        ("resize=72x72", 72),
        ("resize=80&crop=64", 64),
        ("crop=50", 50),
    ],
)
def test_options_of_a_file_reference(photographs: Path, tmp_path: Path, options: str, size: int) -> None:
    from torchvision import transforms

    named = dict(item.split("=") for item in options.split("&"))
    mode = transforms.InterpolationMode(named.get("interpolation", "bilinear"))
    steps: list[Any] = []
    if "resize" in named:
        side = [72, 72] if "x" in named["resize"] else int(named["resize"])
        steps.append(transforms.Resize(side, interpolation=mode))
    steps += [transforms.CenterCrop(int(named["crop"]))] if "crop" in named else []
    chosen = from_options(named.get("resize", ""), named.get("crop", ""), named.get("interpolation", ""))
    own = transforms.Compose([*steps, transforms.ToTensor()])
    check_equal(ours(photographs, chosen), opened(photographs), own, (0.0,) * 3, (1.0,) * 3)
    (tmp_path / "nets.py").write_text("from torch import nn\n\ndef net(num_classes):\n    return nn.Sequential("
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))\n")  # fmt: skip
    torch.save({"2.weight": torch.zeros(2, 3), "2.bias": torch.zeros(2)}, tmp_path / "w.pt")
    ref = f"file:{tmp_path / 'w.pt'}?arch={tmp_path / 'nets.py'}:net&num_classes=2&{options}"
    model = load_model(ref, SourceSettings(trust_code=True))
    assert model.preprocessing == locate(ref, SourceSettings(trust_code=True)).preprocessing == chosen
    assert model.image_shape == (3, size, size)


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation", "sentence"),
    [
        ("", "", "bicubic", "interpolation='bicubic' needs resize="),
        ("0", "", "", "resize='0' is not a size in pixels; write resize=224"),
        ("1x2x3", "", "", "resize='1x2x3' is not a size in pixels"),
        ("256", "-3", "", "crop='-3' is not a size in pixels"),
        ("99999", "", "", r"image sizes \(99999,\) are not legal; sides are 1 to 4096 pixels"),
        ("256", "224", "bicubik", "unknown interpolation 'bicubik'; did you mean 'bicubic'"),
    ],
)
def test_options_that_are_not_legal(resize: str, crop: str, interpolation: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        from_options(resize, crop, interpolation)


def test_configurations_that_are_not_legal() -> None:
    with pytest.raises(UsageError, match=r"crop_pct 0\.001 is not the share"):
        from_crop_fraction((3, 224, 224), {"crop_pct": 0.001})
    with pytest.raises(UnknownNameError, match="interpolation 'random'"):
        from_crop_fraction((3, 224, 224), {"interpolation": "random"})


def test_without_preprocessing_unequal_sizes_are_refused_with_what_to_add(photographs: Path) -> None:
    with pytest.raises(
        UsageError, match=r"must share channels and size: .* add it to its file: reference, such as resize="
    ):
        ours(photographs, None)


@pytest.mark.parametrize(("shape", "changed"), [((40, 30, 3), True), ((24, 24, 3), False), ((24, 24), True)])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_arrays_are_preprocessed_unless_they_have_the_networks_shape(
    tmp_path: Path, shape: tuple[int, ...], changed: bool, kind: str
) -> None:
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8)
    stored = pixels if kind == "uint8" else (pixels / 255).astype(kind)
    np.savez(tmp_path / "a.npz", images=stored, labels=np.arange(3))
    chosen = Preprocessing(resize=(32,), crop=(24, 24), interpolation="bicubic")
    found = load_images(f"npz:{tmp_path / 'a.npz'}", ImageRequest(preprocessing=chosen))
    assert found.preprocessing == (chosen if changed else None)
    assert found.images.shape == (3, 3, 24, 24)
    mode = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(32, interpolation=mode), transforms.CenterCrop(24)] if changed else []
    own = transforms.Compose([*steps, transforms.ToTensor()])
    expected = torch.stack([own(Image.fromarray(image).convert("RGB")) for image in pixels])
    assert float((found.images - expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_floats_between_the_levels_are_resized_as_floats(tmp_path: Path, channels: int, interpolation: str) -> None:
    from torchvision.transforms.v2 import functional

    pixels = np.random.default_rng(0).random((3, channels, 40, 30), dtype=np.float32)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(3))
    chosen = Preprocessing(resize=(20,), crop=(16, 16), interpolation=interpolation)
    found = load_images(f"npz:{tmp_path / 'a.npz'}", ImageRequest(preprocessing=chosen)).images
    mode = functional.InterpolationMode(interpolation)
    resized = functional.resize(torch.from_numpy(pixels), [20], mode, antialias=True).clamp(0, 1)
    assert torch.allclose(found, functional.center_crop(resized, [16, 16]).expand(-1, 3, -1, -1), atol=1e-6)


@pytest.mark.parametrize("colour", [True, False])
def test_grey_networks_take_grey_images(tmp_path: Path, colour: bool) -> None:
    from torchvision.transforms import CenterCrop

    (tmp_path / "cat").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 3) if colour else (9, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat" / "a.png")
    found = ours(tmp_path, Preprocessing(crop=(8, 8), channels=1))
    own = CenterCrop(8)(Image.fromarray(pixels).convert("L"))
    assert np.array_equal((found[0, 0] * 255).round().byte().numpy(), np.asarray(own))


def test_a_size_that_does_not_fit_is_told_with_what_to_add(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 9, 9, 3), np.uint8), labels=np.arange(3))
    (tmp_path / "nets.py").write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), "
        "nn.Linear(192, 3))\n")  # fmt: skip
    torch.save({"1.weight": torch.zeros(3, 192), "1.bias": torch.zeros(3)}, tmp_path / "w.pt")
    ref = f"file:{tmp_path / 'w.pt'}?arch={tmp_path / 'nets.py'}:net&num_classes=3&shape=3x8x8"
    model = load_model(ref, SourceSettings(trust_code=True))
    with pytest.raises(
        MismatchError, match=r"takes images of 3x8x8, .* has 3x9x9: the size differ; .* add it .*resize="
    ):
        check_fit(model, load_images(f"npz:{tmp_path / 'a.npz'}"))
    with pytest.raises(UsageError, match=r"shape=3x8x8 is not that of images with crop='7'"):
        load_model(f"{ref}&crop=7", SourceSettings(trust_code=True))
