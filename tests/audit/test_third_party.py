"""Ten checkpoints nobody here made, audited as one benchmark: their accuracies are what others measured."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from audit import vulnerability
from audit.attacks import cross_entropy_objective, margin
from audit.benchmark import RunOptions, expand, run
from audit.config import read_config
from audit.information import CriticTraining
from audit.mine import Mine
from audit.pgd import PGD, minimise
from audit.records import AuditRecord
from audit.threat import Linf
from audit.types import keyed_generator
from audit.vulnerability import WorstCaseSearch
from model_zoo.datasets import ImageRequest, load_images
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


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AuditRecord]:
    """The benchmark file of the tests with all its images, its own attack, and little effort for the estimates."""
    folder = tmp_path_factory.mktemp("third-party")
    text = (ROOT / "tests" / "third_party.yaml").read_text()
    nets = "tests/third_party_nets.py"
    (folder / "b.yaml").write_text(text.replace("../shared", str(FOLDER)).replace(nets, str(ROOT / nets)))
    effort = Mine(CriticTraining(steps=20), WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1))
    # one estimator, whatever the file names: accuracies do not depend on it
    cells = {
        cell.ref: replace(cell, settings=replace(cell.settings, seeds=cell.settings.seeds[:1], estimator=effort))
        for cell in expand(read_config(folder / "b.yaml"))
    }
    options = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vulnerability, "_TRIAL_IMAGES", 5)
        return {record.model: record for record in run(list(cells.values()), folder / "run", options)}


def test_all_ten_are_audited(records: dict[str, AuditRecord]) -> None:
    assert {name: record.reason for name, record in records.items() if not record.valid} == {}
    assert set(records) == set(MEASURED_ELSEWHERE)
    for record in records.values():
        assert record.images == (1000 if record.model.startswith("mnist") else 500)
        assert any(flag.startswith("code_trusted") for flag in record.flags)
        assert record.dimension == record.num_classes == 10


@pytest.mark.parametrize("name", MEASURED_ELSEWHERE)
def test_accuracies_are_what_others_measured(name: str, records: dict[str, AuditRecord]) -> None:
    natural, adversarial = MEASURED_ELSEWHERE[name]
    assert records[name].natural_accuracy == pytest.approx(natural, abs=TOLERANCE)
    stronger = STRONGER.get(name, 0.0)
    assert records[name].adversarial_accuracy == pytest.approx(adversarial - stronger, abs=TOLERANCE)


@pytest.mark.parametrize("name", STRONGER)
def test_their_attack_gives_their_number_where_ours_is_stronger(name: str, records: dict[str, AuditRecord]) -> None:
    network = load_model(records[name].details["notes"]["recorded_ref"], SourceSettings(trust_code=True)).network
    images = load_images(records[name].dataset, ImageRequest(count=records[name].images))
    objective = cross_entropy_objective(network, images.labels)
    theirs = PGD(steps=40, relative_step=0.1)
    found = minimise(objective, images.images, Linf(records[name].eps), theirs, keyed_generator(0))
    right = (margin(network(found.images), images.labels) > 0).double().mean().item()
    assert right == pytest.approx(MEASURED_ELSEWHERE[name][1], abs=TOLERANCE)
