"""Networks without a classifier as cells: estimates as of any layer, accuracies of the best heads found on it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.robustness import TargetModel
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import UsageError
from audit.information.estimator import ESTIMATORS
from audit.information.label_information import LabelInformation
from audit.information.mine import Mine
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.records import AuditRecord
from audit.representation.headless import Headless
from audit.run import intermediate
from audit.run.cell import Cell
from audit.run.encoders import results
from audit.run.evidence.rereading import Rereader
from audit.run.loading import RunOptions
from audit.run.network_audit import NetworkAudit
from audit.run.run_loop import run
from audit.run.upkeep.verification import check_record
from model_zoo.load import SourceSettings, load_model
from reports.figures.gap_figure import figure1
from reports.figures.information_figure import figure2
from reports.page.cells import headers_of
from reports.tables.ranking import leaderboard, to_csv
from reports.tables.table import to_frame

OPTIONS = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
QUICK = AuditSettings(
    Mine(
        CriticTraining(steps=6, every=3, shape=CriticShape(width=16, embedding=8, channels=4, view=8)),
        WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1),
    ),
    two_losses(PGD(steps=5)),
    seeds=(0,),
)
LABELS = replace(
    QUICK,
    estimator=LabelInformation(ProbeTraining(folds=2, steps=20), PanelSettings(trees=5, boosts=2), rounds=1, steps=2),
)
FACTORY = """
from torch import nn

def pool():
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, 3, bias=False))

def maps():
    return nn.Sequential(nn.Conv2d(3, 6, 8, 8))

def table():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)
        def forward(self, images):
            features = self.inner(images.mean((2, 3)))
            return {"last_hidden_state": features[:, None], "pooler_output": features}
    return Table()

def digits():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24, bias=False))

other = pool

def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24, bias=False), nn.ReLU(), nn.Linear(24, 10))

def colours():
    return nn.Sequential(*pool(), nn.ReLU(), nn.Linear(3, 3))
"""
EPS = 8 / 255
COLOURS = ("blue", "green", "red")


def encoder(folder: Path, name: str, network: nn.Module, classes: int = 0) -> str:
    (folder / "nets.py").write_text(FACTORY)
    torch.save(network.state_dict(), folder / f"{name}.pt")
    return f"file:{folder / f'{name}.pt'}?arch={folder / 'nets.py'}:{name}&num_classes={classes}"


def coloured(folder: Path, each: int, *, distance: float = 14.0) -> tuple[str, np.ndarray, np.ndarray]:
    """Write images of three colours and return data set, pixels in its order (N, 3, 16, 16) and labels (N,)."""
    generator, found = np.random.default_rng(0), []
    for label, name in enumerate(COLOURS):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            level = 100 + generator.normal(0, 6, 3)
            level[label] += distance
            pixels = np.clip(generator.normal(level[:, None, None], 4, (3, 16, 16)), 40, 200).astype(np.uint8)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / name / f"{number:03}.png")
            found.append((number, label, pixels / 255))
    found.sort(key=lambda item: item[:2])  # the reader alternates between the classes
    return f"folder:{folder}", np.stack([item[2] for item in found]), np.array([item[1] for item in found])


def audited(ref: str, dataset: str, folder: Path, layer: str = "output", **named: object) -> AuditRecord:
    settings = named.get("settings", QUICK)
    cell = Cell(ref, None, dataset, named.get("images"), layer, Linf(named.get("eps", EPS)), settings)
    (record,) = run([cell], folder, OPTIONS)
    return record


def mixed(folder: Path) -> tuple[str, np.ndarray]:
    """Return an encoder of mean colours, mixed by an orthogonal matrix, and the matrix."""
    matrix = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, 3, bias=False))
    network[2].weight.data = torch.tensor(matrix, dtype=torch.float32)
    return encoder(folder, "pool", network), matrix


def linear_accuracies(train: tuple, test: tuple, matrix: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return which test images a logistic regression classifies correctly, and which it keeps inside the l-inf ball.

    Features are mean colours times a matrix. No pixel is within eps of 0 or 1, so that the worst image is known.
    """
    features = [images.mean((2, 3)) @ matrix.T for images, _ in (train, test)]
    scaler = StandardScaler().fit(features[0])
    head = LogisticRegression(C=1.0, tol=1e-8, max_iter=5000).fit(scaler.transform(features[0]), train[1])
    weight = head.coef_ / scaler.scale_ @ matrix  # of the mean colours
    scores, labels = head.decision_function(scaler.transform(features[1])), test[1]
    rows = np.arange(len(labels))
    margins = scores[rows, labels][:, None] - scores
    lost = eps * np.abs(weight[labels][:, None] - weight[None]).sum(2)
    margins[rows, labels] = np.inf
    return margins.min(1) > 0, (margins - lost).min(1) > 0


