"""The command `attack`: table, files and exit codes."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from audit.adversary.check_rules import RULES
from audit.commands.attack import AttackOptions
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
    assert main(["attack", REF, *QUICK, "--checks", "trust", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"adversarial_accuracy", "images", "passes", "forwards", "checks"} <= set(found)
    assert found["passes"] > 0
    assert {RULES[check["id"]].level for check in found["checks"]} == {"trust"}
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"attack-digits-vgg-robust-[0-9a-f]{8}", folder.name)
    assert sorted(path.name for path in folder.iterdir()) == ["attack.json", "images.csv"]  # no curve was measured


def test_requests_have_folders_of_their_own_and_radii_and_attacks_repeat(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["attack", REF, *QUICK[:2], *QUICK[4:], "--checks", "none", "--eps", "0.2", "--attacks", "fgsm"]
    assert main([*words, "--eps", "0.1", "--attacks", "pgd,fgsm", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["eps"] for each in found] == [0.1, 0.2]
    assert found[0]["adversarial_accuracy"] > found[1]["adversarial_accuracy"]
    for each in found:
        assert [single["attack"] for single in each["attacks"]] == ["fgsm", "pgd"]
        assert (each["trustworthy"], each["verdict"], each["checks"]) == (None, "not checked", [])
    stored = [json.loads(path.read_text())["eps"] for path in Path("runs").glob("*/attack.json")]
    assert sorted(stored) == [0.1, 0.2]
    limit = str((found[0]["adversarial_accuracy"] + found[1]["adversarial_accuracy"]) / 2)
    assert main([*words, "--eps", "1/10", "--fail-under", limit, "--out", "own"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("is below --fail-under") == 1
    assert re.search(r"^fgsm +linf +0\.1 ", captured.out, re.M)
    assert sorted(path.name for path in Path("own").iterdir()) == ["linf-0.1", "linf-0.2"]
    assert len(list(Path("runs").iterdir())) == 2


def test_options_that_decide_numbers_name_the_folder():
    options = AttackOptions("digits", ("0.1",), "linf", "audit", ("fgsm",), "all", (), None, False, 0, "model", False)
    own = options.folder("bundled:a", "linf", 0.1)
    same = [replace(options, radii=("1/10", "0.2")), replace(options, attacks=("fgsm,", "fgsm"))]
    assert {each.folder("bundled:a", "linf", 0.1) for each in same} == {own}
    changes = {"dataset": "mnist", "attack": "smoke", "attacks": ("pgd",), "checks": "none", "transfer_from": ("b",),
               "images": 5, "balanced": True, "seed": 1, "preprocess": "none", "restrict_classes": True}  # fmt: skip
    others = {replace(options, **{name: value}).folder("bundled:a", "linf", 0.1) for name, value in changes.items()}
    others |= {options.folder("bundled:b", "linf", 0.1), options.folder("bundled:a", "l2", 0.1)}
    assert len(others | {own, options.folder("bundled:a", "linf", 0.2)}) == len(changes) + 4


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
