"""Illegal input on the command line: one sentence that names the value, and an exit code."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model_zoo.weights.checkpoints import write_safetensors
from reports.cli import main

BUNDLED = Path(__file__).parents[3] / "model_zoo" / "bundled"
REF = "bundled:digits-vgg-standard"
GOOD = BUNDLED / "digits-vgg-standard.safetensors"
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a command that must fail with an exit code, and return its error message."""
    monkeypatch.chdir(tmp_path)

    def check(code: int, *words: str) -> str:
        assert main(list(words)) == code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        errors = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, captured.err
        sentence = errors[0].removeprefix("Error: ")
        assert captured.err.count(sentence.partition(": ")[2] or sentence) == 1, captured.err
        return sentence

    return check


@pytest.fixture
def audit_refused(refused: Refused) -> Refused:
    def check(code: int, ref: str, *words: str) -> str:
        quick = ("--dataset", "digits", "--eps", "0.1", "--images", "60", "--seeds", "1", "--out", "run")
        given = {word for word in words if word.startswith("--")}
        kept = [part for name, value in zip(quick[::2], quick[1::2], strict=True) if name not in given
                for part in (name, value)]  # fmt: skip
        return refused(code, "audit", ref, *kept, *words)

    return check


def _file(path: Path, arch: str = "bundled:digits-vgg-standard", classes: int = 10) -> str:
    return f"file:{path}?arch={arch}&num_classes={classes}"


class _Evil:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code(audit_refused: Refused, tmp_path: Path, new: bool) -> None:
    canary = tmp_path / "canary"
    torch.save({"state_dict": _Evil(canary)}, tmp_path / "evil.pth", _use_new_zipfile_serialization=new)
    said = audit_refused(4, _file(tmp_path / "evil.pth"))
    assert "evil.pth is a pickle that would import posix.system, so it is not opened" in said
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Evil(canary)))
    assert canary.exists()  # the trap itself works


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.safetensors", GOOD.read_bytes()[:-100], "cut.safetensors"),
        ("cut.pth", None, "cut.pth is truncated"),
        ("empty.pth", b"", "empty.pth"),
        ("page.pth", b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page (HTML) was saved in place of"),
        ("text.pth", b"these are no weights", "text.pth"),
    ],
)
def test_files_that_hold_no_weights(
    audit_refused: Refused, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is None:
        torch.save({"weight": torch.zeros(1000)}, tmp_path / name)
        content = (tmp_path / name).read_bytes()[:2000]
    (tmp_path / name).write_bytes(content)
    assert said in audit_refused(3, _file(tmp_path / name))


def test_weights_that_do_not_fit(audit_refused: Refused, tmp_path: Path) -> None:
    said = audit_refused(2, _file(GOOD, "bundled:digits-resnet-standard"))
    assert "checkpoint and architecture do not fit" in said
    said = audit_refused(2, _file(GOOD, classes=7))
    assert "the checkpoint has 10 outputs, the network 7" in said


def test_weights_that_are_not_finite(audit_refused: Refused, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(GOOD)
    name = next(name for name in state if state[name].is_floating_point())
    state[name] = torch.full_like(state[name], torch.nan)
    write_safetensors(state, tmp_path / "nan.safetensors")
    said = audit_refused(1, _file(tmp_path / "nan.safetensors"))
    assert name in said


def test_names_that_do_not_exist(audit_refused: Refused, refused: Refused, tmp_path: Path) -> None:
    assert "unknown layer 'logit'; did you mean 'logits'" in audit_refused(2, REF, "--layer", "logit")
    said = audit_refused(2, "bundled:digits-vgg-standrd")
    assert "unknown bundled model 'digits-vgg-standrd'; did you mean 'digits-vgg-standard'" in said
    said = audit_refused(2, "bundle:digits-vgg-standard")
    assert "unknown model source 'bundle'; did you mean 'bundled'" in said
    assert "'digits-vgg-standard' does not name its source" in audit_refused(2, "digits-vgg-standard")
    assert "unknown data set 'digit'; did you mean 'digits'" in audit_refused(2, REF, "--dataset", "digit")
    assert "unknown recipe 'digits-vg'" in refused(2, "train", "digits-vg")
    assert "unknown source with a list of models 'tim'; did you mean 'timm'" in refused(2, "models", "--source", "tim")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--eps", "3", "--eps: eps 3.0 is outside [0, 1], the range of pixels: write 8/255 for 8 grey levels"),
        ("--eps", "-1", "--eps: eps -1.0 is not a finite radius >= 0"),
        ("--eps", "eight", "--eps: not a number or fraction such as 8/255: 'eight'"),
        ("--norm", "lnf", "--norm: unknown norm 'lnf'; did you mean 'linf'"),
        ("--images", "0", "--images: Input should be greater than or equal to 1"),
        ("--images", "many", "'many' is not a valid integer"),
        ("--seeds", "0", "0 is not in the range x>=1"),
        ("--reduce", "sum", "--reduce: Input should be 'flatten' or 'mean'"),
        ("--images", "99999", "99999 images were asked for; digits (test) has"),
        ("--images", "12", "12 images are too few"),
        ("--device", "gpu", "unknown device 'gpu'; legal: auto, cpu"),
    ],
)
def test_options_out_of_range(audit_refused: Refused, option: str, value: str, said: str) -> None:
    assert said in audit_refused(2, REF, option, value)


