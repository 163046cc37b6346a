"""Networks of transformers with small random weights: outputs, preprocessing, image towers and zero-shot heads."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import CheckpointError, EnvironmentFault, MismatchError, UnknownNameError, UnsafeError, UsageError
from audit.information.mine import Mine
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.run.cell import Cell
from audit.run.loading import InputCache, RunOptions
from audit.run.run_loop import run
from model_zoo.images.transforms import preprocess
from model_zoo.load import SourceSettings, load_model
from model_zoo.sources.processors import processing_of

OFFLINE = SourceSettings(offline=True)
SIDE = 16
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": SIDE, "patch_size": 8}  # fmt: skip
TEXT = {**{name: SMALL[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")},
        "num_hidden_layers": 1, "vocab_size": 24, "max_position_embeddings": 12}  # fmt: skip
WORDS = ("a", "photo", "of", "red", "green", "blue", "the", "painting", ".")
CLIP_TEXT = {**TEXT, "bos_token_id": 22, "eos_token_id": 23, "pad_token_id": 23, "projection_dim": 8}
PROCESSOR = {"size": {"height": SIDE, "width": SIDE}, "resample": 3, "image_mean": [0.4, 0.5, 0.6],
             "image_std": [0.2, 0.3, 0.25]}  # fmt: skip
NETWORKS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, num_labels=3)),
    "vit-encoder": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=4)
    ),
    "convnext": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 12], depths=[1, 1])
    ),
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config={**SMALL, "projection_dim": 8}, projection_dim=8)
    ),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SMALL)),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def saved(folder: Path, name: str, processor: dict[str, Any] | None = None) -> tuple[str, Any]:
    """Write a network with random weights to a folder in the library's layout; return its reference and itself."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = NETWORKS[name]().eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    network.save_pretrained(folder / name)
    (folder / name / "preprocessor_config.json").write_text(json.dumps(processor or PROCESSOR))
    return f"transformers:{folder / name}", network


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(PROCESSOR[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    return (images - mean) / std


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_library(tmp_path: Path, images: torch.Tensor, name: str) -> None:
    ref, network = saved(tmp_path, name)
    model = load_model(ref, OFFLINE)
    pixels = normalised(images)
    with torch.no_grad():
        found = model.network(images)
        if name in ("clip", "siglip"):
            wanted = network.vision_model(pixel_values=pixels).pooler_output
            wanted = network.visual_projection(wanted) if name == "clip" else wanted
        else:
            outputs = network(pixel_values=pixels)
            wanted = outputs.logits if "logits" in outputs else outputs.pooler_output
    assert torch.allclose(found, wanted, atol=1e-5)
    classes = {"vit": 3, "resnet": 4}.get(name, 0)
    assert (model.num_classes, model.image_shape, model.entry.family) == (classes, (3, SIDE, SIDE), name.split("-")[0])
    left = [note for note in model.entry.renames if "tensors of other parts are not used" in note]
    assert len(left) == (name in ("clip", "siglip"))
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


def test_class_names_are_those_of_the_configuration(tmp_path: Path) -> None:
    ref, _ = saved(tmp_path, "vit")
    assert load_model(ref, OFFLINE).class_names == ()  # LABEL_0 and so on are no names
    config = json.loads((tmp_path / "vit" / "config.json").read_text())
    config["id2label"] = {"0": "red", "1": "green", "2": "blue"}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    assert load_model(ref, OFFLINE).class_names == ("red", "green", "blue")


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 31), (31, 40), (64, 64), (33, 90), (90, 33), (48, 51), (77, 45), (20, 26), (36, 36), (100, 61)]
    coarse = [generator.integers(0, 256, (7, 6, 3), dtype=np.uint8) for _ in sizes]
    return [Image.fromarray(each).resize(size, 2) for each, size in zip(coarse, sizes, strict=True)]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("ViTImageProcessor", {"size": {"height": 24, "width": 20}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}}),
        ("SiglipImageProcessor", {"size": {"height": 24, "width": 24}, "resample": 3}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 24}, "crop_pct": 0.875, "resample": 3}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "resample": 2}),
        ("BitImageProcessor", {"size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 20}}),
    ],
)
def test_preprocessing_is_that_of_the_library(tmp_path: Path, kind: str, changed: dict[str, Any]) -> None:
    processor = getattr(transformers, kind)(**changed, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25])
    processor.save_pretrained(tmp_path)
    found = processing_of(json.loads((tmp_path / "preprocessor_config.json").read_text()), "net")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    for picture in pictures():
        wanted = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert found.preprocessing is not None
        ours = torch.from_numpy(np.array(preprocess(picture, found.preprocessing))).permute(2, 0, 1) / 255
        assert ours.shape == wanted.shape == found.preprocessing.shape
        assert float((ours - (wanted * std + mean)).abs().max()) <= 1.001 / 255


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"do_normalize": False}, (), ()),
        ({"image_mean": [0.5], "image_std": [0.25]}, (0.5,), (0.25,)),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5}, (0.0,), (0.5,)),
        ({"do_normalize": False, "do_rescale": False}, (0.0,), (1 / 255,)),
    ],
)
def test_scales_of_pixels_become_a_normalisation(config: dict[str, Any], mean: tuple, std: tuple) -> None:
    found = processing_of({**config, "do_resize": False}, "net")
    assert (found.mean, found.std) == (pytest.approx(mean), pytest.approx(std))
    assert found.preprocessing is None


