"""The commands `features` and `saliency`, and the studies of single features in `reproduce`."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from audit.attribution.saliency import SaliencySettings
from audit.attribution.single_features import FeatureSettings
from audit.commands.features import FeatureOptions
from audit.commands.reproduce.group import reproduce_command
from audit.errors import UsageError
from audit.run.loading import RunOptions
from audit.studies import figure_networks
from audit.studies.figure3 import figure3
from audit.studies.figure4_5 import SaliencyStudy, saliency_study
from audit.studies.theorem32 import Sweep, theorem32
from model_zoo.load import SourceSettings
from reports.cli import main

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
REF, LAYER = "bundled:digits-vgg-robust", "stages.1.0"
FEW = ("--dataset", "digits", "--layer", LAYER, "--images", "20", "--feature", "0", "--feature", "3")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_features_prints_the_ranking_and_its_limits(tmp_path, capsys):
    assert main(["features", REF, *FEW, "--eps", "0.05", "--steps", "2", "--out", str(tmp_path)]) == 0
    said, rows = capsys.readouterr().out, read(tmp_path / "features.csv")
    assert "never a bound on the layer" in said
    assert "is 5x5 of 8x8 pixels" in said
    assert {row["feature"] for row in rows} == {"0", "3"}
    assert float(rows[0]["rv"]) >= float(rows[1]["rv"]) > 0
    assert (tmp_path / "features.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_array_and_units_are_checked(tmp_path, capsys):
    asked = ["features", REF, *FEW, "--eps", "0.05", "--steps", "1", "--out", str(tmp_path)]
    assert main([*asked, "--json", "--unit", "0,0"]) == 0
    assert [row["unit"] for row in json.loads(capsys.readouterr().out)] == ["0x0", "0x0"]
    assert main([*asked, "--unit", "a"]) == 2
    assert "--unit 'a' is not ROW,COLUMN or TOKEN" in capsys.readouterr().err
    assert main([*asked[:-4], "--eps", "far"]) == 2
    assert "--eps" in capsys.readouterr().err


def test_requests_have_folders_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = (*FEW[:5], "12", "--feature", "0")
    words = ["features", REF, *quick, "--steps", "1"]
    for asked in (("--eps", "0.05"), ("--eps", "0.1", "--layer", "stages.0.0")):
        assert main([*words, *asked]) == 0
    for asked in ((), ("--draw", "2")):
        assert main(["saliency", REF, *quick, "--noise", "1", *asked]) == 0
    stored = [read(path)[0] for path in sorted(Path("runs").glob("features-digits-vgg-robust-*/features.csv"))]
    places = sorted((row["layer"], float(row["eps"])) for row in stored)
    assert places == [("stages.0.0", 0.1), (LAYER, 0.05)]
    maps = [json.loads(path.read_text()) for path in Path("runs").glob("saliency-digits-vgg-robust-*/saliency.json")]
    drawn = sorted((len(panels), len(panels[0]["images"])) for panels in maps)
    assert drawn == [(1, 2), (1, 5)]
    said = capsys.readouterr().out
    assert all(f"runs/{path.name}/" in said for path in Path("runs").iterdir())


def test_options_that_decide_numbers_name_the_folder():
    options = FeatureOptions(
        "0.1", "linf", None, "feature", 10, 1, "digits", LAYER, 300, False, (), 0.5, 0, "model", False
    )
    own = options.folder(REF, "linf", 0.1)
    assert replace(options, eps="1/10").folder(REF, "linf", 0.1) == own
    changes = {"unit": "1,1", "scale": "layer", "steps": 5, "restarts": 2, "dataset": "mnist", "layer": "logits",
               "images": 5, "balanced": True, "features": (1,), "noise": 1.0, "seed": 1, "preprocess": "none",
               "restrict_classes": True}  # fmt: skip
    others = {replace(options, **{name: value}).folder(REF, "linf", 0.1) for name, value in changes.items()}
    others |= {options.folder("bundled:b", "linf", 0.1), options.folder(REF, "l2", 0.1), options.folder(REF, "linf", 1)}
    assert len(others | {own}) == len(changes) + 4
    assert replace(options, unit=" 1,1").folder(REF, "linf", 0.1) in others


def test_saliency_compares_networks(tmp_path, capsys):
    other = "bundled:digits-vgg-standard"
    assert main(["saliency", REF, other, *FEW, "--draw", "2", "--out", str(tmp_path)]) == 0
    assert "Etmann" in capsys.readouterr().out
    (panel,) = json.loads((tmp_path / "saliency.json").read_text())
    assert (len(panel["images"]), len(panel["maps"]), len(panel["maps"][0]["values"])) == (2, 4, 2)
    assert all(float(row["alignment"]) > 0 for row in read(tmp_path / "saliency.csv"))
    assert (tmp_path / "saliency.png").exists()


def test_the_figures_run_from_a_preset(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text(f"name: p\ndataset: digits\nimages: 20\nlayers: [{LAYER}]\nmodels: ['{REF}']\n"
                      "threats: {norm: linf, eps: 0.05}\nseeds: [0]\nestimators: [sandwich]\n")  # fmt: skip
    for name in ("figure3", "figure4", "figure5"):
        found = CliRunner().invoke(
            reproduce_command, [name, str(preset), "--out", str(tmp_path)], standalone_mode=False
        )
        assert found.exit_code == 0, found.exception
        assert {row["model"] for row in read(tmp_path / f"{name}.csv")} == {"digits-vgg-robust"}
        assert (tmp_path / f"{name}.png").exists()


def test_without_a_preset_the_bundled_networks_are_used():
    cells = figure_networks.figure_cells(None, figure_networks.second_convolutions(), 10, 0.1)
    assert len(cells) == 6
    assert {cell.threat.eps for cell in cells} == {0.1}


def test_theorem_holds_and_estimates_match_the_exact_curve(tmp_path):
    words = ["theorem-3.2", "--samples", "200", "--seeds", "1", "--shift", "1", "--out", str(tmp_path)]
    found = CliRunner().invoke(reproduce_command, words, standalone_mode=False)
    assert found.exit_code == 0, found.exception
    rows = [
        {k: v if k == "estimator" else float(v) for k, v in row.items()} for row in read(tmp_path / "theorem32.csv")
    ]
    assert len(rows) == 6
    for row in rows:
        assert row["lower_bound"] - 1e-4 <= row["exact_rv"] <= row["upper_bound"] + 1e-4
        assert row["rv"] == pytest.approx(row["exact_rv"], abs=4 * row["rv_se"] + 0.01)
        assert row["gap"] == pytest.approx(row["exact_gap"], abs=0.02)


def test_illegal_sweeps_are_refused(tmp_path):
    with pytest.raises(UsageError, match="shifts"):
        Sweep(shifts=(0.0,))
    with pytest.raises(UsageError, match="at least 10 samples"):
        Sweep(samples=5)
    with pytest.raises(UsageError, match="no channel has mean 7"):
        theorem32(Sweep(mixtures=((7.0, 1.0),)), tmp_path)


@pytest.mark.third_party
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
def test_third_party_networks_at_a_named_layer(tmp_path):
    text = (ROOT / "tests" / "third_party_figure3.yaml").read_text().replace("../shared", str(FOLDER))
    preset = tmp_path / "p.yaml"
    preset.write_text(text.replace("tests/third_party_nets.py", str(ROOT / "tests/third_party_nets.py")))
    cells = [replace(cell, images=20) for cell in figure_networks.figure_cells(preset, {}, 0, 0.0)[:2]]
    options = RunOptions(SourceSettings(trust_code=True))
    settings = FeatureSettings(steps=1, settle=2)
    rows = figure3(cells, tmp_path, settings, options, lambda _stage, _done: None)
    assert {row["model"] for row in rows} == {"marabou-medium", "resnet20"}
    assert {row["field"] for row in rows} == {"10x10", "5x5"}
    assert all(row["rv"] > 0 for row in rows)
    study = SaliencyStudy(SaliencySettings(draws=2))
    found = saliency_study(cells, tmp_path / "s", study, options, lambda _stage, _done: None)
    assert all(row["alignment"] > 0 for row in found)
