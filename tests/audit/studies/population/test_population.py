"""The study of many networks at toy size: eight networks of two epochs, their rows, page, figures and resumption."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from audit.adversary.threat import Linf
from audit.errors import IntegrityError, UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.studies.population import study
from audit.studies.population.measures import displacement, gradient_norm, margin_ratio
from audit.studies.population.plan import PLAN_FILE, Plan, read_plan
from audit.studies.population.study import PopulationRequest, load_data, read_rows, run_population
from reports.cli import main

_WHOLE = PLAN_FILE.read_text(encoding="utf-8")
TOY = f"""
[population]
seeds = [0]
methods = ["adversarial", "trades", "noise"]
radii = [0.0, 1.0]
[population.families]
baseline-h = {{ architecture = "baseline-h", width = 2 }}
vgg = {{ architecture = "vgg", width = 2 }}
[held_back]
families = []
methods = ["trades"]
[exclusion]
natural_accuracy = 0.0
[training]
batch_size = 64
steps = 1
relative_step = 0.5
[sets.digits]
eps = 0.1
l2 = 0.4
side = 0
channels = 1
train = 128
heads = 40
images = 40
information = 40
epochs = 2
transfer = [1, 3, 5, 7, 9]
{_WHOLE[_WHOLE.index("[outcomes]") : _WHOLE.index("# Estimators too costly")]}
[subset]
families = ["vgg"]
methods = ["adversarial"]
seeds = [0]
estimators = {{ rv_label_information_logits = "label-information" }}
optional = {{ rv_mine_logits = "mine" }}
[search]
sandwich = {{ quantisers = [2], widths = [8.0], annealing_steps = 2, start_steps = 1, steps = 1 }}
label_level = {{ targets = 2, kept = 1, steps = 1 }}
displacement_steps = 2
[statistics]
shuffles = 50
draws = 50
seed = 0
level = 0.05
coverage = 0.9
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of the toy study, run by the command."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "read_plan", lambda: Plan(TOY))
        assert main(["reproduce", "figure1", "--scale", "study", "--out", str(folder)]) == 0
    return folder


