"""The commands `audit`, `calibrate`, `layers`, `models` and `train`: standard output, files, and lazy imports."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audit.studies import recipes
from audit.studies.recipes import DigitsRecipe
from audit.studies.recipes import digits as digits_recipes
from reports.cli import main
from reports.tables.columns import CERTIFICATE, HEADS, LEDGER, PROBE
from reports.tables.table import COLUMNS

REF = "bundled:digits-vgg-robust"
QUICK = ("--dataset", "digits", "--eps", "0", "--images", "60", "--seeds", "1", "--estimator", "sandwich")


def test_an_audit_prints_one_json_array_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", REF, *QUICK, "--layer", "logits", "--layer", "input", "--json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [(row["layer"], row["eps"], row["images"], row["seeds"]) for row in rows] == [
        ("logits", 0.0, 60, 1),
        ("input", 0.0, 60, 1),
    ]
    (folder,) = (tmp_path / "runs").iterdir()
    header = (folder / "leaderboard.csv").read_text().splitlines()[0].split(",")
    assert list(rows[0]) == list(COLUMNS)
    absent = (*CERTIFICATE, *LEDGER, *PROBE, *HEADS)  # none was computed or fitted
    assert header[1:] == [name for name in COLUMNS if name not in absent]
    assert header[0] == "rank"
    assert folder.name.startswith("digits-vgg-robust-")
    assert main(["audit", REF, *QUICK, "--layer", "logits", "--layer", "input"]) == 0
    shown = capsys.readouterr().out
    assert "Accuracies are measured; nats, RV and the bound are estimates." in shown
    assert str(folder.relative_to(tmp_path) / "report.html") in shown
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_corrected_request_may_keep_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", REF, *QUICK, "--layer", "logit", "--out", "run"]) == 2
    assert not Path("run").exists()  # a request that is wrong leaves nothing behind
    assert main(["audit", REF, *QUICK, "--layer", "logits", "--out", "run"]) == 0
    (record,) = Path("run/cells").iterdir()
    assert json.loads(record.read_text())["status"] == "valid"
    capsys.readouterr()
    assert main(["audit", REF, *QUICK, "--layer", "input", "--out", "run"]) == 2
    assert "run holds a run of another configuration" in capsys.readouterr().err


def test_a_failed_audit_still_prints_strict_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", REF, *QUICK, "--layer", "logit", "--json"]) == 2
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out, parse_constant=lambda name: pytest.fail(name))
    assert row["status"].startswith("failed: unknown layer 'logit'")
    assert row["rv"] is None
    assert captured.err.count("unknown layer") == 1


@pytest.mark.parametrize(("options", "code"), [((), 0), (("--estimator", "label-information"), 2)])
def test_an_estimator_that_runs_by_default_may_not_suit_the_images(
    options: tuple[str, ...], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Photographs of one image a class: `sandwich` is measured, and `label-information` refused with the reason."""
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(16, 52)).state_dict(), tmp_path / "net.pth")
    factory = (
        "from torch import nn\n\ndef net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 52))\n"
    )
    (tmp_path / "nets.py").write_text(factory)
    pixels = np.random.default_rng(0).integers(0, 256, (52, 1, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(52))
    ref = f"file:{tmp_path / 'net.pth'}?arch={tmp_path / 'nets.py'}:net&num_classes=52"
    audited = ["audit", ref, "--dataset", f"npz:{tmp_path / 'data.npz'}", "--layer", "logits", "--eps", "0"]
    more = ["--trust-code", "--seeds", "1", "--out", str(tmp_path / "run"), *options]
    assert main([*audited, *more]) == code
    said = capsys.readouterr().err
    assert "label-information reads labels from features, and 52 images of 52 classes are fewer than 2 a class" in said
    assert (tmp_path / "run" / "cells").exists() == (not options)


def test_estimators_side_by_side_and_their_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["audit", REF, *QUICK[:-1], "label-level", "--estimator", "sandwich", "--out", "run"]
    assert main(words) == 0
    assert "label-level" in capsys.readouterr().out
    frame = (tmp_path / "run" / "leaderboard.csv").read_text()
    assert frame.count("sandwich") == 1
    keys = sorted(path.name.rpartition("-")[0] for path in (tmp_path / "run" / "calibration").iterdir())
    assert keys == ["label-level", "sandwich"]
    assert main(["leaderboard", "run"]) == 0
    assert "calibration: passed on" in capsys.readouterr().out


def test_calibrating_one_estimator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--estimator", "label-level", "--brief", "--json", "--out", "run"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["channel"] for row in rows} == {"sign of a Gaussian mixture", "2 noiseless bits"}
    assert all(row["passed"] and row["estimator"] == "label-level" for row in rows)
    assert len(list((tmp_path / "run" / "calibration").iterdir())) == 1
    monkeypatch.setattr("audit.run.upkeep.calibrations.calibrate", None)  # kept rows are not computed again
    assert main(["calibrate", "--estimator", "label-level", "--brief", "--json", "--out", "other"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    assert main(["calibrate", "--brief", "--full"]) == 2
    assert "--brief and --full exclude each other" in capsys.readouterr().err
    assert main(["calibrate", "--estimator", "label-levle"]) == 2
    assert "unknown estimator 'label-levle'; did you mean 'label-level'" in capsys.readouterr().err


def test_an_estimator_that_fails_calibration_is_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.yaml").write_text(
        "name: a\ndataset: digits\nmodels: bundled:*\nthreats: {eps: 0.1}\n"
        "estimators: {name: label-level, steps: 1, relative_step: 0.01}\n"
    )
    words = ["calibrate", "--config", str(tmp_path / "b.yaml"), "--brief", "--out", str(tmp_path / "run")]
    assert main(words) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert "1 of 2 channels with a verdict passed" in shown


def test_layers_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", REF, "--json"]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)}
    assert list(layers)[:3] == ["input", "penultimate", "logits"]
    assert (layers["input"]["shape"], layers["input"]["dimension"]) == ([1, 8, 8], 64)
    assert (layers["logits"]["dimension"], layers["logits"]["overwritten"]) == (10, False)
    assert {"calls", "kind", "outputs"} <= set(layers["logits"])
    assert main(["layers", REF]) == 0
    assert "penultimate" in capsys.readouterr().out


def test_layers_need_a_shape_if_the_model_declares_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from torch import nn

    (tmp_path / "nets.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Conv2d(1, 2, 3), "
                                      "nn.Flatten(), nn.Linear(72, 2))\n")  # fmt: skip
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    torch.save(network.state_dict(), tmp_path / "w.pth")
    ref = f"file:{tmp_path / 'w.pth'}?arch={tmp_path / 'nets.py'}:net&num_classes=2"
    assert main(["layers", ref, "--trust-code"]) == 2
    assert "declares no image shape: add --shape, such as --shape 3x32x32" in capsys.readouterr().err
    assert main(["layers", ref, "--trust-code", "--shape", "1x8x8", "--json"]) == 0
    assert [layer["dimension"] for layer in json.loads(capsys.readouterr().out)] == [64, 72, 2, 72, 72, 2]


def test_all_models_of_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--source", "robustbench", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)
    assert len(models) == len({model["ref"] for model in models}) == 206
    wong = next(model for model in models if model["ref"] == "robustbench:cifar10/Linf/Wong2020Fast")
    assert (wong["training"], wong["trained_norm"], wong["trained_eps"]) == ("robust", "linf", 8 / 255)
    assert {number["metric"]: number["value"] for number in wong["published"]} == {
        "natural_accuracy": 0.8334,
        "adversarial_accuracy": 0.4321,
    }
    assert main(["models"]) == 0
    captured = capsys.readouterr()
    assert "bundled:digits-vgg-robust" in captured.out
    assert "robustbench:imagenet/Linf/Standard_R50" in captured.out
    assert captured.err.strip().endswith("models")


def test_training_writes_weights_and_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = DigitsRecipe("digits-vgg-tiny", "vgg", trained_eps=0.0, epochs=1, seed=5)
    monkeypatch.setitem(digits_recipes.DIGITS_RECIPES, tiny.id, tiny)
    assert main(["train", tiny.id, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{tiny.id}.json", f"{tiny.id}.safetensors"]
    card = json.loads((tmp_path / f"{tiny.id}.json").read_text())
    shown = capsys.readouterr().out
    assert shown.startswith(f"{tiny.id}: natural 0.")
    assert card["sha256"] in shown
    assert recipes.DIGITS_RECIPES is digits_recipes.DIGITS_RECIPES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("audti", REF), "audti"),
        (("audit", REF, *QUICK, "--layre", "logits"), "--layre"),
        (("audit", REF, "--dataset", "digits"), "--eps"),
        (("audit",), "MODEL"),
        (("train",), "RECIPE"),
        (("run", "b.yaml", "--trust"), "--trust"),
        (("models", "--source"), "--source"),
    ],
)
def test_unknown_commands_and_options(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("Error: ") == 1


def _python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_reading_imports_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", REF, *QUICK, "--out", str(tmp_path / "run")]) == 0
    code = (
        "import sys; from reports.cli import main\n"
        "for words in sys.argv[1:]: assert main(words.split()) == 0\n"
        "print([name for name in ('torch', 'torchvision', 'timm', 'robustbench') if name in sys.modules])"
    )
    run = tmp_path / "run"
    assert _python(code, "--help", "audit --help", "models --json", f"leaderboard {run}", f"report {run}") == "[]"
