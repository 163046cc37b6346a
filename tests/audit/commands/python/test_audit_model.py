"""`audit_model`: every form of data, layers, threats and settings gives the plain record, or one sentence."""

import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import audit
from audit import L2, AuditRecord, AuditRecords, AuditSettings, AuditStage, Linf, audit_model
from audit.adversary.label_attack import TIERS, two_losses
from audit.adversary.pgd import PGD
from audit.errors import AuditError, MismatchError, UnknownNameError, UsageError
from audit.information.label_entropy import LabelEntropy
from audit.run.upkeep import pass_meter
from model_zoo import wrap

ATTACK = two_losses(PGD(steps=1))
SETTINGS = AuditSettings(LabelEntropy(), ATTACK, seeds=(0,))
IMAGES = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def same(first: AuditRecord, second: AuditRecord) -> bool:
    """Return whether two records agree in everything but time."""
    return {**first.to_dict(), "seconds": 0, "timing": {}} == {**second.to_dict(), "seconds": 0, "timing": {}}


@pytest.fixture(scope="module")
def plain() -> AuditRecord:
    record = audit_model(network(), IMAGES, LABELS, "logits", Linf(0.1), SETTINGS)
    assert isinstance(record, AuditRecord)
    assert record.natural_accuracy == float((network()(IMAGES).argmax(1) == LABELS).double().mean())
    return record


class Pictures:
    """A data set of PIL pictures with labels, as torchvision's without a transform; counts what is decoded."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.decoded = pixels, 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        self.decoded += 1
        return Image.fromarray(self.pixels[index, 0]), index % 3


PAIRS = TensorDataset(IMAGES, LABELS)
DATA = {
    "pair": (IMAGES, LABELS),
    "arrays": (IMAGES.numpy(), LABELS.numpy()),
    "doubles": (IMAGES.double(), LABELS.int()),
    "mapping": {"pixel_values": IMAGES, "label": LABELS},
    "dataset": PAIRS,
    "loader": DataLoader(PAIRS, batch_size=7),
    "loader of mappings": DataLoader([{"image": x, "label": int(y)} for x, y in PAIRS], batch_size=32),
}


@pytest.mark.parametrize("name", DATA)
def test_every_form_of_the_same_data_gives_the_same_record(name: str, plain: AuditRecord) -> None:
    assert same(audit_model(network(), DATA[name], layer="logits", threat=Linf(0.1), settings=SETTINGS), plain)


def test_bytes_and_pictures_are_divided_by_255() -> None:
    pixels = (IMAGES * 255).round().to(torch.uint8)
    reference = audit_model(network(), pixels.float() / 255, LABELS, threat=0.1, settings=SETTINGS)
    pictures = Pictures(pixels.numpy())
    for data in ((pixels, LABELS), (pixels.numpy(), LABELS.tolist()), pictures):
        assert same(audit_model(network(), data, threat=0.1, settings=SETTINGS), reference)
    pictures.decoded = 0
    assert audit_model(network(), pictures, threat=0.1, settings=SETTINGS, count=51).images == 51
    assert pictures.decoded == 51


@pytest.mark.parametrize("count", [50, 59])
def test_the_first_images_of_a_loader_are_those_of_its_data(count: int) -> None:
    first = audit_model(network(), IMAGES[:count], LABELS[:count], threat=0.1, settings=SETTINGS)
    for name in ("loader", "dataset", "pair"):
        assert same(audit_model(network(), DATA[name], threat=0.1, settings=SETTINGS, count=count), first)


@pytest.mark.parametrize("threat", [0.1, "0.1", "linf:0.1", "linf 0.1", "Linf: 0.1", "25.5/255", np.float64(0.1)])
def test_threats_in_words_and_numbers(threat: Any, plain: AuditRecord) -> None:
    assert same(audit_model(network(), IMAGES, LABELS, threat=threat, settings=SETTINGS), plain)


def test_settings_by_name() -> None:
    named = AuditSettings("label-level", "smoke", seeds=[0, np.int64(4)])
    assert named == AuditSettings(LabelEntropy(), TIERS["smoke"], seeds=(0, 4)) == AuditSettings(
        LabelEntropy, TIERS["smoke"], seeds=range(0, 5, 4)
    )  # fmt: skip
    assert hash(named) == hash(AuditSettings(LabelEntropy(), TIERS["smoke"], seeds=(0, 4)))


def test_several_cells_are_those_of_single_calls_and_every_stage_is_told() -> None:
    told: list[AuditStage] = []
    choice = {"estimator": ["label-level", "sandwich"], "attack": ATTACK, "seeds": [0, 1]}
    found = audit_model(network(), PAIRS, layer=["logits", "1"], threat=[0.05, L2(0.3)], **choice, on_stage=told.append)
    assert isinstance(found, AuditRecords)
    cells = [(record.estimator, record.layer, record.norm) for record in found]
    assert cells == [(e, x, n) for e in choice["estimator"] for x in ("logits", "1") for n in ("linf", "l2")]
    assert len({record.cell_id for record in found}) == 8
    for record, threat in ((found[0], 0.05), (found[7], "l2:0.3")):
        alone = audit_model(
            network(), PAIRS, layer=record.layer, threat=threat, **{**choice, "estimator": record.estimator}
        )
        assert isinstance(alone, AuditRecord)
        assert same(alone, record)
    assert [stage.done for stage in told] == list(range(told[0].total))
    assert len(told) == 2 + 2 * 2 * 2 * (1 + 2)  # attacks; cases of estimators, layers and seeds
    assert told[0].text == "attack, linf 0.05"
    assert (told[0].share, told[-1].text) == (0.0, "worst case, seed 1, 1, l2 0.3")


class Passed(nn.Module):
    """A network that counts the images it passes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.seen = network(), 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        found: Tensor = self.body(images)
        return found