def test_code_needs_trust(audit_refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    said = audit_refused(4, _file(GOOD, "nets.py:net"))
    assert "arch='nets.py:net' would run Python code; pass --trust-code" in said
    assert not (tmp_path / "canary").exists()
    assert "unknown factory in nets.py 'net'" in audit_refused(2, _file(GOOD, "nets.py:net"), "--trust-code")


def test_yaml_cannot_grant_trust(refused: Refused, tmp_path: Path) -> None:
    head = f"name: a\ndataset: digits\nmodels: ['{_file(GOOD, 'nets.py:net')}']\nthreats: {{eps: 0.1}}\n"
    (tmp_path / "b.yaml").write_text(head + "trust_code: true\n")
    assert refused(2, "run", "b.yaml").startswith("b.yaml:5:1: unknown key 'trust_code'")


def test_data_that_is_not_there_or_does_not_fit(audit_refused: Refused, tmp_path: Path) -> None:
    assert "npz file no.npz does not exist" in audit_refused(3, REF, "--dataset", "npz:no.npz")
    assert "parquet file no.parquet does not exist" in audit_refused(3, REF, "--dataset", "parquet:no.parquet")
    said = audit_refused(3, REF, "--dataset", "mnist", "--offline", "--data-dir", "empty")
    assert "mnist" in said
    labels = np.arange(60) % 10
    np.savez("large.npz", images=np.zeros((60, 1, 9, 9), np.uint8), labels=labels)
    said = audit_refused(2, REF, "--dataset", "npz:large.npz")
    assert "digits-vgg-standard takes images of 1x8x8, npz:large.npz has 1x9x9: the size differ" in said
    np.savez("bright.npz", images=np.full((60, 1, 8, 8), 255.0), labels=labels)
    assert "divide by 255" in audit_refused(2, REF, "--dataset", "npz:bright.npz")
    np.savez("few.npz", images=np.zeros((60, 1, 8, 8), np.uint8), labels=labels % 3)
    assert "has 10 outputs, data set npz:few.npz has 3 classes" in audit_refused(2, REF, "--dataset", "npz:few.npz")


def test_a_typo_in_the_benchmark(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(
        f"name: a\ndataset: digits\nmodels: [{REF}]\nthreats:\n  - norm: linf\n    esp: 1\n"
    )
    assert refused(2, "run", "b.yaml").startswith("b.yaml:5:5: threats.0.eps: Field required")
    (tmp_path / "b.yaml").write_text(
        f"name: a\ndataset: digits\nmodels: [{REF}]\nthreats: {{eps: 0.1}}\nattack:\n  stesp: 4\n"
    )
    said = refused(2, "run", "b.yaml")
    assert said.startswith("b.yaml:6:3: attack: unknown key 'stesp'; did you mean 'steps'")
    assert "cannot read none.yaml" in refused(3, "run", "none.yaml")
    assert not (tmp_path / "runs").exists()


def test_a_shape_that_the_network_does_not_take(refused: Refused, tmp_path: Path) -> None:
    ref = _file(GOOD)
    assert "shape '8x8' is not channels x height x width" in refused(2, "layers", ref, "--shape", "8x8")
    assert "does not take images of shape 3x8x8" in refused(2, "layers", ref, "--shape", "3x8x8")
