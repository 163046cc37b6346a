"""Sanity checks: correct networks pass all of them, and each has a broken network that fails only this check."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from audit.adversary.attack_checks import Check
from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.config.yaml_source import read_config
from audit.information.label_entropy import LabelEntropy
from audit.records import RecordStore
from audit.run.cell import Cell, cells
from audit.run.loading import RunOptions
from audit.run.network_audit import audit_network
from audit.run.run_loop import run
from audit.run.sanity_checks import sanity_checks, sanity_flags
from model_zoo.catalogue import bundled_names, read_card
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model
from model_zoo.weights.checkpoints import write_safetensors
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame

ROOT = Path(__file__).parents[3]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
REF = "bundled:digits-vgg-robust"
QUICK = AuditSettings(LabelEntropy(steps=1), two_losses(PGD(steps=2)), seeds=(0,))


class Wrapped(nn.Module):
    """A correct network with changed inputs or outputs."""

    def __init__(self, network):
        super().__init__()
        self.network = network


class Permuted(Wrapped):
    def forward(self, images):
        return self.network(images).roll(1, dims=1)


class TwoSwapped(Wrapped):
    def forward(self, images):
        return self.network(images)[:, [8, 1, 2, 3, 4, 5, 6, 7, 0, 9]]


class Constant(Wrapped):
    def forward(self, images):
        return self.network(images) * torch.eye(10)[3] + torch.eye(10)[3]


class Softmax(Wrapped):
    def forward(self, images):
        return self.network(images).softmax(1)


class Random(Wrapped):
    def forward(self, images):
        logits = self.network(images)
        return logits + 0.01 * torch.randn_like(logits)


class Counting(Wrapped):
    def __init__(self, network):
        super().__init__(network)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, images):
        self.seen += len(images)
        return self.network(images)


class Rewriting(Wrapped):
    def forward(self, images):
        next(self.network.parameters()).mul_(1.0)
        return self.network(images)


class Training(Wrapped):
    """Batch norm that returns to training mode on every call."""

    def __init__(self, network):
        super().__init__(network)
        self.norm = nn.BatchNorm1d(10)

    def forward(self, images):
        self.norm.train()
        return self.network(images) + 0.1 * self.norm(self.network(images).roll(1, dims=0))


class Batchy(Wrapped):
    """Subtracts the mean of the batch, without a buffer."""

    def forward(self, images):
        logits = self.network(images)
        return logits - 0.2 * logits.mean(0)


class Unscaled(Wrapped):
    """Expects pixels from 0 to 255, behind a saturating function."""

    def forward(self, images):
        return self.network((images / 255).clamp(0, 1))


class HiddenNan(Wrapped):
    """A layer returns NaN, which a later one replaces."""

    def __init__(self, network):
        super().__init__(network)
        self.root = nn.Threshold(-1e9, float("nan"))

    def forward(self, images):
        return self.network(images) + self.root(torch.full_like(images, -1e10)).nan_to_num(0.0).mean()


MUTANTS = {
    "pixel_scale": (Unscaled, "more are correct with pixels of 0 to 255"),
    "finite_activations": (HiddenNan, "root"),
    "score_outputs": (Softmax, ""),
    "repeated_passes": (Random, ""),
    "eval_mode": (Counting, "seen"),
    "batch_independence": (Batchy, ""),
    "label_order": (Permuted, "labels look permuted: with renamed classes 9"),
}

CHECKS = [*MUTANTS, "published_accuracy"]


@pytest.fixture(scope="module")
def digits():
    found = load_images("digits", ImageRequest(count=300))
    return found.images, found.labels


@pytest.fixture(scope="module")
def honest():
    return load_model(REF).network


def failed(checks):
    return {check.id: check.reason for check in checks if check.passed is False}


@pytest.mark.parametrize("name", bundled_names())
def test_bundled_networks_pass_all_checks(name):
    found = load_images("digits", ImageRequest())
    (published,) = [n["value"] for n in read_card(name)["published"] if n["metric"] == "natural_accuracy"]
    network = load_model(f"bundled:{name}").network
    state, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    checks = sanity_checks(network, found.images, found.labels, published)
    assert failed(checks) == {}
    assert [check.id for check in checks] == CHECKS
    assert all(check.level == "gate" and check.passed for check in checks)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize("check", MUTANTS)
def test_each_broken_network_fails_its_check(check, honest, digits):
    mutant, reason = MUTANTS[check]
    found = failed(sanity_checks(mutant(honest).eval(), *digits))
    assert check in found
    assert reason in found[check]
    # at the wrong scale accuracy is at chance, too
    assert set(found) <= ({check, "label_order"} if check == "pixel_scale" else {check})


@pytest.mark.parametrize(
    ("mutant", "check", "reason"),
    [
        (TwoSwapped, "label_order", "labels look permuted"),
        (Constant, "label_order", "are correct, under 20.0%"),
        (Rewriting, "eval_mode", "network"),
        (Training, "eval_mode", "norm"),
    ],
)
def test_other_broken_networks(mutant, check, reason, honest, digits):
    assert reason in failed(sanity_checks(mutant(honest).eval(), *digits))[check]


def test_the_network_is_left_as_it_was(honest, digits):
    network, counting = Training(honest).eval(), Counting(honest).eval()
    sanity_checks(network, *digits)
    sanity_checks(counting, *digits)
    assert not any(part.training for part in network.modules())
    assert counting.seen == 0
    assert torch.equal(network.norm.running_mean, torch.zeros(10))
    assert not any(part._forward_hooks for part in network.modules())
    first = sanity_checks(network, *digits)
    assert first == sanity_checks(Training(honest).eval(), *digits)


def test_pixels_outside_their_range(honest, digits):
    images, labels = digits
    assert "range from 0 to 255" in failed(sanity_checks(honest, images * 255, labels))["pixel_scale"]
    assert "range from -1" in failed(sanity_checks(honest, images * 2 - 1, labels))["pixel_scale"]


def test_published_accuracy(honest, digits):
    *_, last = sanity_checks(honest, *digits)
    assert (last.id, last.passed) == ("published_accuracy", None)
    accuracy = float((honest(digits[0]).argmax(1) == digits[1]).float().mean())
    *_, near = sanity_checks(honest, *digits, published=accuracy + 0.01)
    assert near.passed
    assert near.figure == pytest.approx(accuracy)
    *_, far = sanity_checks(honest, *digits, published=1.2)
    assert "120.0% are published" in far.reason
    worse = nn.Sequential(nn.AvgPool2d(3, 1, 1), honest).eval()
    *_, last = sanity_checks(worse, *digits, published=accuracy)
    assert last.passed is False


def test_few_classes_and_few_images(digits):
    """Two classes need 6/5 of chance, 60 %; 12 images are too few to test a renaming."""
    images, labels = digits[0], digits[1] % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
    right = (network(images).argmax(1) == labels).float().mean()
    found = failed(sanity_checks(network, images, labels))
    assert ("label_order" in found) == (bool(right < 0.6))
    few = failed(sanity_checks(network, images[:12], 1 - network(images[:12]).argmax(1)))
    assert few["label_order"] == "0.0% are correct, under 60.0%"


def test_a_gated_network_is_shown_and_never_ranked(honest, digits, tmp_path):
    record = audit_network(Permuted(honest), *digits, "logits", Linf(0.1), QUICK)
    assert record.valid
    assert record.gated
    (flag,) = [flag for flag in record.flags if flag.startswith("gated")]
    assert "failed labels (labels look permuted" in flag
    assert ";" not in flag
    fit = replace(audit_network(honest, *digits, "logits", Linf(0.1), QUICK), cell_id="fit")
    assert not fit.gated
    assert [check["id"] for check in fit.checks][:8] == CHECKS
    records = [replace(found, ranks=True) for found in (record, fit)]
    table = leaderboard(to_frame(records))
    assert dict(zip(table["model"], table["rank"], strict=True)) == {"Permuted": "unranked", "VGG": "1"}
    assert RecordStore(tmp_path).write(record).exists()
    assert RecordStore(tmp_path).read(record.cell_id) == record


def test_a_record_without_failures_gets_no_flag(honest, digits):
    record = audit_network(honest, *digits, "logits", Linf(0.1), QUICK)
    assert not record.gated
    assert sanity_flags([Check("pixel_scale", "pixels", "gate", True, 0.0, "")]) == []


def cell(path, **more):
    ref = f"file:{path}?arch={REF}&num_classes=10"
    return Cell(ref, None, "digits", 100, "logits", Linf(0.1), QUICK)


def test_sanity_checks_of_a_benchmark_are_in_its_records(tmp_path):
    state = dict(load_model(REF).network.state_dict())
    first, *last = [next(iter(state)), *list(state)[-2:]]
    write_safetensors({**state, **{name: state[name].roll(1, 0) for name in last}}, tmp_path / "rolled.safetensors")
    write_safetensors({**state, first: state[first] * 1e38}, tmp_path / "huge.safetensors")
    found = run([cell(tmp_path / "rolled.safetensors"), cell(tmp_path / "huge.safetensors")], tmp_path / "run",
                RunOptions(SourceSettings(offline=True), device="cpu"))  # fmt: skip
    rolled, huge = found
    assert rolled.valid
    assert rolled.gated
    # outputs that are not finite give a failure with its reason, and the sanity checks made before
    assert not huge.valid
    assert "not finite" in huge.reason
    assert {check["id"] for check in huge.checks if check["passed"] is False} >= {"finite_activations"}


@pytest.mark.third_party
@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)")
def test_third_party_networks_pass_all_checks():
    text = (ROOT / "tests" / "third_party.yaml").read_text()
    assert text
    seen = set()
    for one in cells(read_config(ROOT / "tests" / "third_party.yaml")):
        if one.ref in seen:
            continue
        seen.add(one.ref)
        local = one.ref.replace("../shared", str(FOLDER)).replace("tests/third", str(ROOT / "tests" / "third"))
        network = load_model(local, SourceSettings(trust_code=True)).network
        found = load_images(one.dataset.replace("../shared", str(FOLDER)), ImageRequest(count=200))
        checks = sanity_checks(network, found.images, found.labels)
        assert failed(checks) == {}, one.ref
    assert len(seen) >= 10
