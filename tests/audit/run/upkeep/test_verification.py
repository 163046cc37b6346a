"""Verification finds each planted inconsistency and accepts unmodified runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.config.yaml_source import read_config
from audit.records import AuditRecord, RecordStore
from audit.run import run_loop as benchmark
from audit.run.cell import expand
from audit.run.run_loop import claim
from audit.run.upkeep.verification import check_record, check_run, differences
from audit.storage import digest
from audit.theory import adversarial_accuracy_bound, adversarial_risk_bound, fano_accuracy_bound
from reports.cli import main
from reports.tables.ranking import write_leaderboard

BENCHMARK = """\
name: small
dataset: digits
models: [bundled:digits-vgg-standard, bundled:digits-vgg-robust]
threats: {eps: 0.2}
estimators: [{name: sandwich, steps: 2, start_steps: 1, draws: 1}]
attack: {steps: 2}
seeds: [0, 1]
images: 60
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "b.yaml").write_text(BENCHMARK)
    config = read_config(folder / "b.yaml")
    claim(folder / "run", config, BENCHMARK)
    assert all(record.valid for record in benchmark.run(expand(config), folder / "run"))
    write_leaderboard(folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def record(finished: Path) -> AuditRecord:
    return next(iter(RecordStore(finished)))


def test_an_unmodified_run_is_accepted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_run(run)[1] == []
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.strip() == "accepted: 2 records, 2 of them with numbers"


def test_a_recomputed_cell_agrees(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--replay", "1", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accepted"]
    assert len(told["replayed"]) == 1
    assert told["violations"] == []


def test_consistent_changes_are_found_by_recomputing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (run / "cells").iterdir():
        data = json.loads(path.read_text())
        lift = 0.25  # of all values that depend on it
        for row in data["details"]["per_seed"]:
            row["normal_nats"] += lift
            row["rv"] = row["normal_nats"] - row["worst_nats"]
        data["normal_nats"] += lift
        data["rv"] = data["normal_nats"] - data["worst_nats"]
        path.write_text(json.dumps(data))
    write_leaderboard(run)
    assert main(["verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["verify", str(run), "--replay", "2"]) == 5
    assert capsys.readouterr().out.count("recomputed") == 4  # normal_nats and rv of both


def _planted(change: Callable[[dict[str, Any]], object]) -> Callable[[AuditRecord], list[str]]:
    def found(record: AuditRecord) -> list[str]:
        data = json.loads(json.dumps(record.to_dict()))
        change(data)
        return check_record(AuditRecord.from_dict(data))

    return found


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "rv": (lambda data: data.update(rv=data["rv"] + 1e-6), "rv is"),
    "se": (lambda data: data.update(rv_se=data["rv_se"] / 2), "rv_se is"),
    "mean": (lambda data: data.update(worst_nats=data["worst_nats"] - 0.1), "worst_nats is"),
    "seed": (lambda data: data["details"]["per_seed"][0].update(rv=9.0), "rv of seed 0 is 9.0"),
    "seed left out": (lambda data: data["details"]["per_seed"].pop(), "its seeds are not those of its identity"),
    "theorem": (lambda data: data.update(adversarial_accuracy_bound=0.31), "adversarial_accuracy_bound is 0.31"),
    "risk": (lambda data: data.update(adversarial_risk_bound=0.9), "adversarial_risk_bound is 0.9"),
    "fano": (lambda data: data.update(fano_accuracy_bound=0.05, flags=["contradicted: x"]), "fano_accuracy_bound is"),
    "natural under adversarial": (
        lambda data: data.update(natural_accuracy=data["adversarial_accuracy"] - 1 / 60),
        "is above the clean accuracy",
    ),
    "gap": (lambda data: data.update(adversarial_gap=0.0), "adversarial_gap is 0.0"),
    "no share": (lambda data: data.update(natural_accuracy=0.901), "is not a fraction of 60 images"),
    "interval": (lambda data: data.update(adversarial_accuracy_low=1.0), "is outside its interval"),
    "eps": (lambda data: data.update(eps=1.5), "eps 1.5 is not a legal linf radius"),
    "eps of the identity": (lambda data: data.update(eps=0.1), "eps is 0.1, but 0.2 in its identity"),
    "weights": (lambda data: data.update(weights_sha256="0" * 64), "weights_sha256 is '000"),
    "identity": (lambda data: data["details"]["identity"].update(eps=0.1), "the digest of its identity is"),
    "no identity": (lambda data: data["details"].pop("identity"), "has no identity"),
    "data": (lambda data: data["details"].update(data_sha256="0"), "data_sha256 is not that"),
    "a failure with numbers": (lambda data: data.update(status="failed"), "failed, but has an rv"),
    "certificate": (lambda data: data.update(certified_bound=0.1, best_head_accuracy=0.5), "above the certified bound"),
    "ledger": (lambda data: data.update(proved_share=0.6, not_broken_share=0.5), "is above 0.5, the share not broken"),
    "ledger and attack": (
        lambda data: data.update(proved_share=data["adversarial_accuracy"] + 1 / 60, not_broken_share=1.0),
        "the share proved to stay right",
    ),
}


def _with_bounds(record: AuditRecord) -> AuditRecord:
    """Return a record with the bounds that an estimator of information about labels would state."""
    nats = record.worst_nats
    assert nats is not None
    return replace(
        record,
        adversarial_accuracy_bound=adversarial_accuracy_bound(nats, 10),
        adversarial_risk_bound=adversarial_risk_bound(nats, 10),
        fano_accuracy_bound=fano_accuracy_bound(nats, 0.15),
    )


@pytest.mark.parametrize("lie", LIES)
def test_planted_inconsistencies_are_found(record: AuditRecord, lie: str) -> None:
    record = _with_bounds(record)
    assert check_record(record) == []
    change, words = LIES[lie]
    found = _planted(change)(record)
    assert any(words in what for what in found), found


def test_contradictions_without_a_flag_are_found(record: AuditRecord) -> None:
    high = replace(record, adversarial_accuracy_low=1.0, fano_accuracy_bound=0.9, flags=())
    assert any(
        "the low end of the measured adversarial accuracy, without a flag" in what for what in check_record(high)
    )
    above = replace(record, normal_nats=0.0, worst_nats=9.0, flags=())
    assert any("worst_nats 9.0 is above normal_nats 0.0 without a flag" in what for what in check_record(above))
    told = replace(above, flags=("contradicted: worst_nats 9.0 is above normal_nats 0.0",))
    assert not any("without a flag" in what for what in check_record(told))


def _cells(run: Path) -> list[Path]:
    return sorted((run / "cells").iterdir())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: _cells(run)[0].rename(run / "cells" / f"{'0' * 64}.json"), "which is not its file name"),
        (lambda run: _cells(run)[0].write_text("{"), "is not a record"),
        (lambda run: _cells(run)[0].write_text('{"schema": "rvaudit.record/1", "x": 1}'), "is not a record"),
        (lambda run: (run / "leaderboard.csv").write_text("rank\n"), "leaderboard.csv: disagrees with the records"),
        (lambda run: (run / "run.sha256").write_text("0\n"), "does not match run.sha256"),
        (lambda run: (run / "benchmark.yaml").write_text("name: [\n"), "is not a benchmark"),
        (lambda run: (run / "run.sha256").unlink(), "is no run folder"),
        (lambda run: shutil.rmtree(run / "cells"), "holds no record"),
    ],
)
def test_a_damaged_folder_exits_with_5(
    run: Path, spoil: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(run)
    assert main(["verify", str(run)]) == 5
    assert words in capsys.readouterr().out


@pytest.mark.parametrize("value", ["1.0", None, True, [], {}])
def test_values_of_the_wrong_kind_are_found_and_raise_nothing(run: Path, value: object) -> None:
    path = _cells(run)[0]
    data = json.loads(path.read_text())
    for name in ("rv", "natural_accuracy", "details", "eps"):
        path.write_text(json.dumps({**data, name: value}))
        assert check_run(run)[1], name


def test_records_of_no_benchmark_cell_are_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stray = next(iter(RecordStore(run)))
    identity = {**stray.details["identity"], "layer": "input"}
    details = {**stray.details, "identity": identity}
    RecordStore(run).write(replace(stray, layer="input", cell_id=digest(identity), details=details))
    write_leaderboard(run)
    assert main(["verify", str(run), "--replay", "1"]) == 5
    assert "is not a cell of the benchmark" in capsys.readouterr().out


def test_allowed_differences_depend_on_the_device(record: AuditRecord) -> None:
    moved = replace(record, rv=(record.rv or 0.0) + 0.01)
    assert differences(record, record) == []
    assert any("rv is" in what for what in differences(record, moved))
    elsewhere = replace(moved, details={**moved.details, "provenance": {"device": "another"}}, rv_se=0.1)
    assert differences(record, elsewhere) == []
    assert "fails when recomputed" in differences(record, replace(record, status="failed", reason="x"))[0]
    assert "is the cell 0" in differences(record, replace(record, cell_id="0"))[0]
    fewer = replace(record, adversarial_accuracy=(record.adversarial_accuracy or 0.0) + 3 / 60)
    assert any("adversarial_accuracy" in what for what in differences(record, fewer))


def test_a_witness_file_needs_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w").write_bytes(b"x")
    assert main(["verify", str(tmp_path / "w")]) == 2
    assert "to verify it as a witness file, add --model and --dataset" in capsys.readouterr().err
