"""Image towers of open_clip with small random weights: files, state dicts, folders, tags and zero-shot heads."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import EnvironmentFault, MismatchError, UnknownNameError, UnsafeError, UsageError
from audit.information.mine import Mine
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.run.cell import Cell
from audit.run.loading import RunOptions
from audit.run.run_loop import run
from model_zoo.entries import parse_ref
from model_zoo.images.transforms import preprocess
from model_zoo.load import SourceSettings, load_model
from model_zoo.relative import model_beside
from model_zoo.sources.open_clip_towers import _preprocessing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, which it uses
    import open_clip

OFFLINE = SourceSettings(offline=True)
SETTINGS: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
RESNET = {**SETTINGS, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))


@pytest.fixture(autouse=True)
def registered(tmp_path: Path) -> None:
    """Give the library two small architectures by name."""
    for name, settings in (("rv-tiny", SETTINGS), ("rv-resnet", RESNET)):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.json").write_text(json.dumps(settings))
    open_clip.add_model_config(tmp_path / "configs")


def whole(settings: dict[str, Any] = SETTINGS) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return open_clip.model.CLIP(**settings).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


FORMS = {
    "whole": lambda state: state,
    "nested": lambda state: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
    "visual": lambda state: {k: v for k, v in state.items() if k.startswith("visual.")},
    "bare": lambda state: {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")},
    "wrapped": lambda state: {f"model.{k}": v for k, v in state.items() if k.startswith("visual.")},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_holds_a_clip_or_its_image_tower(tmp_path: Path, images: torch.Tensor, form: str) -> None:
    network, path = whole(), tmp_path / "fare.pt"
    torch.save(FORMS[form](network.state_dict()), path)
    model = load_model(f"open_clip:rv-tiny/{path}?training=robust&trained_eps=4/255&trained_norm=linf", OFFLINE)
    with torch.no_grad():
        assert torch.allclose(model.network(images), network.encode_image((images - MEAN) / STD), atol=1e-5)
    assert (model.num_classes, model.image_shape) == (0, (3, 16, 16))
    assert (model.entry.name, model.entry.training, model.entry.trained_eps) == ("fare", "robust", 4 / 255)
    assert model.preprocessing is not None
    assert (model.preprocessing.resize, model.preprocessing.interpolation) == ((16,), "bicubic")


def test_a_residual_tower(tmp_path: Path) -> None:
    network, path = whole(RESNET), tmp_path / "net.pt"
    torch.save(network.state_dict(), path)
    images = torch.rand(2, 3, 32, 32)
    model = load_model(f"open_clip:rv-resnet/{path}", OFFLINE)
    with torch.no_grad():
        assert torch.allclose(model.network(images), network.encode_image((images - MEAN) / STD), atol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_a_folder_says_how_images_are_made(tmp_path: Path, images: torch.Tensor, mode: str) -> None:
    network, folder = whole(), tmp_path / "net"
    folder.mkdir()
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    chosen = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": mode, "fill_color": 51}
    config = {"model_cfg": SETTINGS, "preprocess_cfg": chosen}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = load_model(f"open_clip:{folder}", OFFLINE)
    with torch.no_grad():
        assert torch.allclose(model.network(images), network.encode_image((images - 0.5) / 0.25), atol=1e-5)
    theirs = open_clip.image_transform(
        16, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, interpolation="bilinear", fill_color=51
    )
    generator = np.random.default_rng(0)
    for size in [(40, 31), (31, 40), (64, 64), (33, 90), (90, 33), (48, 51), (77, 45), (20, 26), (36, 36), (100, 61)]:
        picture = Image.fromarray(generator.integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize(size, 2)
        assert model.preprocessing is not None
        ours = torch.from_numpy(np.array(preprocess(picture, model.preprocessing))).permute(2, 0, 1) / 255
        assert float((ours - theirs(picture)).abs().max()) <= 1.001 / 255


def test_sizes_that_are_not_square_are_covered() -> None:
    theirs = open_clip.image_transform((20, 32), is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    chosen = _preprocessing({"resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0}, [20, 32])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 6, 3), dtype=np.uint8)).resize((60, 50), 2)
    ours = torch.from_numpy(np.array(preprocess(picture, chosen))).permute(2, 0, 1) / 255
    assert float((ours - theirs(picture)).abs().max()) <= 1.001 / 255


def test_a_tag_is_looked_for_in_the_cache(
    tmp_path: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = SourceSettings(offline=True, cache_dir=tmp_path)
    with pytest.raises(
        EnvironmentFault, match=r"open_clip_model\.safetensors of laion/CLIP-ViT-B-32.* put the file at"
    ):
        load_model("open_clip:ViT-B-32/laion2b_s34b_b79k", sources)
    tag = {"hf_hub": "org/net/", "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash", "quick_gelu": True}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_name: {**tag, "interpolation": "bilinear"})
    network = whole({**SETTINGS, "quick_gelu": True})
    (tmp_path / "open_clip" / "rv-tiny").mkdir(parents=True)
    save_file(network.state_dict(), tmp_path / "open_clip" / "rv-tiny" / "robust.safetensors")
    model = load_model("open_clip:rv-tiny/robust", sources)
    with torch.no_grad():
        assert torch.allclose(model.network(images), network.encode_image((images - 0.5) / 0.5), atol=1e-5)
    assert model.preprocessing is not None
    assert (model.preprocessing.fit, model.preprocessing.interpolation) == ("exact", "bilinear")


def zero_shot_files(folder: Path) -> dict[str, Path]:
    lists = {"classes": ["red", "green", "blue sky"], "templates": ["a photo of a {}.", "the {} painting"]}
    for name, held in lists.items():
        (folder / f"{name}.json").write_text(json.dumps(held))
    return {name: folder / f"{name}.json" for name in lists}


@torch.no_grad()
def text_features(network: Any, files: dict[str, Path]) -> torch.Tensor:
    names, templates = (json.loads(files[name].read_text()) for name in ("classes", "templates"))
    tokenize = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    rows = [
        network.encode_text(tokenize([t.format(name) for t in templates]), normalize=True).mean(0) for name in names
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def test_class_names_or_their_saved_matrix_make_a_zero_shot_head(tmp_path: Path, images: torch.Tensor) -> None:
    network, path, files = whole(), tmp_path / "net.pt", zero_shot_files(tmp_path)
    torch.save(network.state_dict(), path)
    model = load_model(f"open_clip:rv-tiny/{path}?classes={files['classes']}&templates={files['templates']}", OFFLINE)
    matrix = text_features(network, files)
    with torch.no_grad():
        features = network.encode_image((images - MEAN) / STD, normalize=True)
        wanted = network.logit_scale.exp() * features @ matrix.T
        assert torch.allclose(model.network(images), wanted, atol=1e-4)
    assert (model.num_classes, model.class_names) == (3, ("red", "green", "blue sky"))
    visual = {k: v for k, v in network.state_dict().items() if k.startswith("visual.")}
    torch.save(visual, tmp_path / "fare.pt")
    np.save(tmp_path / "head.npy", matrix.T.numpy())
    saved = load_model(f"open_clip:rv-tiny/{tmp_path / 'fare.pt'}?head={tmp_path / 'head.npy'}", OFFLINE)
    with torch.no_grad():
        assert torch.allclose(saved.network(images), 100 * features @ matrix.T, atol=1e-3)
    with pytest.raises(MismatchError, match="hold no text tower; give head=, a saved matrix of text features"):
        load_model(f"open_clip:rv-tiny/{tmp_path / 'fare.pt'}?classes={files['classes']}", OFFLINE)


def test_files_beside_a_benchmark_are_found(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"")
    (tmp_path / "names.json").write_bytes(b"")
    found = model_beside(parse_ref("open_clip:rv-tiny/net.pt?classes=names.json"), tmp_path)
    assert found.target == f"rv-tiny/{tmp_path / 'net.pt'}"
    assert found.options["classes"] == str(tmp_path / "names.json")
    (tmp_path / "tower").mkdir()
    assert model_beside(parse_ref("transformers:tower"), tmp_path).target == str(tmp_path / "tower")


def test_what_cannot_be_loaded_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    with pytest.raises(UnknownNameError, match="unknown open_clip model 'rv-tinny'; did you mean 'rv-tiny'"):
        load_model("open_clip:rv-tinny/openai", OFFLINE)
    with pytest.raises(UnknownNameError, match=r"unknown open_clip weights of ViT-B-32 'openaii'; did you"):
        load_model("open_clip:ViT-B-32/openaii", OFFLINE)
    with pytest.raises(EnvironmentFault, match=r"none\.pt does not exist"):
        load_model(f"open_clip:rv-tiny/{tmp_path / 'none.pt'}", OFFLINE)
    with pytest.raises(EnvironmentFault, match=r"holds no open_clip_model\.safetensors"):
        load_model(f"open_clip:{folder}", OFFLINE)
    save_file(whole().state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(EnvironmentFault, match=r"holds no open_clip_config\.json"):
        load_model(f"open_clip:{folder}", OFFLINE)
    wide = {**SETTINGS, "vision_cfg": {**SETTINGS["vision_cfg"], "width": 40960}}
    for held, kind, message in (
        ("[]", UsageError, "is not a configuration of open_clip"),
        ('{"model_cfg": {"embed_dim": 0, "vision_cfg": {}}}', UsageError, "vision_cfg and embed_dim are missing"),
        (json.dumps({"model_cfg": SETTINGS, "preprocess_cfg": {"mean": "dark"}}), UsageError, "of the wrong kind"),
        (
            json.dumps({"model_cfg": SETTINGS, "preprocess_cfg": {"resize_mode": "stretch"}}),
            UnknownNameError,
            "resize_mode",
        ),
        (
            json.dumps({"model_cfg": {**SETTINGS, "vision_cfg": {"depth": 3}}}),
            MismatchError,
            "cannot build the image tower",
        ),
        (json.dumps({"model_cfg": wide}), UnsafeError, "far larger than its weights"),
    ):
        (folder / "open_clip_config.json").write_text(held)
        with pytest.raises(kind, match=message):
            load_model(f"open_clip:{folder}", OFFLINE)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(
        EnvironmentFault, match=r"needs? open_clip_torch, which is not installed; pip install 'rvaudit\[cl"
    ):
        load_model("open_clip:ViT-B-32/openai", OFFLINE)


def test_a_tower_is_audited_on_photographs(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for channel, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for number in range(18):
            pixels = generator.integers(0, 90, (17 + number, 40 - number, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / colour / f"{number}.png")
    torch.save(whole().state_dict(), tmp_path / "net.pt")
    shape = CriticShape(width=16, embedding=8, channels=4, view=8)
    training, search = CriticTraining(steps=6, every=3, shape=shape), WorstCaseSearch(1, rounds=1, critic_steps=1)
    settings = AuditSettings(Mine(training, search), two_losses(PGD(steps=2)), seeds=(0,))
    ref = f"open_clip:rv-tiny/{tmp_path / 'net.pt'}"
    cell = Cell(ref, None, f"folder:{tmp_path / 'photos'}", None, "penultimate", Linf(1 / 255), settings)
    (record,) = run([cell], tmp_path / "run", RunOptions(OFFLINE, device="cpu"))
    assert record.valid, record.reason
    assert record.details["preprocessing"]["crop"] == [16, 16]
    assert (record.dimension, record.natural_head) == (8, "slf")
    assert record.natural_accuracy > 0.6
