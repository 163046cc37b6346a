"""Ten checkpoints nobody here made, audited as one benchmark: their accuracies are what others measured."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from audit.adversary.label_attack import TIERS, cross_entropy_objective, margin
from audit.adversary.pgd import PGD, minimise
from audit.config.yaml_source import read_config
from audit.information.label_entropy import LabelEntropy
from audit.random_keys import keyed_generator
from audit.records import AuditRecord
from audit.run.cell import expand
from audit.run.loading import RunOptions
from audit.run.run_loop import run
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))
TOLERANCE = 0.02  # their attack is PGD from one random start; ours adds the margin loss for what survives

# natural accuracy, and under l-inf PGD at 2/255 (CIFAR-10, 500 images) or 0.1 (MNIST, 1,000), from FOLDER/README.md
MEASURED_ELSEWHERE = {
    "resnet20": (0.820, 0.001),
    "resnet56": (0.83, 0.0),
    "resnet2b": (0.680, 0.532),
    "cnn-a-adv": (0.678, 0.516),
    "cnn-a-mix4": (0.700, 0.540),
    "cnn-a-wide": (0.608, 0.498),
    "marabou-medium": (0.688, 0.280),
    "mnist-cnn-a-adv": (0.956, 0.914),
    "mnist-cnn-a-certified": (0.982, 0.954),
    "mnist-conv-small": (0.981, 0.535),
}
# how far our attack goes below their number, by more than the tolerance
STRONGER = {"mnist-conv-small": 0.04}

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)"),
]


def audited(name: str, folder: Path) -> AuditRecord:
    """One model of the tests' file with all its images, an attack as hard as theirs, and little effort beside it."""
    text = (ROOT / "tests" / "third_party.yaml").read_text()
    nets = "tests/third_party_nets.py"
    (folder / "b.yaml").write_text(text.replace("../shared", str(FOLDER)).replace(nets, str(ROOT / nets)))
    (cell, *_) = [cell for cell in expand(read_config(folder / "b.yaml")) if f"&name={name}&" in cell.ref]
    estimator = LabelEntropy(targets=1, kept=1, steps=1)
    little = replace(cell.settings, seeds=cell.settings.seeds[:1], estimator=estimator, attack=TIERS["smoke"])
    options = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
    (record,) = run([replace(cell, settings=little)], folder / "run", options)
    return record


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MEASURED_ELSEWHERE)
def test_accuracies_are_what_others_measured_and_no_alarm_is_raised(name: str, tmp_path: Path) -> None:
    record = audited(name, tmp_path)
    assert record.reason == ""
    assert record.images == (1000 if name.startswith("mnist") else 500)
    assert any(flag.startswith("code_trusted") for flag in record.flags)
    assert record.dimension == record.num_classes == 10
    natural, adversarial = MEASURED_ELSEWHERE[name]
    assert record.natural_accuracy == pytest.approx(natural, abs=TOLERANCE)
    assert record.adversarial_accuracy == pytest.approx(adversarial - STRONGER.get(name, 0.0), abs=TOLERANCE)
    assert [check for check in record.checks if check["passed"] is False] == []
    assert len(record.checks) >= 8


@pytest.mark.parametrize("name", STRONGER)
def test_their_attack_gives_their_number_where_ours_is_stronger(name: str) -> None:
    cells = expand(read_config(ROOT / "tests" / "third_party.yaml"))
    (cell, *_) = [cell for cell in cells if f"&name={name}&" in cell.ref]
    local = cell.ref.replace("../shared", str(FOLDER)).replace("tests/third", str(ROOT / "tests" / "third"))
    network = load_model(local, SourceSettings(trust_code=True)).network
    images = load_images(cell.dataset.replace("../shared", str(FOLDER)), ImageRequest(count=cell.images))
    objective = cross_entropy_objective(network, images.labels)
    theirs = PGD(steps=40, relative_step=0.1)
    found = minimise(objective, images.images, cell.threat, theirs, keyed_generator(0))
    right = (margin(network(found.images), images.labels) > 0).double().mean().item()
    assert right == pytest.approx(MEASURED_ELSEWHERE[name][1], abs=TOLERANCE)
