"""The commands `certify` and `verify`: columns, files, exit codes, and the report of every planted fault."""

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
    "model",
    "layer",
    "eps",
    "images",
    "passes",
    "witness_sha256",
    "reason",
    "certified_bound",
    "certified_bound_population",
    "certified_tier",
    "best_head",
    "best_head_accuracy",
}


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


def test_json_prints_rows_with_all_columns_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert "accepted: certified upper bound on any head's adversarial accuracy on logits" in capsys.readouterr().out
    assert verdict(witness, "--json") == 0
    accepted = json.loads(capsys.readouterr().out)
    assert accepted["accepted"]
    assert accepted["certified_bound"] < 0.6
    assert (accepted["layer"], accepted["eps"], accepted["images"]) == ("logits", 0.3, 24)


def test_an_image_outside_its_ball_is_reported(
    witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member = int(load_file(witness)["members"][3])

    def move(tensors):
        # the pixel furthest from the ends of the range, so that the image leaves its ball but not the range
        pixel = int((tensors["moved"][3] - 0.5).abs().flatten().argmin())
        tensors["moved"][3].view(-1)[pixel] += 2 * 0.3 + 1e-4 if tensors["moved"][3].view(-1)[pixel] < 0.5 else -0.6001
        return tensors

    assert verdict(forged(witness, tmp_path, move)) == 5
    assert f"image {member} is moved by" in capsys.readouterr().err


def test_a_changed_label_an_edited_bound_and_a_truncated_file_are_reported(
    witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap(tensors):
        tensors["labels"][5] = (tensors["labels"][5] + 1) % 10
        return tensors

    assert verdict(forged(witness, tmp_path, swap)) == 5
    assert "image 5 has class" in capsys.readouterr().err
    assert verdict(forged(witness, tmp_path, kept=1)) == 5
    assert "claims an upper bound of 1 of 24 images" in capsys.readouterr().err
    (tmp_path / "short").write_bytes(witness.read_bytes()[:-100])
    assert verdict(tmp_path / "short") == 5
    assert "is not a complete witness file" in capsys.readouterr().err


def test_other_weights_other_images_and_other_layers_are_reported(
    witness: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(witness, model="bundled:digits-vgg-robust") == 5
    assert "is for weights" in capsys.readouterr().err
    assert verdict(witness, "--images", "23") == 5
    assert "is for 24 images, not 23" in capsys.readouterr().err
    with safe_open(witness, "pt") as file:
        header = json.loads(file.metadata()["rvaudit"]) | {"layer": "nowhere"}
    save_file(load_file(witness), tmp_path / "elsewhere", {"rvaudit": json.dumps(header)})
    assert verdict(tmp_path / "elsewhere") == 5
    assert "names a layer that cannot be checked: unknown layer" in capsys.readouterr().err
    claims = load_file(witness) | {"labels": torch.zeros(100_000, dtype=torch.int64)}
    save_file(claims, tmp_path / "many", {"rvaudit": json.dumps(header | {"layer": "logits"})})
    assert verdict(tmp_path / "many") == 5
    assert "is for 100000 images, not 900" in capsys.readouterr().err
    assert verdict(tmp_path / "absent") == 3


def test_only_the_proved_tier_is_called_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", REF, *QUICK, "--hubs-only", "--eps", "0.3"]
    assert main(words) == 0
    assert "proved" not in capsys.readouterr().out
    assert main([*words, "--tier", "proved", "--out", str(tmp_path / "w")]) == 0
    assert "(proved)" in capsys.readouterr().out
    assert verdict(tmp_path / "w") == 0
    assert "; proved" in capsys.readouterr().out
    moved = int(load_file(tmp_path / "w")["members"][2])

    def shift(tensors):
        # still inside its ball, with slightly different features
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


def test_an_inapplicable_certificate_is_reported_with_exit_code_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["certify", REF, *QUICK, "--eps", "0.1", "--layer", "stages.0", "--out", str(tmp_path / "none")]
    assert main(words) == 0
    assert "not applicable: the layer has 1024 features but the image only 64 pixels" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["certified_bound"] is None
    assert row["reason"].startswith("not applicable")
    assert row["witness_sha256"] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eps", "8/0"), "--eps: not a number"),
        (("--eps", "8"), "outside [0, 1]"),
        (("--eps", "0.1", "--norm", "linfty"), "unknown norm 'linfty'"),
        (("--eps", "0.1", "--equality", "float8"), "unknown tier 'float8'"),
        (("--eps", "0.1", "--attack", "hard"), "unknown attack 'hard'"),
        (("--eps", "0.1", "--heads", "linear"), "unknown head 'linear'"),
        (("--eps", "0.1", "--confidence", "95"), "confidence 95.0 is not between 0 and 1"),
        (("--eps", "0.1", "--layer", "logit"), "unknown layer 'logit'"),
        (("--eps", "0.1", "--rows", "rows.txt"), "must end in .csv"),
        ((), "--eps"),
    ],
)
def test_illegal_options_are_reported(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", REF, *QUICK, *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_head_training_images_are_disjoint_from_the_certified_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a training split, heads are trained on the images after the certified ones, without duplicates."""
    from dataclasses import replace

    import numpy as np

    from audit.adversary.threat import Linf
    from audit.run.loading import RunOptions
    from audit.studies.certification import CertificationRequest, load_inputs

    pixels = np.random.default_rng(0).random((40, 1, 8, 8), dtype=np.float32)
    pixels[30] = pixels[3]
    dataset, options = f"npz:{tmp_path / 'set.npz'}", RunOptions(data_dir=tmp_path, device="cpu")
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(40) % 10)
    request = CertificationRequest(
        model=REF,
        dataset=dataset,
        layers=("logits",),
        threats=(Linf(0.1),),
        images=20,
        head_images=15,
        heads=("own", "slf"),
    )
    _, inputs = load_inputs(request, options)
    assert [float(image[0, 0, 0]) for image in inputs.training_data.images] == [
        float(pixels[i, 0, 0, 0]) for i in range(20, 35) if i != 30
    ]
    _, everything = load_inputs(replace(request, images=None), options)
    assert everything.training_data is None
    _, split = load_inputs(replace(request, dataset="digits"), options)
    assert len(split.training_data.images) == 15
    words = ["--dataset", dataset, "--eps", "0.1", "--attack", "smoke", "--hubs-only", "--device", "cpu"]
    assert main(["certify", REF, *words, "--heads", "all"]) == 0
    assert "none is left to train heads on" in capsys.readouterr().err
    assert main(["certify", REF, *words]) == 0  # the network's own head needs no training
    assert capsys.readouterr().err == ""


def test_heads_are_asked_for_apart(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["certify", REF, *DATA, "--images", "20", "--head-images", "60", "--hubs", "1", "--eps", "0.3", "--json"]
    measured = {}
    for asked in ((), ("--heads", "none"), ("--heads", "slf"), ("--heads", "own", "--heads", "slf")):
        assert main([*words, *asked]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        measured[asked] = set(row["heads"])
        assert (row["attack_passes"] == 0) == (not row["heads"])
    assert list(measured.values()) == [{"own"}, set(), {"slf"}, {"own", "slf"}]


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.02"), ("l2", "0.1"), ("l1", "0.1")])
def test_a_ledger_is_written_and_verified_in_every_norm(
    norm: str, eps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = tmp_path / "w.safetensors", "bundled:digits-baseline-h-robust"
    words = [model, *DATA, "--images", "12", "--hubs-only", "--norm", norm, "--eps", eps, "--ledger"]
    assert main(["certify", *words, "--out", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 < row["proved"] <= row["heads"]["own"] <= 1 - row["broken"]
    assert verdict(path, "--json", model=model) == 0
    accepted = json.loads(capsys.readouterr().out)
    assert (accepted["proved"], accepted["broken"]) == (round(12 * row["proved"]), round(12 * row["broken"]))
    assert verdict(path, model=model) == 0
    assert f"the network keeps {accepted['proved']} of 12 images" in capsys.readouterr().out


def test_the_columns_of_a_ledger_are_shown_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", REF, *DATA, "--images", "10", "--hubs-only", "--eps", "0.02", "--ledger"]) == 0
    shown = capsys.readouterr().out
    assert "proved  broken  undecided" in shown
    assert "lies between the share proved and the share not broken" in shown


@pytest.mark.parametrize(("norm", "eps"), [("linf", "0.3"), ("l2", "1.5"), ("l1", "6")])
def test_a_witness_slightly_outside_its_ball_is_refused_in_every_norm(
    norm: str, eps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.safetensors"
    assert main(["certify", REF, *QUICK, "--norm", norm, "--eps", eps, "--out", str(path)]) == 0
    assert verdict(path) == 0
    radius = float(eps)

    def outwards(tensors):
        """Move one image in the direction in which it was moved, until it is 1e-4 outside its ball."""
        from model_zoo.images.datasets import ImageRequest, load_images

        clean = load_images("digits", ImageRequest(count=24)).images.double()
        row = next(k for k, image in enumerate(tensors["moved"]) if bool(((image > 0.2) & (image < 0.8)).any()))
        change = tensors["moved"][row] - clean[tensors["members"][row]]
        inside = (tensors["moved"][row] > 0.1) & (tensors["moved"][row] < 0.9) & (change != 0)
        single = torch.zeros_like(change)
        first = inside.flatten().nonzero()[0]
        single.view(-1)[first] = change.view(-1)[first].sign()
        size = {"linf": lambda d: d.abs().max(), "l2": lambda d: d.norm(), "l1": lambda d: d.abs().sum()}[norm]
        low, high = 0.0, radius + 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if size(change + middle * single) < radius + 1e-4 else (low, middle)
        tensors["moved"][row] += high * single
        return tensors

    capsys.readouterr()
    assert verdict(forged(path, tmp_path, outwards)) == 5
    message = capsys.readouterr().err
    assert f"is moved by {radius + 1e-4:.6g}" in message
    assert f"in {norm}" in message


def test_an_encoder_without_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from audit.run import loading

    def headless(ref, sources, original=loading.load_model):
        loaded = original(ref, sources)
        return replace(loaded, num_classes=0)

    monkeypatch.setattr(loading, "load_model", headless)
    path = tmp_path / "w.safetensors"
    assert main(["certify", REF, *QUICK, "--eps", "0.3"]) == 2
    assert "layer 'logits' does not exist: the network has no classifier; its features are" in capsys.readouterr().err
    chosen = ["--layer", "output", "--heads", "all", "--head-images", "20"]
    assert main(["certify", REF, *QUICK, *chosen, "--eps", "0.3", "--out", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["layer"], row["best_head"] in ("slf", "mlp", "alf")) == ("output", True)
    assert row["best_head_accuracy"] <= row["certified_bound"]
    assert row["certified_bound"] < 1
    assert verdict(path) == 0
    assert main(["certify", REF, "--dataset", f"npz:{_other_size(tmp_path)}", "--eps", "0.3"]) == 2
    assert "takes images of 1x8x8" in capsys.readouterr().err


def _other_size(folder: Path) -> Path:
    import numpy as np

    np.savez(folder / "large.npz", images=np.zeros((4, 1, 9, 9), dtype=np.float32), labels=np.arange(4))
    return folder / "large.npz"


def test_only_unlimited_passes_try_layers_of_every_width():
    from math import inf

    from audit.adversary.threat import Linf
    from audit.studies.certification import CertificationRequest

    asked = {"model": REF, "dataset": "digits", "layers": ("logits",), "threats": (Linf(0.1),)}
    assert CertificationRequest(**asked).settings.certificate.jacobian_passes == 400
    assert CertificationRequest(**asked, pair_passes=inf).settings.certificate.jacobian_passes == inf
