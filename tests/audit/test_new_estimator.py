"""A new estimator needs its own code and entries in two tables: the registry and the calibration plans.

The tables are changed here as an edit of their modules would change them. Run as a script, this file adds the entries
before `audit.config` is imported, which derives the sections of benchmark files from the registry.
"""

import json
import subprocess
import sys
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf, ThreatModel
from audit.calibration.plans import PLANS, CalibrationPlan
from audit.information.encoding import encode, encode_clean
from audit.information.estimator import COLD_START, Estimator, EstimatorInputs, MIEstimate, Vulnerability, WarmStart
from audit.information.registry import REGISTRY, Registration
from audit.information.settings import Count, EstimatorSettings
from audit.random_keys import Purpose, keyed_generator
from audit.theory import binary_entropy
from audit.types import Encoded, Images, ObjectiveValue


@dataclass(frozen=True)
class ToySettings(EstimatorSettings):
    """Steps of the worst-case search."""

    subject: ClassVar[str] = "toy"

    steps: Count = 5


@dataclass(frozen=True)
class Toy(ToySettings, Estimator):
    """The entropy of the sign of the first feature."""

    quantity: ClassVar[str] = "H(sign g_1(X))"
    ranks: ClassVar[bool] = False
    bounds_heads: ClassVar[bool] = False
    floor_kind: ClassVar[Any] = "labels"

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        return _sign_entropy(encode_clean(inputs, 256))

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        normal, index = warm_start.normal or self.normal(inputs, seed), torch.arange(len(inputs.images))

        def objective(images: Images, _index: torch.Tensor) -> ObjectiveValue:
            value = inputs.encoder(images).features[:, 0]
            return ObjectiveValue(value, torch.zeros_like(value, dtype=torch.bool))

        generator = keyed_generator(seed, Purpose.TARGETED_MERGE)
        found = minimise(objective, inputs.images, threat, PGD(self.steps, 0.5), generator)
        worst = _sign_entropy(encode(inputs.encoder, found.images, 256))
        if worst.nats >= normal.nats:
            return Vulnerability(normal, normal, inputs.images, index, found.passes)
        return Vulnerability(normal, worst, found.images, index, found.passes)


def _sign_entropy(encoded: Encoded) -> MIEstimate:
    positive = float((encoded.features[:, 0] > 0).double().mean())
    nats, count = binary_entropy(positive), len(encoded.features)
    return MIEstimate(nats, stderr=count**-0.5, images=count, ceiling=log(2), validated=nats)


PLAN = CalibrationPlan(400, 0.02, 0.05, applies=lambda channel: channel.name.startswith("sign"))
ENTRIES: list[tuple[MutableMapping[str, Any], Any]] = [
    (REGISTRY, Registration(ToySettings(), f"{__name__}:Toy")),
    (PLANS, PLAN),
]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for table, entry in ENTRIES:
        monkeypatch.setitem(table, "toy", entry)


@pytest.mark.usefixtures("registered")
def test_a_new_estimator_audits_a_model() -> None:
    from audit import AuditSettings, audit_model
    from audit.adversary.label_attack import two_losses

    linear = nn.Linear(16, 2)
    linear.weight.data, linear.bias.data = torch.tensor([[1.0], [-1.0]]).expand(2, 16), torch.tensor([-8.0, 8.0])
    network = nn.Sequential(nn.Flatten(), linear)
    images = torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    settings = AuditSettings(Toy(), two_losses(PGD(2)), seeds=(0,))
    record = audit_model(network, images, network(images).argmax(1), "logits", Linf(0.3), settings)
    assert record.valid, record.reason
    assert (record.estimator, record.quantity) == ("toy", "H(sign g_1(X))")
    assert record.normal_nats is not None
    assert record.worst_nats is not None
    assert record.normal_nats > record.worst_nats + 0.1
    assert record.rv == pytest.approx(record.normal_nats - record.worst_nats)


@pytest.mark.usefixtures("registered")
def test_a_new_estimator_is_calibrated() -> None:
    from audit.calibration.calibrate import calibrate, settings_key

    rows = calibrate(Toy())
    assert {row.channel for row in rows} == {"sign of a Gaussian mixture"}
    assert {(row.estimator, row.samples) for row in rows} == {("toy", 400)}
    assert all(row.passed for row in rows), rows
    assert settings_key(Toy()).startswith("toy-")


def test_a_new_estimator_is_a_name_in_benchmark_files(tmp_path: Path) -> None:
    short, long = tmp_path / "short.yaml", tmp_path / "long.yaml"
    text = """name: toy
dataset: digits
models: [bundled:digits-baseline-h-standard]
images: 50
layers: [logits]
seeds: [0]
attack: smoke
threats: [{norm: linf, eps: 0.1}]
"""
    short.write_text(text + "estimators: [toy]\n")
    long.write_text(text + "estimators: [{name: toy, steps: 1}]\n")
    for path, steps in ((short, 5), (long, 1)):
        command = [sys.executable, __file__, str(path), str(tmp_path / path.stem)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert found["settings"] == {"steps": steps}
        (record,) = found["records"]
        assert (record["estimator"], record["reason"]) == ("toy", "")
        assert record["worst_nats"] <= record["normal_nats"] <= log(2)


def run_benchmark(path: Path, folder: Path) -> dict[str, Any]:
    """Return the settings of the only estimator of a benchmark file, and the records of its cells."""
    from audit.config.yaml_source import read_config
    from audit.run.cell import expand
    from audit.run.loading import RunOptions
    from audit.run.run_loop import run

    config = read_config(path)
    (estimator,) = config.estimators
    records = run(expand(config), folder, RunOptions(device="cpu"))
    return {"settings": asdict(estimator.settings()), "records": [asdict(record) for record in records]}


if __name__ == "__main__":
    for table, entry in ENTRIES:
        table["toy"] = entry
    sys.stdout.write(json.dumps(run_benchmark(Path(sys.argv[1]), Path(sys.argv[2])), default=str))
