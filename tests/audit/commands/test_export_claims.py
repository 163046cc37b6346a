"""`rvaudit export --format robustbench`: accuracies that a reader measures again from the exported images."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from audit.config.yaml_source import read_config
from audit.records import RecordStore
from audit.run.cell import cells
from model_zoo.load import SourceSettings, load_model
from reports.cli import main

ROOT = Path(__file__).resolve().parents[3]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
QUICK = ("--images", "60", "--seeds", "1", "--estimator", "label-level", "--keep-images", "--out", "run")


def remeasured(network: torch.nn.Module, claim: Path) -> tuple[str, str]:
    """Return clean and robust accuracy in percent, as ten lines of anybody's measure them from the exported files."""
    told = json.loads(claim.read_text())
    images = load_file(claim.with_name(told["rvaudit"]["images_file"]))
    assert (images["adversarial"] - images["clean"]).abs().max() <= float(Fraction(told["eps"])) + 1e-6
    with torch.no_grad():
        right = [network(images[name]).argmax(1) == images["labels"] for name in ("clean", "adversarial")]
    clean, robust = (f"{100 * float(each.double().mean()):.2f}" for each in right)
    return clean, robust


def test_the_exported_images_give_the_claimed_accuracies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ref = "bundled:digits-vgg-standard"
    assert main(["audit", ref, "--dataset", "digits", "--eps", "0.1", *QUICK]) == 0
    capsys.readouterr()
    assert main(["export", "run", "--format", "robustbench", "--out", "claims", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "claims", "claims": 1, "with images": 1}
    claim = Path("claims/digits/Linf/digits-vgg-standard.json")
    told, (record,) = json.loads(claim.read_text()), RecordStore(Path("run"))
    assert told["clean_acc"] == f"{100 * record.natural_accuracy:.2f}"
    assert told["external"] == f"{100 * record.adversarial_accuracy:.2f}"
    assert float(told["external"]) < float(told["clean_acc"])
    assert (told["clean_acc"], told["external"]) == remeasured(load_model(ref).network, claim)
    Path("run/images").rename("moved")
    assert main(["export", "run", "--format", "robustbench", "--out", "bare", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["with images"] == 0
    assert "Note: 1 of 1 claims have no images: run with --keep-images to add them" in captured.err
    assert "images_file" not in json.loads(Path("bare/digits/Linf/digits-vgg-standard.json").read_text())["rvaudit"]
    _wrong_targets_are_refused(capsys)


def _wrong_targets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    for words, expected in (
        (["run"], "name the file or folder to write once"),
        (["run", "a.csv", "--out", "b.csv"], "name the file or folder to write once"),
        (
            ["run", "taken", "--format", "robustbench"],
            "taken is a file; RobustBench's claims are written into a folder",
        ),
        (["run", "claims", "--format", "csv"], "claims is a folder; a leaderboard is written as one file"),
        (["run", "claims"], "for RobustBench's fields add --format robustbench"),
    ):
        assert main(["export", *words]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert main(["export", "run", "--out", "table.txt", "--format", "csv"]) == 0
    assert Path("table.txt").read_text().startswith("rank,")


@pytest.mark.third_party
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
def test_the_claims_of_a_third_party_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = next(c for c in cells(read_config(ROOT / "tests" / "third_party.yaml")) if "resnet2b.pth" in c.ref)
    ref = cell.ref.replace("../shared", str(FOLDER)).replace("tests/third", str(ROOT / "tests" / "third"))
    words = ["--dataset", cell.dataset.replace("../shared", str(FOLDER)), "--eps", "2/255", "--trust-code"]
    assert main(["audit", ref, *words, *QUICK]) == 0
    assert main(["export", "run", "--format", "robustbench", "--out", "claims"]) == 0
    (claim,) = Path("claims").rglob("*.json")
    told, (record,) = json.loads(claim.read_text()), RecordStore(Path("run"))
    assert told["eps"] == "2/255"
    assert told["clean_acc"] == f"{100 * record.natural_accuracy:.2f}"
    assert told["external"] == f"{100 * record.adversarial_accuracy:.2f}"
    network = load_model(ref, SourceSettings(trust_code=True)).network
    assert (told["clean_acc"], told["external"]) == remeasured(network, claim)
