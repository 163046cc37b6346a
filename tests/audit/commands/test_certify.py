"""`certify` and `verify` as commands: columns, files, exit codes, and every planted fault named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reports.cli import main

REF = "bundled:digits-vgg-standard"
DATA = ("--dataset", "digits")
QUICK = (*DATA, "--images", "24", "--head-images", "0", "--attack", "smoke", "--hubs", "1")
COLUMNS = {
    "model", "layer", "eps", "images", "passes", "witness_sha256", "reason", "certified_bound",
    "certified_bound_population", "certified_tier", "best_head", "best_head_accuracy",
}  # fmt: skip


@pytest.fixture(scope="module")
def witness(tmp_path_factory):
    path = tmp_path_factory.mktemp("witness") / "w.safetensors"
    assert main(["certify", REF, *QUICK, "--eps", "0.3", "--out", str(path)]) == 0
    return path


def forged(path, folder, change=None, **bound):
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["rvaudit"])
    header["bound"] |= bound
    tensors = (change or (lambda same: same))(load_file(path))
    save_file(tensors, folder / "forged", {"rvaudit": json.dumps(header)})
    return folder / "forged"


def verdict(path, *words, model=REF):
    return main(["verify", str(path), "--model", model, *DATA, *words])


def test_rows_carry_the_columns_and_nothing_else_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.safetensors"
    words = ["certify", REF, *QUICK, "--eps", "0.3", "--eps", "51/255", "--layer", "logits", "--json"]
    assert main([*words, "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert [(row["layer"], row["eps"], row["images"]) for row in rows] == [("logits", 0.2, 24), ("logits", 0.3, 24)]
    assert all(set(row) >= COLUMNS for row in rows)
    assert rows[1]["certified_bound"] <= rows[0]["certified_bound"]
    assert rows[1]["certified_bound"] < rows[1]["certified_bound_population"]
    assert rows[1]["best_head"] == "own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-logits-0.2.safetensors", "w-logits-0.3.safetensors"]
    from hashlib import sha256

    for row in rows:
        assert row["witness_sha256"] == sha256(Path(row["witness"]).read_bytes()).hexdigest()


def test_a_witness_is_accepted(witness: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(witness) == 0
    assert "accepted: no head on logits keeps more than" in capsys.readouterr().out
    assert verdict(witness, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["accepted"]
    assert answer["certified_bound"] < 0.6
    assert (answer["layer"], answer["eps"], answer["images"]) == ("logits", 0.3, 24)


def test_an_image_outside_its_ball_is_named(witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    member = int(load_file(witness)["members"][3])

    def move(tensors):
        # the pixel with the most room, so that the ball is left and not the pixel range
        pixel = int((tensors["moved"][3] - 0.5).abs().flatten().argmin())
        tensors["moved"][3].view(-1)[pixel] += 2 * 0.3 + 1e-4 if tensors["moved"][3].view(-1)[pixel] < 0.5 else -0.6001
        return tensors

    assert verdict(forged(witness, tmp_path, move)) == 5
    assert f"image {member} is moved by" in capsys.readouterr().err


def test_a_swapped_label_an_edited_bound_and_a_short_file(
    witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap(tensors):
        tensors["labels"][5] = (tensors["labels"][5] + 1) % 10
        return tensors

    assert verdict(forged(witness, tmp_path, swap)) == 5
    assert "image 5 is of class" in capsys.readouterr().err
    assert verdict(forged(witness, tmp_path, kept=1)) == 5
    assert "claims that at most 1 of 24 images" in capsys.readouterr().err
    (tmp_path / "short").write_bytes(witness.read_bytes()[:-100])
    assert verdict(tmp_path / "short") == 5
    assert "no whole witness file" in capsys.readouterr().err


def test_other_weights_other_images_and_other_layers(
    witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(witness, model="bundled:digits-vgg-robust") == 5
    assert "is of weights" in capsys.readouterr().err
    assert verdict(witness, "--images", "23") == 5
    assert "is of 24 images, these are 23" in capsys.readouterr().err
    with safe_open(witness, "pt") as file:
        header = json.loads(file.metadata()["rvaudit"]) | {"layer": "nowhere"}
    save_file(load_file(witness), tmp_path / "elsewhere", {"rvaudit": json.dumps(header)})
    assert verdict(tmp_path / "elsewhere") == 5
    assert "names a layer that cannot be checked: unknown layer" in capsys.readouterr().err
    claims = load_file(witness) | {"labels": torch.zeros(100_000, dtype=torch.int64)}
    save_file(claims, tmp_path / "many", {"rvaudit": json.dumps(header | {"layer": "logits"})})
    assert verdict(tmp_path / "many") == 5
    assert "is of 100000 images, these are 900" in capsys.readouterr().err
    assert verdict(tmp_path / "absent") == 3


def test_the_word_proved_is_kept_for_what_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", REF, *QUICK, "--hubs-only", "--eps", "0.3"]
    assert main(words) == 0
    assert "proved" not in capsys.readouterr().out
    assert main([*words, "--tier", "proved", "--out", str(tmp_path / "w")]) == 0
    assert "(proved)" in capsys.readouterr().out
    assert verdict(tmp_path / "w") == 0
    assert "; proved" in capsys.readouterr().out
    moved = int(load_file(tmp_path / "w")["members"][2])

    def shift(tensors):
        # still inside every ball, and the features a little elsewhere
        inside = tensors["moved"][2] * 0.999
        tensors["moved"][2] = torch.where(tensors["moved"][2] > 0.5, inside, tensors["moved"][2])
        return tensors

    assert verdict(forged(tmp_path / "w", tmp_path, shift)) == 5
    assert f"image {moved} " in capsys.readouterr().err


def test_rows_and_figures_are_written(tmp_path: Path) -> None:
    words = [*QUICK, "--eps", "0.3", "--eps", "0.1", "--rows", str(tmp_path / "rows.csv")]
    assert main(["certify", REF, *words]) == 0
    from reports.figures.certificate_figure import read_rows

    assert [row["eps"] for row in read_rows(tmp_path / "rows.csv")] == [0.1, 0.3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-eps.png", "rows-eps.svg", "rows.csv"]


def test_where_it_does_not_apply_it_says_so_and_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", REF, *QUICK, "--eps", "0.5", "--norm", "l2", "--out", str(tmp_path / "none")]
    assert main(words) == 0
    assert "not applicable: the search keeps every pixel in its own interval" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["certified_bound"] is None
    assert row["reason"].startswith("not applicable")
    assert row["witness_sha256"] == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--eps", "8/0"), "--eps: not a number"),
        (("--eps", "8"), "outside [0, 1]"),
        (("--eps", "0.1", "--norm", "linfty"), "unknown norm 'linfty'"),
        (("--eps", "0.1", "--tier", "float8"), "unknown tier 'float8'"),
        (("--eps", "0.1", "--attack", "hard"), "unknown attack 'hard'"),
        (("--eps", "0.1", "--confidence", "95"), "--confidence 95.0 is not between 0 and 1"),
        (("--eps", "0.1", "--layer", "logit"), "unknown layer 'logit'"),
        (("--eps", "0.1", "--rows", "rows.txt"), "must end in .csv"),
        ((), "--eps"),
    ],
)
def test_words_that_are_not_legal(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", REF, *QUICK, *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_images_that_train_heads_are_never_certified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set without splits: what follows the certified images trains, twins of these left out."""
    import numpy as np

    from audit.commands.certify import _case

    pixels = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)
    pixels[30] = pixels[3]
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(40) % 10)
    request = {
        "images": 20, "head_images": 15, "train_dataset": None, "balanced": False, "trust_code": False, "offline": True,
        "data_dir": tmp_path, "model_dir": None, "device": "cpu",
    }  # fmt: skip
    _, case = _case(REF, f"npz:{tmp_path / 'set.npz'}", request)
    assert [float(image[0, 0, 0]) for image in case.examples.images] == [
        float(pixels[i, 0, 0, 0]) for i in range(20, 35) if i != 30
    ]
    _, bare = _case(REF, f"npz:{tmp_path / 'set.npz'}", request | {"images": None})
    assert bare.examples is None
    assert "none is left to train heads on" in capsys.readouterr().err
    _, split = _case(REF, "digits", request)
    assert len(split.examples.images) == 15


def test_an_encoder_without_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from model_zoo import load

    def headless(ref, sources, original=load.load_model):
        loaded = original(ref, sources)
        return replace(loaded, num_classes=0)

    monkeypatch.setattr(load, "load_model", headless)
    path = tmp_path / "w.safetensors"
    assert main(["certify", REF, *QUICK, "--eps", "0.3", "--out", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["best_head"] is None
    assert row["certified_bound"] < 1
    assert verdict(path) == 0
    assert main(["certify", REF, "--dataset", f"npz:{_other_size(tmp_path)}", "--eps", "0.3"]) == 2
    assert "takes images of 1x8x8" in capsys.readouterr().err


def _other_size(folder: Path) -> Path:
    import numpy as np

    np.savez(folder / "large.npz", images=np.zeros((4, 1, 9, 9), dtype=np.float32), labels=np.arange(4))
    return folder / "large.npz"