def test_heads_are_trained_on_the_images_that_follow(tmp_path: Path) -> None:
    dataset, images, labels = coloured(tmp_path / "photos", 60)
    ref, matrix = mixed(tmp_path)
    record = audited(ref, dataset, tmp_path / "run", images=60)
    assert record.valid, record.reason
    correct, kept = linear_accuracies((images[60:], labels[60:]), (images[:60], labels[:60]), matrix, EPS)
    assert 0 < kept.mean() < correct.mean()
    heads = record.details["heads"]
    assert heads["trained_on"] == "120 images that follow the audited ones"
    assert heads["accuracies"]["slf"]["natural"] == pytest.approx(correct.mean())
    assert heads["accuracies"]["slf"]["adversarial"] == pytest.approx(kept.mean(), abs=1 / 60 + 1e-9)
    best = {name: max(each[name] for each in heads["accuracies"].values()) for name in ("natural", "adversarial")}
    assert (record.natural_accuracy, record.adversarial_accuracy) == (best["natural"], best["adversarial"])
    assert heads["accuracies"][record.natural_head]["natural"] == best["natural"]
    assert heads["accuracies"][record.adversarial_head]["adversarial"] == best["adversarial"]
    assert (record.num_classes, record.dimension, record.images, record.layer) == (3, 3, 60, "output")
    assert list(check_record(record)) == []


