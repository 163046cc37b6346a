"""Images and classes of a data set as a model receives them: in cells, in commands, in the record."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import MismatchError, UsageError
from audit.information.mine import Mine
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.records import AuditRecord
from audit.run.cell import Cell, InputRules
from audit.run.loading import RunOptions, open_images_for, open_model, open_representation
from audit.run.run_loop import run
from model_zoo.libraries import imagenet_names
from model_zoo.load import SourceSettings
from reports.cli import main

OPTIONS = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
SETTINGS = AuditSettings(
    Mine(
        CriticTraining(steps=6, every=3, shape=CriticShape(width=16, embedding=8, channels=4, view=8)),
        WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1),
    ),
    two_losses(PGD(steps=1)),
    seeds=(0,),
)
FACTORY = """
from torch import nn

def colours(num_classes):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
"""
NAMES = ("red", "green", "blue")
AS_IS, RESTRICTED = InputRules(preprocess=False), InputRules(restrict_classes=True)


def photographs(folder: Path, names: tuple[str, ...], *, equal: bool = False) -> str:
    """Write noisy pictures of red, green and blue, twenty a class, below folders with these names."""
    generator = np.random.default_rng(0)
    for channel, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            size = (16, 16) if equal else (17 + number, 40 - number)
            pixels = generator.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return f"folder:{folder}"


def classifier(folder: Path, outputs: dict[int, int], count: int, rival: tuple[int, int, float] | None = None) -> str:
    """Return a network with `count` outputs, of which each key sees a channel and the others a constant of -100.

    A rival is a further output, the channel that it sees, and how much higher it is than the output of this channel.
    """
    outputs = {**outputs, **({rival[0]: rival[1]} if rival else {})}
    weight, bias = torch.zeros(count, 48), torch.full((count,), -100.0)
    for output, channel in outputs.items():
        weight[output, 16 * channel : 16 * channel + 16] = 1.0
        bias[output] = rival[2] if rival and output == rival[0] else 0.0
    (folder / "nets.py").write_text(FACTORY)
    torch.save({"2.weight": weight, "2.bias": bias}, folder / "net.pt")
    return f"file:{folder / 'net.pt'}?arch={folder / 'nets.py'}:colours&num_classes={count}&resize=20&crop=16"


def audited(ref: str, dataset: str, folder: Path, rules: InputRules | None = None) -> AuditRecord:
    cell = Cell(ref, None, dataset, None, "logits", Linf(1 / 255), SETTINGS, rules=rules or InputRules())
    (record,) = run([cell], folder, OPTIONS)
    return record


def test_photographs_of_any_size_are_audited(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    record = audited(
        classifier(tmp_path, {0: 2, 1: 1, 2: 0}, 3), dataset, tmp_path / "run"
    )  # folders: blue, green, red
    assert record.valid, record.reason
    assert record.natural_accuracy == 1
    expected = {"resize": [20], "crop": [16, 16], "channels": 3, "fit": "shorter", "interpolation": "bilinear"}
    assert record.details["preprocessing"] == record.details["identity"]["preprocessing"] == expected
    assert "classes" not in record.details


def test_classes_are_mapped_and_the_record_says_how(tmp_path: Path) -> None:
    wnids = [imagenet_names(1000)[place][0] for place in (3, 500, 998)]
    dataset = photographs(tmp_path / "photos", (wnids[0], wnids[1], wnids[2]))
    ref = classifier(tmp_path, {3: 0, 500: 1, 998: 2}, 1000, rival=(7, 0, -0.01))
    images = open_images_for(ref, dataset, OPTIONS)
    assert sorted(set(images.labels.tolist())) == [3, 500, 998]
    record, reduced = audited(ref, dataset, tmp_path / "run"), audited(ref, dataset, tmp_path / "run", RESTRICTED)
    assert (record.num_classes, reduced.num_classes) == (1000, 3)
    assert record.details["classes"] == {"mapped_by": "wnid", "count": 3, "competing": "all outputs"}
    assert reduced.details["classes"]["competing"] == "the data set's classes"
    assert reduced.details["identity"]["competing_outputs"] == [3, 500, 998]
    assert record.natural_accuracy == reduced.natural_accuracy == 1
    assert record.cell_id != reduced.cell_id


def test_outputs_outside_the_data_set_compete_unless_restricted(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "map.json").write_text(json.dumps({"red": 4, "green": 2, "blue": 3}))
    ref, mapped = (
        classifier(tmp_path, {4: 0, 2: 1, 3: 2}, 6, rival=(1, 0, 0.01)),
        f"{dataset}?classes={tmp_path / 'map.json'}",
    )
    everything = audited(ref, mapped, tmp_path / "run")
    reduced = audited(ref, mapped, tmp_path / "run", RESTRICTED)
    assert everything.natural_accuracy == pytest.approx(2 / 3)  # every red image is lost to output 1
    assert reduced.natural_accuracy == 1


def test_a_restricted_network_is_the_network_at_the_chosen_outputs(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "map.json").write_text(json.dumps({"red": 4, "green": 2, "blue": 3}))
    ref, mapped = classifier(tmp_path, {4: 0, 2: 1, 3: 2}, 6), f"{dataset}?classes={tmp_path / 'map.json'}"
    images = open_images_for(ref, mapped, OPTIONS, rules=RESTRICTED)
    reduced, whole = open_model(ref, images, OPTIONS), open_model(ref, open_images_for(ref, mapped, OPTIONS), OPTIONS)
    assert (reduced.num_classes, whole.num_classes) == (3, 6)
    assert torch.equal(reduced.network(images.images), whole.network(images.images)[:, [3, 2, 4]])
    assert not any(module.training for module in reduced.network.modules())


@pytest.mark.parametrize("equal", [True, False])
def test_without_preprocessing_images_are_taken_as_they_are(tmp_path: Path, equal: bool) -> None:
    dataset = photographs(tmp_path / "photos", NAMES, equal=equal)
    ref = classifier(tmp_path, {0: 2, 1: 1, 2: 0}, 3)
    if equal:
        images = open_images_for(ref, dataset, OPTIONS, rules=AS_IS)
        stored = Image.open(tmp_path / "photos" / "blue" / "0.png")
        assert np.array_equal(np.asarray((images.images[0] * 255).round().byte().permute(1, 2, 0)), np.asarray(stored))
        assert images.preprocessing is None
        record = audited(ref, dataset, tmp_path / "run", AS_IS)
        assert "preprocessing" not in record.details["identity"]
    else:
        with pytest.raises(UsageError, match="all images must share channels and size"):
            open_images_for(ref, dataset, OPTIONS, rules=AS_IS)


def test_classes_that_no_output_tells_are_refused(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    ref = classifier(tmp_path, {0: 0}, 1000)
    with pytest.raises(
        MismatchError, match=r"the classes blue, green, red are not among the outputs n01440764 \(tench"
    ):
        open_images_for(ref, dataset, OPTIONS)
    record = audited(ref, dataset, tmp_path / "run")
    assert not record.valid
    assert "blue, green, red are not among the outputs" in record.reason


@pytest.mark.parametrize(
    "held", [["blue", "x", "red", "green"], {"blue": 0, "red": 2, "green": 3}, {"0": "blue", "2": "red", "3": "green"}]
)
def test_names_of_the_outputs_of_a_file(tmp_path: Path, held: Any) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "names.json").write_text(json.dumps(held))
    ref = classifier(tmp_path, {0: 2, 2: 0, 3: 1}, 4) + f"&classes={tmp_path / 'names.json'}"
    images = open_images_for(ref, dataset, OPTIONS)
    assert images.labels[:3].tolist() == [0, 3, 2]  # blue, green, red
    network = open_model(ref, images, OPTIONS).network
    assert bool((network(images.images).argmax(1) == images.labels).all())


@pytest.mark.parametrize("command", ["audit", "attack", "certify"])
def test_commands_preprocess_and_restrict(tmp_path: Path, command: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "map.json").write_text(json.dumps({"red": 4, "green": 2, "blue": 3}))
    ref, mapped = (
        classifier(tmp_path, {4: 0, 2: 1, 3: 2}, 6, rival=(1, 0, 0.01)),
        f"{dataset}?classes={tmp_path / 'map.json'}",
    )
    more = {
        "audit": ["--estimator", "label-level", "--seeds", "1"],
        "attack": ["--tier", "smoke"],
        "certify": ["--head-images", "0", "--attack", "smoke", "--hubs", "1", "--hubs-only"],
    }[command]
    call = [command, ref, "--dataset", mapped, "--eps", "1/255", "--trust-code", "--device", "cpu", "--json", *more]
    accuracies = []
    for extra in ([], ["--restrict-classes"]):
        assert main([*call, *extra]) in (0, 1)  # an attack on a linear network may fail its checks
        found = json.loads(capsys.readouterr().out)
        row = found if command == "attack" else found[0]
        accuracies.append(row.get("natural_accuracy", row.get("certified_bound")))
    if command != "certify":
        assert accuracies == [pytest.approx(2 / 3), 1.0]
    assert main([*call, "--preprocess", "none"]) == 2
    assert "must share channels and size" in "".join(capsys.readouterr())


def test_the_run_folder_of_an_audit_depends_on_the_rules(tmp_path: Path, monkeypatch: Any) -> None:
    from audit.config.benchmark import BenchmarkConfig

    values = {"name": "a", "dataset": "digits", "models": ["bundled:x"], "threats": {"eps": 0.1}}
    plain = BenchmarkConfig.model_validate(values).canonical()
    assert "preprocess" not in plain
    assert "restrict_classes" not in plain
    for change in ({"preprocess": "none"}, {"restrict_classes": True}):
        assert BenchmarkConfig.model_validate({**values, **change}).canonical() != plain
    assert BenchmarkConfig.model_validate({**values, "preprocess": "model"}).canonical() == plain


def test_a_network_of_another_channel_is_refused(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3))
    (tmp_path / "nets.py").write_text(FACTORY.replace("48", "16"))
    torch.save(network.state_dict(), tmp_path / "grey.pt")
    ref = f"file:{tmp_path / 'grey.pt'}?arch={tmp_path / 'nets.py'}:colours&num_classes=3&crop=16&shape=1x16x16"
    images = open_images_for(ref, dataset, OPTIONS)
    assert images.images.shape[1:] == (1, 16, 16)
    with pytest.raises(MismatchError, match=r"takes images of 1x16x16, .* has 3x16x16: the channels differ"):
        open_model(ref, replace(images, images=images.images.expand(-1, 3, -1, -1)), OPTIONS)


def test_an_encoder_takes_photographs_with_the_data_sets_own_labels(tmp_path: Path) -> None:
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef encoder():\n    return nn.Sequential(nn.Conv2d(3, 2, 4, 4))\n"
    )
    torch.save(nn.Sequential(nn.Conv2d(3, 2, 4, 4)).state_dict(), tmp_path / "e.pt")
    ref = f"file:{tmp_path / 'e.pt'}?arch={tmp_path / 'nets.py'}:encoder&num_classes=0&resize=20&crop=16"
    for rules in (InputRules(), RESTRICTED):
        images = open_images_for(ref, dataset, OPTIONS, rules=rules)
        assert images.labels[:4].tolist() == [0, 1, 2, 0]
        assert images.class_map is None
        assert images.images.shape == (60, 3, 16, 16)
        assert open_representation(ref, images, OPTIONS).num_classes == 0
    with pytest.raises(MismatchError, match=r"takes images of 3x16x16, .* has 3x12x12: the size differ"):
        open_representation(ref, replace(images, images=images.images[..., :12, :12]), OPTIONS)


@pytest.mark.parametrize("rules", [[], ["--restrict-classes"]])
def test_witnesses_of_photographs_are_verified(tmp_path: Path, rules: list[str], monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = photographs(tmp_path / "photos", NAMES)
    (tmp_path / "map.json").write_text(json.dumps({"red": 4, "green": 2, "blue": 3}))
    ref, mapped = classifier(tmp_path, {4: 0, 2: 1, 3: 2}, 6), f"{dataset}?classes={tmp_path / 'map.json'}"
    common = ["--dataset", mapped, "--trust-code", "--device", "cpu", "--json"]
    search = ["--layer", "1", "--eps", "1", "--head-images", "20", "--attack", "smoke", "--images", "30", "--hubs", "1"]
    assert main(["certify", ref, *common, *search, "--out", "w.safetensors", *rules]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["best_head_accuracy"] <= row["certified_bound"] < 1
    assert main(["verify", "w.safetensors", "--model", ref, *common, *rules]) == 0
    assert json.loads(capsys.readouterr().out)["certified_bound"] == row["certified_bound"]
    assert main(["verify", "w.safetensors", "--model", ref, *common, "--preprocess", "none"]) != 0


def test_a_benchmark_of_photographs_is_validated_and_run(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = photographs(tmp_path / "photos", NAMES)
    ref = classifier(tmp_path, {0: 2, 1: 1, 2: 0}, 3)
    text = f"name: a\ndataset: '{dataset}'\nmodels: ['{ref}']\nthreats: {{eps: 1/255}}\n"
    text += "estimators: [label-level]\nseeds: [0]\nattack: smoke\n"
    (tmp_path / "b.yaml").write_text(text)
    assert main(["validate", "b.yaml", "--trust-code", "--device", "cpu"]) == 0, capsys.readouterr()
    assert main(["run", "b.yaml", "--trust-code", "--device", "cpu", "--json", "--out", "run"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["natural_accuracy"] == 1
    (tmp_path / "c.yaml").write_text(text + "preprocess: none\n")
    assert main(["validate", "c.yaml", "--trust-code", "--device", "cpu"]) == 2
    assert "must share channels and size" in capsys.readouterr().out
    (tmp_path / "d.yaml").write_text(text + "preprocess: nothing\n")
    assert main(["validate", "d.yaml", "--trust-code", "--device", "cpu"]) == 2
    assert "'model' or 'none'" in capsys.readouterr().out
