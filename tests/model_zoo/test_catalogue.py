"""Lists of models, without torch where possible."""

import subprocess
import sys

import pytest

from audit.errors import UnknownNameError
from model_zoo import libraries
from model_zoo.catalogue import architecture_family, list_models, pretrained_entry, robustbench_rows
from model_zoo.entries import PretrainedFacts


def test_robustbench_csv_matches_the_table_of_robustbench() -> None:
    table = libraries._robustbench_models()
    listed = [(d.value, t.value, name) for d, threats in table.items() for t, ids in threats.items() for name in ids]
    assert [(row.dataset, row.threat, row.id) for row in robustbench_rows()] == listed
    assert len(robustbench_rows()) == 206
    for row in robustbench_rows():
        ids = libraries.robustbench_drive_ids(row.dataset, row.threat, row.id)
        assert row.parts == max(1, len(ids)), row.id


def test_robustbench_facts() -> None:
    rows = {(row.dataset, row.threat, row.id): row for row in robustbench_rows()}
    entry = rows["cifar10", "Linf", "Carmon2019Unlabeled"].entry
    assert (entry.training, entry.trained_norm, entry.trained_eps) == ("robust", "linf", 8 / 255)
    assert [(number.metric, number.value) for number in entry.published] == [
        ("natural_accuracy", 0.8969),
        ("adversarial_accuracy", 0.5953),
    ]
    assert entry.reference == "https://arxiv.org/abs/1905.13736"
    assert rows["imagenet", "Linf", "Wong2020Fast"].image_shape == (3, 288, 288)
    assert rows["imagenet", "Linf", "Salman2020Do_R18"].entry.trained_eps == 4 / 255
    assert rows["cifar10", "L2", "Standard"].entry.training == "standard"
    assert rows["cifar100", "corruptions", "Modas2021PRIMEResNet18"].entry.training == "unknown"
    for row in robustbench_rows():
        assert all(0 <= number.value <= 1 and number.source for number in row.entry.published)


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from model_zoo.catalogue import list_models; "
        "assert len(list_models('robustbench')) == 206; list_models('bundled'); "
        "loaded = {'torch', 'timm', 'torchvision', 'robustbench'} & set(sys.modules); assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_library_lists() -> None:
    timm, torchvision = list_models("timm"), list_models("torchvision")
    assert "timm:resnet18.a1_in1k" in {entry.ref for entry in timm}
    assert len(timm) > 1000
    vit = next(entry for entry in torchvision if entry.ref == "torchvision:vit_b_16/IMAGENET1K_V1")
    assert vit.family == "vision_transformer"
    assert vit.published[0].value == pytest.approx(0.81, abs=0.01)
    assert len(list_models()) == len(timm) + len(torchvision) + 206 + len(list_models("bundled"))


def test_unknown_source() -> None:
    with pytest.raises(UnknownNameError, match="unknown source with a list of models 'robustbenc'; did you mean"):
        list_models("robustbenc")


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("WideResNet-28-10", "wideresnet"),
        ("WideResNet-34-R", "wideresnet"),
        ("ResNet-50  (3x ensemble)", "resnet"),
        ("ViT-S + ConvStem", "vit"),
        ("ConvNeXtV2-L + Swin-L", "convnext"),
        ("DeiT Small", "deit"),
        ("resnet2b", "resnet"),
        ("cnn_a", "cnn_a"),
    ],
)
def test_families(architecture: str, family: str) -> None:
    assert architecture_family(architecture) == family


def test_adversarial_tags_are_not_listed_as_standard() -> None:
    facts = PretrainedFacts(
        name="x", family="x", num_classes=1000, image_shape=(3, 8, 8), mean=(), std=(), tag="tf_adv_in1k"
    )
    assert pretrained_entry("timm:x", facts).training == "unknown"
