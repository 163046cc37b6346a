"""Ten checkpoints nobody here made, audited as one benchmark: their accuracies are what others measured."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from audit.benchmark import RunOptions, expand, run
from audit.config import read_config
from audit.information import CriticTraining
from audit.records import AuditRecord
from audit.vulnerability import WorstCaseSearch
from model_zoo.load import SourceSettings

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

pytestmark = [
    pytest.mark.third_party,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no third-party files in {FOLDER} (see RVAUDIT_THIRD_PARTY)"),
]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AuditRecord]:
    """The benchmark file of the tests with all its images, its own attack, and little effort for the estimates."""
    folder = tmp_path_factory.mktemp("third-party")
    text = (ROOT / "tests" / "third_party.yaml").read_text()
    text = text.replace("../shared", str(FOLDER)).replace("tests/third_party_nets.py", f"{ROOT}/tests/third_party_nets.py")
    (folder / "b.yaml").write_text(text)
    cells = [
        replace(
            cell,
            settings=replace(
                cell.settings,
                seeds=cell.settings.seeds[:1],
                estimator=CriticTraining(steps=20),
                search=WorstCaseSearch(collapse_steps=2, rounds=2, critic_steps=1),
            ),
        )
        for cell in expand(read_config(folder / "b.yaml"))
    ]
    options = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
    return {record.model: record for record in run(cells, folder / "run", options)}


def test_all_ten_are_audited(records: dict[str, AuditRecord]) -> None:
    assert {name: record.reason for name, record in records.items() if not record.valid} == {}
    assert set(records) == set(MEASURED_ELSEWHERE)
    for record in records.values():
        assert record.images == (1000 if record.model.startswith("mnist") else 500)
        assert any(flag.startswith("code_trusted") for flag in record.flags)
        assert record.dimension == record.num_classes == 10


@pytest.mark.parametrize("name", MEASURED_ELSEWHERE)
def test_accuracies_are_what_others_measured(name: str, records: dict[str, AuditRecord]) -> None:
    found = (records[name].natural_accuracy, records[name].adversarial_accuracy)
    assert found == pytest.approx(MEASURED_ELSEWHERE[name], abs=TOLERANCE)