def test_progress_moves_within_attacks_searches_and_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = list[AuditStage]()
    monkeypatch.setattr(pass_meter, "_EVERY", 0.0)
    monkeypatch.setattr("audit.commands.python.audit.progress_line", lambda _total, **_: nullcontext(shown.append))
    counted, attack = Passed(), replace(ATTACK, fast=False)
    audit_model(counted, PAIRS, threat=0.3, estimator="label-level", attack=attack, seeds=(0,), certificate=True)
    for name in ("attack", "worst case, seed 0", "certificate"):
        within = [stage.within for stage in shown if stage.name == name]
        assert within[0] == 0.0
        assert sorted(set(within)) == within[: len(set(within))]  # it never moves back
        assert len(set(within)) >= 5, name
    shares = [stage.share for stage in shown]
    assert shares == sorted(shares)
    assert {stage.total for stage in shown} == {4}
    last = re.fullmatch(r"about \d+ s left, ([\d,]+) of about ([\d,]+) passes", shown[-1].passed)
    assert last is not None
    done, expected = (int(number.replace(",", "")) for number in last.groups())
    assert 0.5 * counted.seen <= done <= 1.5 * counted.seen
    assert done <= expected


def test_a_list_of_one_is_a_collection() -> None:
    found = audit_model(network(), PAIRS, layer=["logits"], threat=0.1, settings=SETTINGS)
    assert isinstance(found, AuditRecords)
    assert [record.layer for record in found] == ["logits"]


def test_name_family_and_training_are_stated_and_decide_no_number(plain: AuditRecord) -> None:
    facts = {"name": "mine", "family": "tiny", "training": "robust", "trained_eps": 0.1, "dataset": "noise"}
    found = audit_model(network(), PAIRS, threat=0.1, settings=SETTINGS, **facts)
    assert {name: getattr(found, {"name": "model"}.get(name, name)) for name in facts} == facts
    assert (found.cell_id, found.rv) == (plain.cell_id, plain.rv)
    assert (plain.model, plain.family, plain.training, plain.dataset) == ("Sequential",) * 2 + ("unknown", "python")