def rows_of(folder):
    with (folder / "digits.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_whole_study_at_toy_size(finished):
    rows = rows_of(finished)
    assert [row["model"] for row in rows[:3]] == [
        "baseline-h-standard-0-seed0", "vgg-standard-0-seed0", "baseline-h-adversarial-1-seed0",
    ]  # fmt: skip
    assert len(rows) == len({row["model"] for row in rows}) == 8
    assert {row["model"].rpartition("-seed")[0].rpartition("-")[0] for row in rows if row["held_back"] == "True"} == {
        "baseline-h-trades", "vgg-trades",
    }  # fmt: skip
    plan = Plan(TOY)
    for row in rows:
        measured = {name: float(row[name]) for name in (*plan.values["outcomes"], *plan.values["predictors"])}
        assert measured["gap"] == pytest.approx(measured["natural"] - measured["adversarial"], abs=1e-4)
        assert measured["adversarial_twice"] <= measured["adversarial"] <= measured["adversarial_half"] + 1e-9
        card = json.loads((finished / "models" / "digits" / f"{row['model']}.json").read_text())
        assert (card["id"], card["trained_eps"]) == (row["model"], float(row["trained_eps"]))
        assert card["published"][0]["value"] == pytest.approx(measured["natural"], abs=1e-4)
    page = (finished / "study.md").read_text()
    assert page.startswith("# Does RV predict robustness?\n\n")
    assert (finished / "plan.toml").read_text() == TOY
    assert all((finished / f"{name}.png").exists() for name in ("population", "forest"))


def test_a_stopped_study_resumes_and_a_finished_one_has_nothing_to_do(finished, tmp_path, monkeypatch, capsys):
    whole, half = (
        (finished / "digits.csv").read_text(),
        "".join((finished / "digits.csv").read_text().splitlines(keepends=True)[:8]),
    )
    (tmp_path / "digits.csv").write_text(half)
    trained, original = [], study.train_classifier
    monkeypatch.setattr(study, "train_classifier", lambda *given: (trained.append(1), original(*given)))
    request = PopulationRequest(folder=tmp_path, plan=Plan(TOY))
    run_population(request)
    assert len(trained) == 1  # seven of eight rows were there
    assert request.path.read_text() == whole
    monkeypatch.setattr(study, "train_classifier", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(study, "read_plan", lambda: Plan(TOY))
    assert main(["reproduce", "figure1", "--scale", "study", "--out", str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr()
    assert "nothing was to do" in captured.err
    assert json.loads(captured.out)[0].endswith("digits.csv")
    assert request.path.read_text() == whole


def test_rows_of_another_plan_or_file_are_not_continued(finished):
    other = TOY.replace("epochs = 2", "epochs = 3")
    with pytest.raises(UsageError, match="rows of another plan or of other images"):
        run_population(PopulationRequest(folder=finished, plan=Plan(other)))
    with pytest.raises(IntegrityError, match="other columns"):
        read_rows(finished / "plan.toml")


def test_the_subset_is_measured_after_the_rows_and_once(finished, tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(finished / "models")
    (tmp_path / "digits.csv").write_text((finished / "digits.csv").read_text())
    called = []

    def measured(_network, _data, layer, name, _search):
        called.append((layer, name))
        return {"rv_mine_logits": 0.25}

    monkeypatch.setattr(study, "information", measured)
    request = PopulationRequest(folder=tmp_path, plan=Plan(TOY), subset="mine")
    for _ in range(2):
        study.measure_subset(request)
    assert called == [("logits", "mine")] * 2  # vgg, standard and adversarial
    found = {row["model"]: row["rv_mine_logits"] for row in rows_of(tmp_path)}
    assert [name for name, value in found.items() if value] == ["vgg-standard-0-seed0", "vgg-adversarial-1-seed0"]
    with pytest.raises(UsageError, match="subset estimator 'mien' is none of label-information, mine"):
        study.measure_subset(replace(request, subset="mien"))
    with pytest.raises(UsageError, match="has no row yet"):
        study.measure_subset(PopulationRequest(folder=tmp_path / "new", plan=Plan(TOY)))


def test_the_published_plan_is_a_grid_with_networks_held_back():
    plan = read_plan()
    recipes = plan.recipes(plan.chosen_set("digits"))
    assert len(recipes) == 5 * (1 + 3 * 5) * 2
    assert len({recipe.id for recipe in recipes}) == len({recipe.training.seed for recipe in recipes}) == len(recipes)
    held = [recipe for recipe in recipes if recipe.held_back]
    assert {recipe.family for recipe in held if recipe.method != "trades"} == {"densenet"}
    assert len(held) == 2 * (16 + 4 * 5)
    assert sorted({recipe.trained_eps for recipe in recipes}) == pytest.approx([0, 0.0125, 0.025, 0.05, 0.1, 0.15])
    standard = [recipe for recipe in recipes if not recipe.multiple]
    assert all(recipe.training.threat is None for recipe in standard)


def test_a_reference_is_divided_and_resized(tmp_path):
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist-small.npz", images=pixels, labels=np.arange(200) % 10)
    small = TOY.replace("[sets.digits]", "[sets.mnist]").replace("side = 0", "side = 14")
    request = PopulationRequest("mnist", f"npz:{tmp_path}/mnist-small.npz", folder=tmp_path, plan=Plan(small))
    data = load_data(request)
    assert (len(data.images), len(data.held_out)) == (128, 40)
    assert data.images.shape[1:] == (1, 14, 14)
    assert torch.equal(data.labels, torch.arange(128) % 10)
    assert torch.equal(data.held_out_labels, torch.arange(128, 168) % 10)
    assert torch.equal(data.transferred(torch.arange(10)), torch.arange(10) % 2)
    np.savez(tmp_path / "train.npz", images=pixels[::-1], labels=np.arange(200) % 10)
    apart = load_data(replace(request, train_data=f"npz:{tmp_path}/train.npz"))
    assert torch.equal(apart.held_out, load_data(request).images[:40])  # all of --data is then held out
    assert not torch.equal(apart.images, data.images)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"dataset": "digit"}, UnknownNameError, "did you mean 'digits'"),
        ({"seeds": 3}, UsageError, "3 training seeds were asked for; the plan of the study has 1"),
        ({"data": "npz:a", "train_data": "npz:a"}, UsageError, "audit networks on held-out images"),
    ],
)
def test_invalid_requests_are_refused(change, error, sentence):
    with pytest.raises(error, match=sentence):
        PopulationRequest(plan=Plan(TOY), **change)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (("[search]", "[serach]"), UsageError, "the plan lacks the sections search"),
        (('"noise"]', '"nois"]'), UnknownNameError, "did you mean 'noise'"),
        (('methods = ["trades"]', 'methods = ["trade"]'), UnknownNameError, "did you mean 'trades'"),
        (("information = 40", "information = 80"), UsageError, "information 80 of study set digits exceeds its images"),
        (("epochs = 2", "epochs = 0"), UsageError, "epochs 0 of study set digits must be at least 1"),
    ],
)
def test_invalid_plans_are_refused(change, error, sentence):
    with pytest.raises(error, match=sentence):
        Plan(TOY.replace(*change)).chosen_set("digits")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["figure2", "--scale", "study"], "scale study is of figure1, not of figure2"),
        (["figure1", "--scale", "tiny", "--seeds", "1"], "takes neither --seeds nor --subset"),
        (["figure1", "--scale", "study", "--dataset", "npz:mnist.npz", "--data", "npz:b.npz"], "give one of them"),
        (["figure1", "--scale", "study", "--dataset", "npz:other.npz"], "'other'"),
    ],
)
def test_the_command_refuses_what_does_not_fit(words, sentence, capsys):
    assert main(["reproduce", *words]) == 2
    assert sentence in capsys.readouterr().err


