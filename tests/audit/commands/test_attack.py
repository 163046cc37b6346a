"""The command `attack`: table, files and exit codes."""

import csv
import json
from pathlib import Path

import pytest

from audit.adversary.check_rules import RULES
from reports.cli import main

REF, OTHER = "bundled:digits-vgg-robust", "bundled:digits-resnet-robust"
QUICK = ("--dataset", "digits", "--eps", "0.2", "--images", "30", "--tier", "smoke")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attack")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = main(["attack", REF, *QUICK, "--attacks", "fgsm,pgd", "--transfer-from", OTHER, "--out", "run"])
    return code, folder / "run"


def test_the_files_hold_what_was_measured(attacked):
    code, folder = attacked
    found = json.loads((folder / "attack.json").read_text())
    with (folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    assert found["trustworthy"] is True
    assert (found["images"], found["attack"], found["verdict"]) == (30, "ce-10+margin-10", "measured")
    assert len(rows) == 30
    assert sum(int(row["robust"]) for row in rows) == round(30 * found["adversarial_accuracy"])
    for row in rows:
        lost = row["correct"] == "1" and row["robust"] == "0"
        assert bool(row["broken_by"]) == lost
        assert (float(row["margin"]) > 0) == (row["robust"] == "1")
        assert not lost or 0.05 <= float(row["smallest_eps"]) <= 0.4
    assert sum(found["broken_by"].values()) == sum(bool(row["broken_by"]) for row in rows)
    skipped = {"random_noise", "gradient_free_attack"}  # by the tier "smoke"
    wanted = {rule.id for rule in RULES.values() if rule.level != "gate" and not rule.id.startswith("worst_case")}
    assert {check["id"] for check in found["checks"]} == wanted - skipped
    assert [each["attack"] for each in found["attacks"]] == ["fgsm", "pgd"]
    assert found["attacks"][0]["adversarial_accuracy"] >= found["attacks"][1]["adversarial_accuracy"]
    assert set(found["transfer"]) == {REF, OTHER} == set(found["transfer"][REF])
    assert found["transfer"][OTHER][REF] >= found["adversarial_accuracy"]
    curve = [rung["adversarial_accuracy"] for rung in found["eps_curve"]]
    assert curve == sorted(curve, reverse=True)
    assert (folder / "eps_curve.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_object_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["attack", REF, *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"adversarial_accuracy", "images", "passes", "forwards", "checks"} <= set(found)
    assert found["passes"] > 0
    assert Path("runs/attack-digits-vgg-robust/images.csv").exists()


def test_the_table_names_every_check(attacked, capsys, tmp_path):
    assert main(["attack", REF, *QUICK, "--out", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    for text in ("ce-10+margin-10", "unbounded attack", "determinism", "passed", "eps ladder", "images.csv"):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attacks", "fgms"), "unknown attack 'fgms'; did you mean 'fgsm'"),
        (("--attacks", "cw"), "use --norm l2"),
        (("--eps", "two"), "--eps: not a number or fraction such as 8/255: 'two'"),
        (("--eps", "3"), "outside [0, 1]"),
        (("--norm", "lnf"), "unknown norm 'lnf'; did you mean 'linf'"),
        (("--transfer-from", "bundled:digits-vgg-robsut"), "did you mean"),
    ],
)
def test_bad_requests_are_one_sentence_and_write_nothing(words, said, tmp_path, capsys):
    assert main(["attack", REF, *QUICK, *words, "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
