"""The state of every cell of a run, from its folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from audit.errors import EnvironmentFault
from audit.records import AuditRecord, RecordStore
from audit.run.upkeep.progress import DONE, FAILED, TO_DO, counts, record_key, run_statuses
from reports.cli import main

YAML = (
    "name: a\ndataset: digits\nmodels: ['x:*', {ref: 'y:b', name: bee}]\nthreats: {eps: [0.1, 0.2]}\n"
    "estimators: [sandwich, label-level]\n"
)


def expand(ref: str) -> list[str]:
    return ["x:1", "x:2"] if ref == "x:*" else [ref]


def record(ref: str, eps: float, estimator: str, model: str = "shown") -> AuditRecord:
    return AuditRecord(
        cell_id=f"{ref}-{eps}-{estimator}".replace(":", "-"), model=model, source="x", family="f", training="standard",
        trained_eps=0.0, dataset="digits", layer="logits", norm="linf", eps=eps, weights_sha256="0" * 64,
        estimator=estimator, attack="a", seeds=1, images=60, details={"notes": {"recorded_ref": ref}},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "benchmark.yaml").write_text(YAML)
    store = RecordStore(tmp_path)
    store.write(record("x:1", 0.1, "sandwich"))
    store.write(record("y:b", 0.2, "label-level"))
    failed = record("y:b", 0.1, "label-level", model="bee")
    store.write(replace(failed, status="failed", reason="no weights", details={}))
    return tmp_path


def test_every_cell_has_one_status(run: Path) -> None:
    found = run_statuses(run, expand)
    assert len({each.key for each in found}) == len(found) == 3 * 2 * 2
    assert counts(found) == {DONE: 2, FAILED: 1, TO_DO: 9}
    done = {(each.model, each.eps, each.estimator) for each in found if each.state == DONE}
    assert done == {("x:1", 0.1, "sandwich"), ("y:b", 0.2, "label-level")}
    failed = [(each.model, each.eps, each.estimator, each.reason) for each in found if each.state == FAILED]
    assert failed == [("y:b", 0.1, "label-level", "no weights")]  # other estimators are not affected


def test_a_success_outweighs_an_older_failure(run: Path) -> None:
    RecordStore(run).write(record("y:b", 0.1, "label-level"))
    (cell,) = [c for c in run_statuses(run, expand) if (c.model, c.eps, c.estimator) == ("y:b", 0.1, "label-level")]
    assert (cell.state, cell.cell_id) == (DONE, "y-b-0.1-label-level")


def test_record_keys_are_cell_keys(run: Path) -> None:
    keys = {each.key for each in run_statuses(run, expand)}
    assert {record_key(each) for each in RecordStore(run) if each.valid} <= keys


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"is no run folder: it has no benchmark\.yaml"):
        run_statuses(tmp_path, expand)


def test_the_command_prints_failures_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmark.yaml").write_text(YAML.replace("'x:*', ", ""))
    failed = record("y:b", 0.1, "sandwich", model="bee")
    RecordStore(tmp_path).write(replace(failed, status="failed", reason="no \x1b[31mweights", details={}))
    assert main(["status", str(tmp_path)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "failed: y:b, logits, 0.1: no weights"
    assert shown[-1] == "4 cells: 0 done, 1 failed, 3 to do"
    assert main(["status", str(tmp_path), "--json"]) == 1
    assert capsys.readouterr().out.count('"to do"') == 3