def test_a_certificate_is_made_where_it_is_asked_for() -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    nn.init.zeros_(constant[1].weight)  # every image has the same features
    found = audit_model(constant, PAIRS, threat=0.1, settings=SETTINGS, certificate=True)
    assert found.certified_bound == pytest.approx(1 / 3)
    assert audit_model(constant, PAIRS, threat=0.1, settings=SETTINGS).certified_bound is None


class Scaled(nn.Module):
    """A network that expects images normalised by mean 0.4 and deviation 0.2."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images * 0.2 + 0.4)


@pytest.mark.parametrize("form", [0.4, [0.4], np.array([0.4]), torch.tensor([0.4]), torch.full((1, 1, 1), 0.4)])
def test_a_wrapped_network_takes_images_in_pixel_units(form: Any) -> None:
    wrapped = wrap(Scaled(), form, (0.2,))
    assert torch.allclose(wrapped(IMAGES), network()(IMAGES), atol=1e-5)
    assert audit.layer_names(wrapped) == audit.layer_names(Scaled())
    found = audit_model(wrapped, PAIRS, layer="inner.1", threat=0.1, settings=SETTINGS)
    right = (network()(IMAGES).argmax(1) == LABELS).double().mean()
    assert found.natural_accuracy == float(right)
    assert (found.model, found.layer) == ("Scaled", "inner.1")


def test_normalisation_is_part_of_the_identity() -> None:
    ids = {audit_model(wrap(Scaled(), 0.4, std), PAIRS, threat=0.1, settings=SETTINGS).cell_id for std in (0.2, 0.3)}
    assert len(ids) == 2


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((123.675, 116.28, 103.53), (58.4, 57.1, 57.4), "units of 0 to 255: .* write (0.485, 0.456, 0.406)"),
        ((0.5, 0.5, 0.5), (0.2, 0.2), "mean has 3 numbers, std has 2"),
        (0.5, 0.0, "std (0.0,) must be above 0"),
        (0.5, "0.2", "std '0.2' is not a finite number"),
        (float("nan"), 0.2, "mean nan is not a finite number"),
        ((), 0.2, "mean () is not a finite number"),
    ],
)
def test_no_normalisation(mean: Any, std: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said).replace(r"\.\*", ".*").replace("\\ ", " ")):
        wrap(network(), mean, std)


def test_a_network_is_wrapped_once() -> None:
    with pytest.raises(UsageError, match="normalises its images already"):
        wrap(wrap(network(), 0.4, 0.2), 0.4, 0.2)


BAD = [
    ({"estimator": "label-infromation"}, UnknownNameError, "'label-infromation'; did you mean 'label-information'"),
    ({"estimator": 3}, UsageError, "estimator 3 is not legal: write one of sandwich, mine"),
    ({"estimator": ["sandwich", "sandwich"]}, UsageError, "must name at least one, each once"),
    ({"attack": "smok"}, UnknownNameError, "unknown attack tier 'smok'; did you mean 'smoke'"),
    ({"attack": 40}, UsageError, "attack 40 is not legal: write one of smoke, audit, leaderboard"),
    ({"seeds": 3}, UsageError, "seeds 3 is not a sequence of whole numbers: write (0, 1, 2) for three seeds"),
    ({"seeds": [0.5]}, UsageError, "seeds [0.5] must be whole numbers"),
    ({"seeds": [1, 1]}, UsageError, "seeds [1, 1] must be at least one, each named once"),
    ({"reduce": "maen"}, UnknownNameError, "unknown reduction 'maen'; did you mean 'mean'"),
    ({"layer": 3}, UsageError, "layer 3 is not the name of a layer: write 'input', 'penultimate', 'logits'"),
    ({"layer": []}, UsageError, "layer is an empty list"),
    ({"layer": "logit"}, UnknownNameError, "unknown layer 'logit'; did you mean 'logits'"),
    ({"threat": None}, UsageError, "threat is missing: write 8/255, 'linf:8/255'"),
    ({"threat": "lnf:8/255"}, UnknownNameError, "unknown norm 'lnf'; did you mean 'linf'"),
    ({"threat": "linf:eight"}, UsageError, "threat 'linf:eight': not a number or fraction such as 8/255: 'eight'"),
    ({"threat": 8}, UsageError, "eps 8.0 is outside [0, 1], the range of pixels: write 8/255 for 8 grey levels"),
    ({"threat": {"eps": 1}}, UsageError, "threat is {'eps': 1}, which is no radius"),
    ({"settings": "smoke"}, UsageError, "settings is a str: write AuditSettings("),
    ({"training": "adversarial"}, UnknownNameError, "unknown training 'adversarial'"),
    ({"estimater": "mine"}, UnknownNameError, "unknown option of audit_model 'estimater'; did you mean 'estimator'"),
    ({"count": 0}, UsageError, "count 0 is not a number of images"),
    ({"count": 61}, UsageError, "61 images were asked for, the data has 60"),
    ({"data": 7}, UsageError, "data is a int: write images and labels, a pair"),
    ({"data": IMAGES}, UsageError, "labels are missing: audit_model(model, images, labels, ...)"),
    ({"data": [IMAGES]}, UsageError, "data is a list of 1 values: write a pair (images, labels)"),
    ({"data": {"a": IMAGES}}, UsageError, "data has a; images are looked for under images, image"),
    ({"data": {"x": IMAGES, "b": 1}}, UsageError, "data has x, b; labels are looked for under labels, label"),
    ({"data": DataLoader([1, 2])}, UsageError, "an item of the data is a Tensor, not a pair of image and label"),
    ({"data": TensorDataset(IMAGES[:0], LABELS[:0])}, UsageError, "the data set holds no images"),
    ({"data": [(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 4), 1), 2][:3]}, UsageError, "list of 3 values"),
    ({"data": (torch.zeros(60, 5, 6, 3), LABELS)}, MismatchError, "(60, 5, 6, 3) have their channels last"),
    ({"data": (IMAGES * 2, LABELS)}, UsageError, "rvaudit.wrap(model, mean, std)"),
    ({"data": (["a"] * 60, LABELS)}, MismatchError, "a list that is no array of numbers"),
    ({"model": 5}, UsageError, "model is a int: write a torch.nn.Module, a reference such as 'timm:resnet18'"),
    ({"model": "bundled:digits-vgg-robsut"}, UnknownNameError, "did you mean"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "said"), BAD, ids=[f"{n}: {c[2][:40]}" for n, c in enumerate(BAD)])
def test_what_is_not_legal_is_one_sentence(changes: dict[str, Any], kind: type[AuditError], said: str) -> None:
    words = {"model": network(), "data": PAIRS, "threat": 0.1, "settings": SETTINGS, **changes}
    with pytest.raises(kind, match=re.escape(said)) as caught:
        audit_model(words.pop("model"), words.pop("data"), **words)
    assert "\n" not in str(caught.value)


def test_images_of_several_sizes_are_refused() -> None:
    class Uneven(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(1, 4, 4 + index % 2), 0

    with pytest.raises(MismatchError, match=r"several shapes, such as \(1, 4, 4\) and \(1, 4, 5\): resize them"):
        audit_model(network(), Uneven(IMAGES), threat=0.1, settings=SETTINGS)


def test_a_radius_in_words_is_not_a_number() -> None:
    with pytest.raises(UsageError, match="eps '8/255' is not a number: write 8 / 255 for 8 grey levels"):
        Linf("8/255")  # type: ignore[arg-type]
