"""Figures 1 and 2 in miniature: networks trained where they are missing, audited by an ordinary run, and drawn."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from audit.commands import verbs as cli
from audit.errors import UnknownNameError, UsageError
from audit.run.cell import read_config
from audit.studies import figure1
from audit.studies.figure1 import SCALES, ModelSetRequest, Scale, benchmark, prepare
from audit.studies.recipes.cifar import EPS, PAPER, SMALL, CifarRecipe, recipes
from audit.training.classifiers import ClassifierTraining
from model_zoo.lookup import check_model
from reports import publish
from reports.cli import main

FAMILY = {"baseline-h": CifarRecipe("", "", "baseline-h", ClassifierTraining(), {"width": 2})}
MICRO = recipes("micro", FAMILY, ClassifierTraining(epochs=1, batch_size=16, shift=1, flip=True))


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Noise of ten colours, to train on and to audit on."""
    folder, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 60)):
        labels = np.arange(count) % 10
        pixels = draws.integers(0, 200, (count, 32, 32, 3)) + labels[:, None, None, None] * 5
        np.savez(folder / f"{name}.npz", images=pixels.astype(np.uint8), labels=labels)
    return {"train_data": f"npz:{folder}/train.npz", "data": f"npz:{folder}/test.npz"}


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    scale = Scale("cifar10", EPS, MICRO[::2], images=50, attack="smoke", estimators=("sandwich",))
    monkeypatch.setitem(SCALES, "small", scale)


def words(references, folder, *more):
    sources = [f"--{name.replace('_', '-')}={ref}" for name, ref in references.items()]
    return ["reproduce", "figure1", "--scale", "small", *sources, "--device", "cpu", "--out", str(folder), *more]


def test_the_command_trains_audits_and_draws_and_goes_on_where_it_was(references, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_calibrate_briefly", lambda *_: None)  # of every run; tested there
    folder = tmp_path / "run 1?"  # what a reference must quote
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
    assert captured.err == ""  # every cell was already there


def test_networks_of_other_images_are_not_overwritten(references, tmp_path):
    request, heard = ModelSetRequest("small", **references), []
    path = prepare(request, tmp_path, watch=lambda *line: heard.append(line))
    shares = [share for _, share in heard]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    for section in read_config(path).models:
        check_model(section.ref)  # as `rvaudit validate` does
    with pytest.raises(UsageError, match="is of other settings or training images"):
        prepare(replace(request, data=references["train_data"], train_data=references["data"]), tmp_path)


def test_the_tiny_scale_is_the_bundled_zoo_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(figure1, "train_cifar", lambda *_: pytest.fail("trained"))
    config = read_config(prepare(ModelSetRequest("tiny"), tmp_path))
    assert (config.dataset, [each.ref for each in config.models]) == ("digits", ["bundled:digits-*"])
    assert [path.name for path in tmp_path.iterdir()] == ["benchmark.yaml"]


def test_the_paper_scale_audits_fifteen_networks_at_eight_grey_levels(tmp_path):
    config = benchmark(ModelSetRequest("paper"), tmp_path)
    assert [each.ref.rpartition("/")[2] for each in config.models] == [f"{recipe.id}.safetensors" for recipe in PAPER]
    assert (len(PAPER), len(SMALL)) == (15, 12)
    assert config.threats[0].eps == (8 / 255,)


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"scale": "smal"}, UnknownNameError, "did you mean 'small'"),
        ({"scale": "small", "dataset": "digits"}, UsageError, "scale small is of data set cifar10, not 'digits'"),
        ({"scale": "tiny", "data": "npz:a", "train_data": "npz:b"}, UsageError, "scale tiny trains nothing"),
        ({"scale": "small", "data": "npz:a"}, UsageError, "must both be given, or neither"),
        ({"scale": "small", "data": "npz:a", "train_data": "npz:a"}, UsageError, "audit networks on images they never"),
    ],
)
def test_requests_that_mean_nothing_are_refused(fields, error, sentence):
    with pytest.raises(error, match=sentence):
        ModelSetRequest(**fields)