def test_a_head_trained_against_the_adversary_is_reported_where_it_is_better(tmp_path: Path) -> None:
    """One feature is fragile and separates perfectly, two are robust: only adversarial training prefers these."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 2
    images = torch.full((160, 3, 16, 16), 0.5)
    images[:, 0] += (0.01 * (2.0 * labels - 1))[:, None, None]  # inside the ball
    noise = torch.randn(160, generator=generator) * 0.1
    images[:, 1] += ((0.12 * (2.0 * labels - 1)) + noise)[:, None, None].clamp(-0.4, 0.4)
    np.savez(tmp_path / "data.npz", images=(images * 255).round().numpy().astype(np.uint8), labels=labels.numpy())
    network = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, 3, bias=False))
    network[2].weight.data = torch.diag(torch.tensor([20.0, 1.0, 1.0]))
    record = audited(encoder(tmp_path, "pool", network), f"npz:{tmp_path / 'data.npz'}", tmp_path / "run", images=80)
    assert record.valid, record.reason
    found = record.details["heads"]["accuracies"]
    assert (record.natural_head, record.adversarial_head) == ("slf", "alf")
    assert found["slf"]["natural"] == record.natural_accuracy == 1
    assert found["alf"]["adversarial"] == record.adversarial_accuracy > found["slf"]["adversarial"] + 0.2
    assert record.adversarial_gap == pytest.approx(record.natural_accuracy - record.adversarial_accuracy)


def test_the_halves_of_the_images_are_cross_fitted_where_there_are_no_others(tmp_path: Path) -> None:
    dataset, _, _ = coloured(tmp_path / "photos", 22)
    ref, _ = mixed(tmp_path)
    record, again = (audited(ref, dataset, tmp_path / name) for name in ("run", "again"))
    assert record.valid, record.reason
    assert record.details["heads"]["trained_on"] == "the other half of the audited images (cross-fitting)"
    assert record.images == 66
    assert record.natural_accuracy > 0.7
    assert (record.natural_accuracy, record.adversarial_accuracy) == (
        again.natural_accuracy, again.adversarial_accuracy,
    )  # fmt: skip


@pytest.mark.parametrize("images", [None, 55])
def test_one_image_a_class_gives_information_and_no_accuracy(tmp_path: Path, images: int | None) -> None:
    for number in range(60):
        (tmp_path / "photos" / f"n{number:03}").mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"n{number:03}" / "0.png")
    ref, _ = mixed(tmp_path)
    dataset = f"folder:{tmp_path / 'photos'}"
    record = audited(ref, dataset, tmp_path / "run", images=images)
    assert record.valid, record.reason
    count = images or 60
    assert record.details["heads"] == {
        "reason": f"no accuracy can be measured: {count} images of {count} classes are fewer than 2 a class"
    }
    assert (record.natural_accuracy, record.adversarial_accuracy, record.adversarial_gap) == (None, None, None)
    assert (record.natural_head, record.fano_accuracy_bound, record.images) == ("", None, count)
    assert record.rv is not None
    assert list(check_record(record)) == []
    refused = audited(ref, dataset, tmp_path / "run", settings=LABELS, images=images)
    assert not refused.valid
    assert f"label-information reads labels from features, and {count} images of {count} classes" in refused.reason


@pytest.mark.parametrize(("count", "classes"), [(60, 60), (59, 30), (70, 36)])
@pytest.mark.parametrize("headless", [True, False])
def test_too_few_images_a_class_are_refused_before_anything_is_computed(
    count: int, classes: int, headless: bool
) -> None:
    body = [nn.Flatten(), nn.Linear(16, 3 if headless else classes)]
    network = Headless(nn.Sequential(*body)) if headless else nn.Sequential(*body)
    heard: list[str] = []
    target = TargetModel(network, torch.rand(count, 1, 4, 4), torch.arange(count) % classes)
    audit = NetworkAudit(target, on_stage=lambda stage, _layer, _threat, _passes: heard.append(stage))
    with pytest.raises(UsageError, match=f"{count} images of {classes} classes are fewer than 2 a class"):
        audit.record("penultimate", Linf(0.1), LABELS)
    assert not heard


def test_named_data_sets_train_heads_on_their_training_split(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ref = encoder(tmp_path, "digits", nn.Sequential(nn.Flatten(), nn.Linear(64, 24, bias=False)))
    record = audited(ref, "digits", tmp_path / "run", "penultimate", images=60, eps=0.05)
    assert record.valid, record.reason
    assert record.details["heads"]["trained_on"] == "897 images of the training split"
    assert record.natural_accuracy > 0.85
    assert record.dimension == 24
    names = {check["name"] for check in record.checks if check["passed"] is None and "no classifier" in check["reason"]}
    assert len(names) == 4
    assert not record.gated
    other = audited(ref, "digits", tmp_path / "run", "penultimate", images=60, eps=0.0)
    assert (other.adversarial_accuracy, other.adversarial_head) == (other.natural_accuracy, "slf")
    assert other.natural_accuracy == record.details["heads"]["accuracies"]["slf"]["natural"]


@pytest.mark.parametrize("name", ["maps", "table"])
def test_outputs_of_any_form_are_features(tmp_path: Path, name: str) -> None:
    dataset, _, _ = coloured(tmp_path / "photos", 20)
    torch.manual_seed(0)
    state = {
        "maps": nn.Sequential(nn.Conv2d(3, 6, 8, 8)),
        "table": nn.ModuleDict({"inner": nn.Linear(3, 3, bias=False)}),
    }
    ref = encoder(tmp_path, name, state[name])
    found = [audited(ref, dataset, tmp_path / r, settings=replace(QUICK, reduce=r)) for r in ("flatten", "mean")]
    assert all(record.valid for record in found), [record.reason for record in found]
    assert [record.dimension for record in found] == {"maps": [24, 6], "table": [3, 3]}[name]
    assert all(0 <= record.adversarial_accuracy <= record.natural_accuracy <= 1 for record in found)


def test_estimates_of_an_encoder_are_those_of_the_layer_of_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Flatten(), nn.Linear(64, 24, bias=False), nn.ReLU(), nn.Linear(24, 10))
    refs = encoder(tmp_path, "digits", whole[:2]), encoder(tmp_path, "classifier", whole, 10)
    settings = replace(QUICK, estimator=Sandwich())  # reads features alone, also where they determine the logits
    encoded, classified = (
        audited(ref, "digits", tmp_path / "run", layer, images=60, eps=0.0, settings=settings)
        for ref, layer in zip(refs, ("output", "1"), strict=True)
    )
    assert encoded.normal_nats == pytest.approx(classified.normal_nats, abs=1e-4)
    assert (classified.natural_head, classified.details.get("heads")) == ("", None)


def test_layers_of_an_encoder_are_audited_each_with_heads_of_its_own(tmp_path: Path) -> None:
    dataset, _, _ = coloured(tmp_path / "photos", 18)
    ref, _ = mixed(tmp_path)
    cells = [Cell(ref, None, dataset, None, layer, Linf(EPS), QUICK) for layer in ("input", "2", "output")]
    found = run(cells, tmp_path / "run", OPTIONS)
    assert [(record.layer, record.dimension) for record in found] == [("input", 768), ("2", 3), ("output", 3)]
    assert found[1].natural_accuracy == found[2].natural_accuracy
    assert found[0].cell_id != found[1].cell_id != found[2].cell_id
    (refused,) = run([replace(cells[0], layer="logits")], tmp_path / "run", OPTIONS)
    assert "layer 'logits' does not exist: the network has no classifier; its features are 'output'" in refused.reason
    level = replace(QUICK, estimator=ESTIMATORS["label-level"])
    (refused,) = run([replace(cells[2], settings=level)], tmp_path / "run", OPTIONS)
    assert "label-level needs a layer that determines the network's logits" in refused.reason


def test_a_cell_of_an_encoder_is_certified(tmp_path: Path) -> None:
    dataset, _, _ = coloured(tmp_path / "photos", 18)
    ref, _ = mixed(tmp_path)
    settings = replace(QUICK, certificate=True)
    (record,) = run([Cell(ref, None, dataset, None, "output", Linf(EPS), settings)], tmp_path / "run", OPTIONS)
    assert record.valid, record.reason
    assert record.adversarial_accuracy <= record.certified_bound < 1
    assert record.best_head == ""  # a folder has no training split: the certificate trains no head of its own


def test_encoders_and_classifiers_share_a_leaderboard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dataset, _, _ = coloured(tmp_path / "photos", 18)
    whole = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3))
    refs = mixed(tmp_path)[0], encoder(tmp_path, "other", whole[:3]), encoder(tmp_path, "colours", whole, 3)
    cells = [Cell(ref, None, dataset, None, "penultimate", Linf(EPS), QUICK) for ref in refs]
    records = run(cells, tmp_path / "run", OPTIONS)
    table = leaderboard(to_frame(records))
    assert set(table["layer"]) == {"penultimate"}
    heads = dict(zip(table["model"], table["adversarial_head"], strict=True))
    assert heads["colours"] == ""
    assert {heads["pool"], heads["other"]} <= {"slf", "alf"}
    assert "adversarial_head" in to_csv(table).splitlines()[0]
    assert "adversarial_head" not in to_csv(leaderboard(to_frame(records[2:]))).splitlines()[0]
    for figure in (figure1, figure2):
        drawn = figure(to_frame(records).assign(quantity="I(X; g(X))"))
        said = " ".join(text.get_text() for text in drawn.findobj(Text))
        assert "Encoders (2): accuracies of the best linear heads found." in " ".join(said.split())
    shown = {header.title: header for header in headers_of(table)}["adversarial accuracy"]
    rows = [shown.cell(row).note for row in table.to_dict(orient="records")]
    assert sorted(note.endswith(" head") for note in rows) == [False, True, True]


def test_an_encoder_in_python_is_audited_as_its_cell(tmp_path: Path) -> None:
    from audit import audit_model

    dataset, images, labels = coloured(tmp_path / "photos", 18)
    ref, _ = mixed(tmp_path)
    record = audited(ref, dataset, tmp_path / "run")
    model = load_model(ref, OPTIONS.sources)
    found = audit_model(
        model,
        torch.tensor(images, dtype=torch.float32),
        torch.tensor(labels),
        "output",
        Linf(EPS),
        QUICK,
        progress=False,
    )
    assert (found.natural_accuracy, found.adversarial_accuracy) == (
        record.natural_accuracy, record.adversarial_accuracy,
    )  # fmt: skip
    assert found.natural_head == "slf"
    assert found.details["heads"]["trained_on"] == "the other half of the audited images (cross-fitting)"
    assert list(check_record(found)) == []


def test_accuracies_of_heads_are_stored_and_images_kept_beside_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run reads the heads' attacks from its folder; kept images are inside the ball."""
    monkeypatch.setattr(intermediate, "MIN_SECONDS", 0.0)
    monkeypatch.setattr(intermediate.IntermediateResults, "clear", lambda *_: None)  # as if the run was killed
    dataset, _, _ = coloured(tmp_path / "photos", 18)
    ref, _ = mixed(tmp_path)
    cell = Cell(ref, None, dataset, None, "output", Linf(EPS), QUICK)
    options = replace(OPTIONS, keep_images=True)
    (record,) = run([cell], tmp_path / "run", options)
    for path in (tmp_path / "run" / "cells").iterdir():
        path.unlink()
    monkeypatch.setattr(results, "measure_encoder", lambda *_: pytest.fail("heads are trained again"))
    (again,) = run([cell], tmp_path / "run", options)
    assert again.valid, again.reason
    assert again.details["heads"] == record.details["heads"]
    assert (again.natural_accuracy, again.adversarial_accuracy) == (
        record.natural_accuracy, record.adversarial_accuracy,
    )  # fmt: skip
    reading = Rereader(tmp_path / "run", options).read(again, cell)
    assert reading.wrong == ()
    assert "accuracies: the heads would have to be trained again" in reading.unread