def zero_shot_files(folder: Path) -> dict[str, Path]:
    model = tokenizers.models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token=".")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([f"<{number}>" for number in range(len(WORDS), 22)] + ["<start>", "<end>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 22), ("<end>", 23)]
    )
    tokenizer.save(str(folder / "clip" / "tokenizer.json"))
    lists = {"classes": ["red", "green", "blue"], "templates": ["a photo of a {} .", "the painting of a {}"]}
    for name, held in lists.items():
        (folder / f"{name}.json").write_text(json.dumps(held))
    return {name: folder / f"{name}.json" for name in lists}


def text_features(network: Any, files: dict[str, Path]) -> torch.Tensor:
    names, templates = (json.loads(files[name].read_text()) for name in ("classes", "templates"))
    rows = []
    for name in names:
        each = []
        for template in templates:
            words = template.format(name).split()
            ids = torch.tensor([[22, *(WORDS.index(word) for word in words), 23]])
            each.append(F.normalize(network.text_projection(network.text_model(input_ids=ids).pooler_output), dim=-1))
        rows.append(F.normalize(torch.cat(each).mean(0), dim=-1))
    return torch.stack(rows)


def test_class_names_make_a_zero_shot_head(tmp_path: Path, images: torch.Tensor) -> None:
    ref, network = saved(tmp_path, "clip")
    files = zero_shot_files(tmp_path)
    model = load_model(f"{ref}?classes={files['classes']}&templates={files['templates']}", OFFLINE)
    with torch.no_grad():
        features = network.visual_projection(network.vision_model(pixel_values=normalised(images)).pooler_output)
        scale = min(float(network.logit_scale.exp()), 1000.0)
        wanted = scale * F.normalize(features, dim=-1) @ text_features(network, files).T
        found = model.network(images)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert (model.num_classes, model.class_names) == (3, ("red", "green", "blue"))
    assert any("zero-shot head of 3 class names in 2 templates" in note for note in model.entry.renames)
    one = load_model(f"{ref}?classes={files['classes']}", OFFLINE)
    assert one.entry.weights_sha256 != model.entry.weights_sha256 != load_model(ref, OFFLINE).entry.weights_sha256


@pytest.mark.parametrize("form", ["npy", "safetensors", "transposed"])
def test_a_saved_matrix_makes_the_same_head(tmp_path: Path, images: torch.Tensor, form: str) -> None:
    ref, network = saved(tmp_path, "clip")
    files = zero_shot_files(tmp_path)
    with torch.no_grad():
        matrix = 7 * text_features(network, files)
    path = tmp_path / f"head.{'safetensors' if form == 'safetensors' else 'npy'}"
    if form == "safetensors":
        save_file({"head": matrix.contiguous()}, path)
    else:
        np.save(path, matrix.T.numpy() if form == "transposed" else matrix.numpy())
    named = load_model(f"{ref}?classes={files['classes']}&templates={files['templates']}", OFFLINE)
    model = load_model(f"{ref}?head={path}&classes={files['classes']}", OFFLINE)
    assert torch.allclose(model.network(images), named.network(images), atol=1e-4)
    assert model.class_names == ("red", "green", "blue")


def test_wrong_heads_are_refused_in_one_sentence(tmp_path: Path) -> None:
    ref, _ = saved(tmp_path, "clip")
    files = zero_shot_files(tmp_path)
    np.save(tmp_path / "wide.npy", np.ones((4, 9)))
    np.save(tmp_path / "four.npy", np.ones((4, 8)))
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    (tmp_path / "one.json").write_text('["red"]')
    (tmp_path / "plain.json").write_text('["a photo"]')
    for query, kind, message in (
        (f"head={tmp_path / 'wide.npy'}", MismatchError, "has the shape 4x9, the image tower has 8 features"),
        (f"head={tmp_path / 'none.npy'}", EnvironmentFault, "does not exist"),
        (f"head={tmp_path / 'bad.npy'}", CheckpointError, "is not an .npy file of numbers"),
        (f"head={tmp_path / 'four.npy'}&classes={files['classes']}", MismatchError, "has 4 classes, .* names 3"),
        (f"head={tmp_path / 'four.npy'}&templates={files['templates']}", UsageError, "needs no templates="),
        (f"templates={files['templates']}", UsageError, "templates= needs classes="),
        (f"classes={tmp_path / 'one.json'}", UsageError, "is not a JSON list of texts"),
        (f"classes={files['classes']}&templates={tmp_path / 'plain.json'}", UsageError, "does not hold {} once"),
        ("clases=a.json", UnknownNameError, "did you mean 'classes'"),
    ):
        with pytest.raises(kind, match=message):
            load_model(f"{ref}?{query}", OFFLINE)
    (tmp_path / "clip" / "tokenizer.json").unlink()
    with pytest.raises(EnvironmentFault, match=r"class names need tokenizer\.json beside the weights of clip"):
        load_model(f"{ref}?classes={files['classes']}", OFFLINE)
    classifier, _ = saved(tmp_path, "vit")
    with pytest.raises(UsageError, match="vit has a classifier of its own"):
        load_model(f"{classifier}?classes={files['classes']}", OFFLINE)


def test_folders_that_cannot_be_loaded_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, _ = saved(tmp_path, "vit")
    folder = tmp_path / "vit"
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())

    def refused(kind: type[Exception], message: str, **changed: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(kind, match=message):
            load_model(ref, OFFLINE)
        (folder / "config.json").write_text(json.dumps(config))

    refused(UnknownNameError, "unknown model_type of vit 'vitt'; did you mean 'vit'", model_type="vitt")
    refused(UnknownNameError, "did you mean 'ViTForImageClassification'", architectures=["ViTForImageClassificatio"])
    refused(UnknownNameError, "unknown architecture of vit 'os'", architectures=["os"])
    refused(UsageError, "is a BertModel, which does not take images", architectures=["BertModel"])
    refused(MismatchError, "do not fit ViTForImageClassification: .*", num_labels=7)
    refused(UnsafeError, "far larger than its weights", hidden_size=40960, intermediate_size=40960)
    save_file({k: v for k, v in weights.items() if "layer.1" not in k}, folder / "model.safetensors")
    refused(MismatchError, "missing: vit.layers.1")
    save_file({**weights, "other.weight": torch.zeros(3)}, folder / "model.safetensors")
    refused(MismatchError, "unknown to the network: other.weight")
    (folder / "preprocessor_config.json").write_text('{"image_mean": "dark"}')
    with pytest.raises(UsageError, match=r"preprocessor_config\.json of vit holds a value of the wrong kind"):
        load_model(ref, OFFLINE)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(EnvironmentFault, match="vit does not say how its images are made"):
        load_model(ref, OFFLINE)
    (folder / "model.safetensors").unlink()
    with pytest.raises(EnvironmentFault, match=r"holds no weights; legal names are model\.safetensors"):
        load_model(ref, OFFLINE)
    with pytest.raises(EnvironmentFault, match="does not exist; give a folder, or a repository such as org/name"):
        load_model(f"transformers:{tmp_path / 'nothing'}", OFFLINE)
    with pytest.raises(EnvironmentFault, match=r"config\.json of org/net is not on this machine and offline mode"):
        load_model("transformers:org/net", SourceSettings(offline=True, cache_dir=tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    ref, _ = f"transformers:{tmp_path / 'clip'}", (tmp_path / "clip").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "clip" / name).write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(EnvironmentFault, match=r"transformers, which is not installed; pip install 'rvaudit\[transf"):
        load_model(ref, OFFLINE)


def test_code_of_a_repository_is_never_run(tmp_path: Path) -> None:
    ref, _ = saved(tmp_path, "vit")
    folder = tmp_path / "vit"
    touched = tmp_path / "touched"
    (folder / "modeling.py").write_text(f"open({str(touched)!r}, 'w')\nclass Net: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling.Net", "AutoModel": "modeling.Net"}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(ref, OFFLINE)
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(touched), "w")

    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="is a pickle that would import"):
        load_model(ref, OFFLINE)
    assert not touched.exists()


