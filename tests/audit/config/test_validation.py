"""`rvaudit validate`: every planted fault with its line and column, without torch; trials of models."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from audit.config.validation import Finding, Lookups, Request, validate
from audit.errors import AuditError, ConfigError, EnvironmentFault, UsageError
from model_zoo.catalogue import BUNDLED
from model_zoo.lookup import DATASET_FORMS, NAMED_DATASETS, check_dataset, check_model, expand_ref
from reports.cli import main

GOOD = "bundled:digits-vgg-robust"
TEN = """\
name: ten faults
dataset: digts
models:
  - bundled:digits-vgg-robusd
  - {ref: timmm:resnet18, imagse: 3}
  - robustbench:cifar10/Linf/Carmon2019Unlabelled
  - ref: file:wieghts.safetensors?arch=bundled:digits-vgg-robust&num_classes=10
  - ref: file:weights.safetensors?arch=bundled:digits-vgg-robust&num_classes=10&sha256=%s
threats:
  - {norm: lnf, eps: 8/255}
  - {norm: linf, eps: 8}
estimators: [sandwhich]
attack: audti
"""
PLANTED = [
    ("1:1: name: ", "String should match pattern", 2),
    ("2:1: dataset: ", "unknown data set 'digts'; did you mean 'digits'", 2),
    ("4:5: models.0: ", "unknown bundled model 'digits-vgg-robusd'; did you mean 'digits-vgg-robust'", 2),
    ("5:6: models.1.ref: ", "unknown model source 'timmm'; did you mean 'timm'", 2),
    ("5:27: models.1: ", "unknown key 'imagse'; did you mean 'images'", 2),
    ("6:5: models.2: ", "did you mean 'Carmon2019Unlabeled'", 2),
    ("7:5: models.3.ref: ", "wieghts.safetensors does not exist; did you mean weights.safetensors", 3),
    ("8:5: models.4.ref: ", "not the published " + "0" * 64, 5),
    ("10:6: threats.0.norm: ", "unknown norm 'lnf'; did you mean 'linf'", 2),
    ("11:18: threats.1.eps.0: ", "eps 8.0 is outside [0, 1], the range of pixels: write 8/255", 2),
    ("12:14: estimators.0: ", "unknown estimator 'sandwhich'; did you mean 'sandwich'", 2),
    ("13:1: attack.tier: ", "unknown tier 'audti'; did you mean 'audit'", 2),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes((BUNDLED / "digits-vgg-robust.safetensors").read_bytes())
    return tmp_path


def _write(folder: Path, text: str) -> Path:
    path = folder / "b.yaml"
    path.write_text(text)
    return path


def _benchmark(models: str = f"[{GOOD}]", rest: str = "") -> str:
    return f"name: a\ndataset: digits\nmodels: {models}\nthreats: {{eps: 8/255}}\n{rest}"


def test_twelve_faults_at_once_without_torch(here: Path) -> None:
    _write(here, TEN % ("0" * 64))
    code = (
        "import sys\nfrom reports.cli import main\ncode = main(['validate', 'b.yaml'])\n"
        "print(code, *sorted({'torch', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    *faults, last = answer.stdout.splitlines()
    assert last == "5"  # the largest exit code, and no torch
    assert len(faults) == len(PLANTED)
    for fault, (place, words, _) in zip(faults, PLANTED, strict=True):
        assert fault.startswith(f"b.yaml:{place}"), fault
        assert words in fault
    assert "12 faults; models were not loaded" in answer.stderr


def test_faults_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(here, TEN % ("0" * 64))
    assert main(["validate", "b.yaml", "--json"]) == 5
    rows = json.loads(capsys.readouterr().out)
    assert [f"{row['line']}:{row['column']}" for row in rows] == [place.partition(": ")[0] for place, _, _ in PLANTED]
    assert [row["exit_code"] for row in rows] == [code for *_, code in PLANTED]
    assert {row["file"] for row in rows} == {"b.yaml"}


def test_layers_and_shapes_are_tried_if_keys_are_legal(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(
        here,
        "name: a\ndataset: digits\nthreats: {eps: 0.2}\nlayers: [logits, featuers.0]\nmodels:\n"
        f"  - {GOOD}\n  - {{ref: {GOOD}, layers: [logits#0, 'a@b']}}\n"
        "  - {ref: bundled:digits-vgg-standard, layers: input, images: 1000}\n"
        "  - ref: file:weights.safetensors?arch=bundled:digits-vgg-robust&num_classes=7\n    layers: [logits]\n",
    )
    assert main(["validate", "b.yaml"]) == 2
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "b.yaml:4:18", "b.yaml:7:47", "b.yaml:7:57", "b.yaml:8:55", "b.yaml:9:5",
    ]  # fmt: skip
    assert "unknown layer 'featuers.0'; did you mean 'stages.0'" in lines[0]
    assert "returns one tensor: leave out #0" in lines[1]
    assert "is not of the form" in lines[2]
    assert "1000 images were asked for; digits (test) has 900" in lines[3]
    assert "10 outputs, the network 7; is num_classes right?" in lines[4]
    assert captured.err.strip() == "5 faults"


def test_without_a_fault(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(here, _benchmark("'bundled:digits-vgg-*'", "layers: [penultimate]\n"))
    assert main(["validate", "b.yaml"]) == 0
    assert capsys.readouterr().err.strip() == "no fault"
    assert main(["validate", "b.yaml", "--schema"]) == 0
    assert capsys.readouterr().err.strip() == "no fault; models were not loaded, layers not checked"


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [("name: [a\n", 2, "b.yaml:2:1"), ("- a\n", 2, "a benchmark is a mapping"), (None, 3, "cannot read b.yaml")],
)
def test_unreadable_files(
    here: Path, text: str | None, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        _write(here, text)
    assert main(["validate", "b.yaml"]) == code
    assert words in capsys.readouterr().err


def test_errors_of_a_trial_have_a_place(tmp_path: Path) -> None:
    def attempt(request: Request) -> list[Finding]:
        return [Finding("dataset", UsageError(f"no {request.dataset}")), Finding(0, EnvironmentFault("two\nlines"))]

    lookups = Lookups(lambda _ref: None, lambda _ref: None, attempt)
    verdict = validate(_write(tmp_path, _benchmark(GOOD, "layers: logits\n")), lookups)
    assert verdict.tried
    assert [(f.line, f.column, f.where, f.message) for f in verdict.faults] == [
        (2, 1, "dataset", f"{GOOD}: no digits"),
        (5, 1, "layers", f"{GOOD}: two lines"),
    ]
    assert verdict.exit_code == 3


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="duplicate key"):
        validate(_write(tmp_path, "name: a\nname: b\n"), Lookups(check_model, check_dataset))


def test_checked_data_sets_can_be_loaded() -> None:
    for name in NAMED_DATASETS:
        check_dataset(name)
    with pytest.raises(AuditError) as caught:
        check_dataset("x")
    assert all(name in str(caught.value) for name in DATASET_FORMS)


@pytest.mark.parametrize(
    ("ref", "error", "words"),
    [
        ("folder:", UsageError, "names no path; write folder:<path>"),
        ("npz:weight.safetensors", EnvironmentFault, "did you mean weights.safetensors"),
        ("folder:nowhere/at/all", EnvironmentFault, "nowhere/at/all does not exist$"),
    ],
)
def test_missing_data_sets(here: Path, ref: str, error: type[AuditError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_dataset(ref)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ("", UsageError, "needs arch="),
        ("?arch=bundled:digits-vgg-robust", UsageError, "needs num_classes="),
        ("?arch=bundled:digits-vg&num_classes=10", UsageError, "unknown bundled model"),
        ("?arch=robustbench:cifar10/Linf/x&num_classes=10", UsageError, "unknown RobustBench model"),
        ("?arch=nets.py:f&num_classes=10", EnvironmentFault, "factory file nets.py does not exist"),
    ],
)
def test_file_references_that_cannot_be_loaded(here: Path, options: str, error: type[AuditError], words: str) -> None:
    with pytest.raises(error, match=words):
        check_model(f"file:weights.safetensors{options}")


def test_file_references_that_can_be_loaded(here: Path) -> None:
    right = sha256((here / "weights.safetensors").read_bytes()).hexdigest()
    check_model(f"file:weights.safetensors?arch={GOOD}&num_classes=10&sha256={right}")
    check_model("timm:no-such-name")  # told when it is loaded
    with pytest.raises(UsageError, match="unknown bundled pattern"):
        check_model("bundled:nothing-*")
    assert len(expand_ref("bundled:digits-vgg-*")) == 3
    assert expand_ref("timm:resnet*") == ["timm:resnet*"]
