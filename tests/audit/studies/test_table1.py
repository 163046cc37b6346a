"""Table 1 in miniature: all rows from learned encoders to measured heads, and resumed runs."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import UnknownNameError, UsageError
from audit.representation.layers import Representation
from audit.run.cell import Cell
from audit.run.run_loop import run as audit_cells
from audit.studies import table1, table1_encoders
from audit.studies.table1 import COLUMNS, HEADS, ROWS, run_table1
from audit.studies.table1_settings import DATASETS, PAPER_PGD, SCALES, Table1Request, Table1Scale, load_splits
from audit.training.objectives import ObjectiveSettings
from model_zoo.images.datasets import ImageRequest, check_fit, load_images
from model_zoo.load import SourceSettings, load_model
from reports.cli import main

MICRO = Table1Scale(
    width=16,
    critic=ObjectiveSettings(width=8),
    image_branch="cached",
    epochs=2,
    rate=1e-3,
    head_epochs=2,
    robust_epochs=1,
    head_rate=5e-3,
    supervised_epochs=1,
    supervised_rate=4e-3,
    every=1,
    train_images=40,
    test_images=10,
    attack="smoke",
    batch_size=18,
)
OFFLINE = SourceSettings(offline=True)
REQUEST = Table1Request("digits", MICRO, "micro")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, heard = tmp_path_factory.mktemp("table1"), []
    rows = run_table1(REQUEST, 1, folder, progress=lambda *line: heard.append(line))
    return folder, rows, heard


def written(folder):
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def npz(path, count, start=0):
    images = np.arange(start, start + count, dtype=np.float32)[:, None, None, None] / 1000
    np.savez(path, images=np.broadcast_to(images, (count, 1, 8, 8)), labels=np.arange(count) % 10)
    return f"npz:{path}"


def test_every_row_and_head_is_measured_and_written(run):
    folder, rows, _ = run
    assert {(row["row"], row["head"]) for row in rows} == {(row, head) for row in ROWS for head in HEADS}
    assert len(rows) == len(ROWS) * len(HEADS)
    assert list(written(folder)[0]) == list(COLUMNS)
    assert [(x["row"], float(x["natural"])) for x in written(folder)] == [(x["row"], x["natural"]) for x in rows]
    for row in rows:
        assert 0 <= row["adversarial_audit"] <= row["natural"] <= 1
        assert (row["images"], row["eps"], row["attack"], row["seed"]) == (10, 0.2, "smoke", 0)


def test_progress_is_monotone_and_ends_at_the_total(run):
    done, total = [line[1] for line in run[2]], {line[2] for line in run[2]}
    assert done == sorted(done)
    assert total == {done[-1]}
    assert any("worst-case g, epoch 2 of 2" in line[0] for line in run[2])


def test_a_finished_table_is_not_computed_again(run, monkeypatch):
    folder, rows, _ = run
    monkeypatch.setattr(table1_encoders, "train_representation", lambda *_: pytest.fail("computed again"))
    for name in ("train_classifier", "fit_head", "measure_accuracy"):
        monkeypatch.setattr(table1, name, lambda *_: pytest.fail("computed again"))
    again = run_table1(REQUEST, 1, folder)
    assert [(row["row"], row["head"]) for row in again] == [(row["row"], row["head"]) for row in rows]


def test_a_resumed_table_has_the_same_numbers(run, tmp_path, monkeypatch):
    class StoppedError(Exception):
        pass

    measured, measure = [], table1.measure_accuracy

    def failing(*arguments):
        measured.append(None)
        if len(measured) > 5:
            raise StoppedError
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(table1, "measure_accuracy", failing)
        with pytest.raises(StoppedError):
            run_table1(REQUEST, 1, tmp_path)
    assert len(written(tmp_path)) == 2
    taken = []
    train = table1_encoders.train_representation
    monkeypatch.setattr(table1_encoders, "train_representation", lambda *a: taken.append(None) or train(*a))
    run_table1(REQUEST, 1, tmp_path)
    assert len(taken) == 1  # the other encoder is loaded from the folder
    assert (tmp_path / "rows.csv").read_text() == (run[0] / "rows.csv").read_text()
    assert not list(tmp_path.glob("*.checkpoint"))


def test_rows_of_other_settings_are_refused(run):
    with pytest.raises(UsageError, match="holds rows of other settings"):
        run_table1(replace(REQUEST, scale=replace(MICRO, rate=2e-3)), 1, run[0])


def test_a_learned_encoder_loads_by_its_card(run):
    folder = run[0] / "encoders"
    cards = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    learned = {"digits-micro-standard-seed0", "digits-micro-worst-case-seed0"}
    assert set(cards) == learned | {f"{name}-{kind}-h" for name in learned for kind in ("standard", "robust")}
    loaded = load_model(f"file:{folder}/digits-micro-worst-case-seed0.safetensors", OFFLINE)
    assert (loaded.num_classes, loaded.image_shape, loaded.entry.pinned) == (0, (1, 8, 8), True)
    images = torch.rand(2, 1, 8, 8)
    assert Representation(loaded.network, "logits")(images).shape == (2, 64)
    assert Representation(loaded.network, "penultimate")(images).shape == (2, 256)
    card = cards["digits-micro-worst-case-seed0"]
    assert (card["mutual_information"]["beta"], card["mutual_information"]["norm"]) == (1.0, "linf")
    trained = {name: (each["training"], each["trained_eps"]) for name, each in cards.items()}
    plain = {"digits-micro-standard-seed0", "digits-micro-standard-seed0-standard-h"}
    assert trained == {name: ("standard", 0.0) if name in plain else ("robust", 0.2) for name in cards}


def test_a_saved_encoder_with_head_has_the_accuracy_of_its_row(run):
    folder, name = run[0] / "encoders", "digits-micro-worst-case-seed0"
    loaded = load_model(f"file:{folder}/{name}-robust-h.safetensors", OFFLINE)
    images = load_images("digits", ImageRequest(count=10))
    check_fit(loaded, images)  # the precondition of an audit
    (row,) = (row for row in run[1] if (row["row"], row["head"]) == ("worst-case g, robust h", "linear"))
    right = (loaded.network(images.images).argmax(1) == images.labels).float().mean()
    assert float(right) == pytest.approx(row["natural"])
    encoder = load_model(f"file:{folder}/{name}.safetensors", OFFLINE)
    features = Representation(loaded.network, "penultimate")(images.images)
    assert torch.equal(features, encoder.network(images.images))


def test_an_encoder_with_head_is_audited_at_its_features(run, tmp_path):
    ref = f"file:{run[0]}/encoders/digits-micro-worst-case-seed0-robust-h.safetensors"
    settings = AuditSettings(attack=TIERS["smoke"], seeds=(0,))
    (record,) = audit_cells([Cell(ref, None, "digits", 50, "penultimate", Linf(0.02), settings)], tmp_path)
    assert record.valid, record.reason
    assert (record.layer, record.dimension, record.num_classes) == ("penultimate", 64, 10)
    assert (record.training, record.trained_eps, record.family) == ("robust", 0.2, "paper-encoder")
    assert record.worst_nats < record.normal_nats


def test_an_encoder_without_a_head_can_be_certified_but_not_attacked(run, capsys):
    ref = f"file:{run[0]}/encoders/digits-micro-standard-seed0.safetensors"
    options = ["--dataset", "digits", "--eps", "0.2", "--images", "4"]
    assert (
        main(
            [
                "certify",
                ref,
                *options,
                "--layer",
                "output",
                "--hubs",
                "1",
                "--hubs-only",
                "--head-images",
                "0",
                "--json",
            ]
        )
        == 0
    )
    (row,) = json.loads(capsys.readouterr().out)
    assert row["dimension"] == 64
    assert 0 < row["certified_bound"] <= 1
    assert main(["attack", ref, *options]) == 2
    said = capsys.readouterr().err
    assert "has no classifier, so its accuracy on digits is not defined" in said
    assert "audit trains heads on it (--layer output), certify bounds every head" in said


def test_accuracies_are_measured_in_full_precision(tmp_path, monkeypatch):
    seen, measure = [], table1.measure_accuracy

    def watched(network, images, *rest):
        seen.append((torch.is_autocast_enabled("cpu"), network(images).dtype))
        return measure(network, images, *rest)

    monkeypatch.setattr(table1, "measure_accuracy", watched)
    monkeypatch.setattr(table1, "HEADS", ("linear",))
    scale = replace(MICRO, precision="bf16", epochs=1, head_epochs=1, supervised_epochs=1)
    rows = run_table1(replace(REQUEST, scale=scale), 1, tmp_path)
    assert len(rows) == len(ROWS)
    assert set(seen) == {(False, torch.float32)}


def test_a_single_file_is_divided_into_training_validation_and_test(tmp_path):
    request = replace(REQUEST, scale=SCALES["tiny"], data=npz(tmp_path / "all.npz", 100))
    parts = load_splits(request)
    assert [len(part.images) for part in parts[:3]] == [72, 8, 20]
    order = torch.cat([part.images[:, 0, 0, 0] for part in parts[:3]])
    assert torch.equal(order, torch.arange(100) / 1000)
    assert parts.classes == 10


def test_two_files_are_truncated_to_the_scale(tmp_path):
    train, test = npz(tmp_path / "train.npz", 90), npz(tmp_path / "test.npz", 30, start=500)
    parts = load_splits(replace(REQUEST, data=test, train_data=train))
    assert [len(part.images) for part in parts[:3]] == [36, 4, 10]
    assert float(parts.test.images.min()) == 0.5
    with pytest.raises(UsageError, match="5 training images are too few"):
        load_splits(replace(REQUEST, data=test, train_data=npz(tmp_path / "few.npz", 5)))


def test_invalid_requests_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'mnist'"):
        Table1Request("mnits", MICRO)
    with pytest.raises(UnknownNameError, match="did you mean 'smoke'"):
        Table1Request("digits", replace(MICRO, attack="smok"))
    with pytest.raises(UsageError, match="needs data"):
        Table1Request("digits", MICRO, train_data="npz:x")


def test_scales_and_radii_match_the_paper():
    paper = Table1Request("cifar10", SCALES["paper"]).mutual_information(1.0, 0)
    assert (paper.epochs, paper.learning_rate, paper.batch_size, paper.critic.width) == (500, 1e-4, 128, 2048)
    assert (paper.critic.name, paper.image_branch, paper.flip, SCALES["paper"].width) == (
        "ref-local",
        "detached",
        True,
        64,
    )
    assert PAPER_PGD.relative_step * 8 / 255 == pytest.approx(0.01, abs=1e-4)
    assert {name: round(each.eps * 255, 2) for name, each in DATASETS.items() if name != "digits"} == {
        "mnist": 76.5,
        "fashion-mnist": 25.5,
        "svhn": 4.0,
        "cifar10": 8.0,
    }


def test_the_command_writes_rows_and_page(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SCALES, "tiny", replace(MICRO, seeds=1))
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    arguments = ["reproduce", "table1", "--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert "worst-case g, standard h, E.S. on test" in page
    assert (tmp_path / "table1.md").read_text() in page
    assert main([*arguments, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 16
    assert main([*arguments, "--scale", "tinny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err


def test_studies_are_listed_and_unknown_ones_refused(capsys):
    assert main(["reproduce", "--help"]) == 0
    assert "table1" in capsys.readouterr().out
    assert main(["reproduce", "table9"]) == 2