def test_a_missing_pooler_is_left_out(tmp_path: Path, images: torch.Tensor) -> None:
    ref, network = saved(tmp_path, "vit-encoder")
    path = tmp_path / "vit-encoder" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "pooler" not in k}, path)
    model = load_model(ref, OFFLINE)
    with torch.no_grad():
        wanted = network(pixel_values=normalised(images)).last_hidden_state
        assert torch.allclose(model.network(images), wanted, atol=1e-5)
    assert any("the pooler is not in the weights" in note for note in model.entry.renames)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_a_classifier_and_an_image_tower_are_audited(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    for channel, colour in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / colour).mkdir(parents=True)
        for number in range(18):
            pixels = generator.integers(0, 90, (17 + number, 40 - number, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / colour / f"{number}.png")
    ref, _ = saved(tmp_path, name)
    shape = CriticShape(width=16, embedding=8, channels=4, view=8)
    estimator = Mine(
        CriticTraining(steps=6, every=3, shape=shape), WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1)
    )
    settings = AuditSettings(estimator, two_losses(PGD(steps=2)), seeds=(0,))
    layer = "logits" if name == "vit" else "vision_model.encoder.layers.0"
    cell = Cell(ref, None, f"folder:{tmp_path / 'photos'}", None, layer, Linf(1 / 255), settings)
    (record,) = run([cell], tmp_path / "run", RunOptions(OFFLINE, device="cpu"))
    assert record.valid, record.reason
    assert record.details["preprocessing"] == {
        "resize": [16, 16], "channels": 3, "fit": "exact", "interpolation": "bicubic",
    }  # fmt: skip
    assert record.natural_head == ("" if name == "vit" else "slf")
    assert record.dimension == (3 if name == "vit" else 5 * 16)


def test_the_folder_of_a_network_is_not_part_of_its_identity(tmp_path: Path) -> None:
    saved(tmp_path, "vit", {**PROCESSOR, "size": {"height": 8, "width": 8}})
    shutil.copytree(tmp_path / "vit", tmp_path / "copy")
    shutil.copytree(tmp_path / "vit", tmp_path / "other")
    (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "image_mean": [0.1] * 3}))
    inputs = InputCache(RunOptions(OFFLINE, device="cpu"))
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 16, 16, 3), np.uint8), labels=np.arange(3))
    settings = AuditSettings(seeds=(0,))
    first, copy, other = (
        inputs.open(
            Cell(
                f"transformers:{tmp_path / name}",
                None,
                f"npz:{tmp_path / 'a.npz'}",
                None,
                "logits",
                Linf(0.1),
                settings,
            )
        ).cell_id
        for name in ("vit", "copy", "other")
    )
    assert first == copy != other
