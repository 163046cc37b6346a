"""Figures 1 and 2 in miniature: train missing networks, audit them with `rvaudit run`, and draw the figures."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from audit.commands import execution
from audit.config.yaml_source import read_config
from audit.errors import UnknownNameError, UsageError
from audit.studies import figure1
from audit.studies.figure1 import SCALES, ModelSetRequest, ModelSetScale, model_set_benchmark, prepare_model_set
from audit.studies.recipes.cifar import EPS, PAPER_RECIPES, SMALL_RECIPES, CifarRecipe, model_set
from audit.training.classifiers import ClassifierTraining
from model_zoo.lookup import check_model
from reports import publish
from reports.cli import main

FAMILY = {"baseline-h": CifarRecipe("", "", "baseline-h", ClassifierTraining(), {"width": 2})}
MICRO = model_set("micro", FAMILY, ClassifierTraining(epochs=1, batch_size=16, shift=1, flip=True))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return references to noise images in ten colours, for training and for the audit."""
    folder, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 60)):
        labels = np.arange(count) % 10
        pixels = draws.integers(0, 200, (count, 32, 32, 3)) + labels[:, None, None, None] * 5
        np.savez(folder / f"{name}.npz", images=pixels.astype(np.uint8), labels=labels)
    return {"train_data": f"npz:{folder}/train.npz", "data": f"npz:{folder}/test.npz"}


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    scale = ModelSetScale("cifar10", EPS, MICRO[::2], images=50, attack="smoke", estimators=("sandwich",))
    monkeypatch.setitem(SCALES, "small", scale)


def words(references, folder, *more):
    sources = [f"--{name.replace('_', '-')}={ref}" for name, ref in references.items()]
    return ["reproduce", "figure1", "--scale", "small", *sources, "--device", "cpu", "--out", str(folder), *more]


def test_the_command_trains_audits_draws_and_resumes(references, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execution, "_calibrate_briefly", lambda *_: None)  # slow, and tested elsewhere
    folder = tmp_path / "run 1?"  # characters that a reference must quote
    assert main(words(references, folder)) == 0
    assert str(folder / "figures" / "figure1.png") in capsys.readouterr().out
    assert {path.stem for path in (folder / "models").iterdir()} == {recipe.id for recipe in MICRO[::2]}
    for name in ("leaderboard.csv", "report.html", "figures/figure1.png", "figures/figure2.svg"):
        assert (folder / name).stat().st_size > 0
    with (folder / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["model"], row["training"]) for row in rows) == [
        ("micro-baseline-h-robust-8", "robust"),
        ("micro-baseline-h-standard", "standard"),
    ]
    assert {round(float(row["eps"]) * 255, 6) for row in rows} == {8.0}
    monkeypatch.setattr(figure1, "train_cifar", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(publish, "write_reports", lambda _folder: [])
    again = words(references, folder, "--json")
    again[1] = "figure2"
    assert main(again) == 0
    captured = capsys.readouterr()
    assert len(json.loads(captured.out)) == 2
    assert captured.err == f"Note: nothing was to do: {folder} holds all 2 cells already\n"


def test_networks_of_other_images_are_not_overwritten(references, tmp_path):
    request, heard = ModelSetRequest("small", **references), []
    path = prepare_model_set(request, tmp_path, progress=lambda *line: heard.append(line))
    shares = [share for _, share in heard]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    for section in read_config(path).models:
        check_model(section.ref)  # like `rvaudit validate`
    with pytest.raises(UsageError, match="is of other settings or training images"):
        prepare_model_set(replace(request, data=references["train_data"], train_data=references["data"]), tmp_path)


def test_the_tiny_scale_is_the_bundled_models_without_training(tmp_path, monkeypatch):
    monkeypatch.setattr(figure1, "train_cifar", lambda *_: pytest.fail("trained"))
    config = read_config(prepare_model_set(ModelSetRequest("tiny"), tmp_path))
    assert (config.dataset, [each.ref for each in config.models]) == ("digits", ["bundled:digits-*"])
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.yaml"]


def test_the_paper_scale_audits_fifteen_networks_at_eight_grey_levels(tmp_path):
    config = model_set_benchmark(ModelSetRequest("paper"), tmp_path)
    assert [each.ref.rpartition("/")[2] for each in config.models] == [
        f"{recipe.id}.safetensors" for recipe in PAPER_RECIPES
    ]
    assert (len(PAPER_RECIPES), len(SMALL_RECIPES)) == (15, 15)
    assert config.threats[0].eps == (8 / 255,)


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"scale": "smal"}, UnknownNameError, "did you mean 'small'"),
        ({"scale": "small", "dataset": "digits"}, UsageError, "scale small is of data set cifar10, not 'digits'"),
        ({"scale": "tiny", "data": "npz:a", "train_data": "npz:b"}, UsageError, "scale tiny trains nothing"),
        ({"scale": "small", "data": "npz:a"}, UsageError, "must both be given, or neither"),
        ({"scale": "small", "data": "npz:a", "train_data": "npz:a"}, UsageError, "audit networks on held-out images"),
    ],
)
def test_invalid_requests_are_refused(fields, error, sentence):
    with pytest.raises(error, match=sentence):
        ModelSetRequest(**fields)