class Linear(nn.Module):
    """A linear classifier of four pixels; its hidden layer doubles them."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4, bias=False)
        self.classifier = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(2 * torch.eye(4))
            self.classifier.weight.copy_(torch.randn(3, 4, generator=keyed_generator(7)))

    def forward(self, images):
        return self.classifier(self.hidden(images.flatten(1)))


def test_rivals_of_a_linear_network_are_closed_forms():
    network = Linear().eval().requires_grad_(False)
    images = 0.3 + 0.4 * torch.rand(30, 1, 2, 2, generator=keyed_generator(8))
    logits, weights = network(images), 2 * network.classifier.weight
    labels = torch.arange(30) % 3
    ratios, gradients = [], []
    for logit, label in zip(logits, labels, strict=True):
        other = logit.clone()
        other[label] = -torch.inf
        rival = int(other.argmax())
        ratios.append((logit[label] - logit[rival]) / (weights[label] - weights[rival]).abs().sum())
        gradients.append((weights.T @ (logit.softmax(0) - torch.eye(3)[label])).abs().sum())
    assert margin_ratio(network, images, labels) == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)
    assert gradient_norm(network, images, labels) == pytest.approx(float(torch.stack(gradients).mean()), rel=1e-4)
    # the farthest corner of the ball, doubled, over the root mean square distance of features from their mean
    features = 2 * images.flatten(1)
    spread = (features - features.mean(0)).square().sum(1).mean().sqrt()
    expected = 2 * 0.1 * 2 / float(spread)  # eps 0.1 in each of four pixels
    assert displacement(network, images, Linf(0.1), 10) == pytest.approx(expected, rel=1e-3)
