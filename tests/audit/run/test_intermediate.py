"""Intermediate results are reused by the next process, recomputed when damaged, and deleted with the end of a run."""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch

import audit.run.intermediate
from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.certificate.results import CurvePoint, LayerCertificate
from audit.config.settings import AuditSettings
from audit.errors import EnvironmentFault
from audit.information.estimator import MIEstimate, WarmStart
from audit.information.label_entropy import LabelEntropy
from audit.information.label_information import LabelInformation
from audit.information.mine import Mine
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.records import RecordStore
from audit.run import model_results
from audit.run.cell import Cell
from audit.run.cell_runner import STORED_TYPES, CellRunner
from audit.run.intermediate import IntermediateResults, Memo, file_parts, read_result
from audit.run.layer_audit import LayerAudit
from audit.run.loading import RunOptions, open_images, open_model
from audit.run.run_loop import run
from audit.storage import digest

REF = "bundled:digits-baseline-h-robust"
SMALL = Sandwich(steps=2, start_steps=2, quantisers=(2,), annealing_steps=3, draws=1)
SETTINGS = AuditSettings(SMALL, two_losses(PGD(steps=2)), seeds=(0, 1))
CELL = Cell(REF, None, "digits", 50, "logits", Linf(0.2), SETTINGS)
CELLS = [replace(CELL, layer=layer, threat=threat) for layer in ("logits", "penultimate") for threat in
         (Linf(0.1), Linf(0.2))]  # fmt: skip
ESTIMATORS = (
    SMALL,
    LabelEntropy(steps=2),
    LabelInformation(steps=2, rounds=1),
    Mine(
        CriticTraining(steps=6, every=3, shape=CriticShape(width=8, embedding=4, channels=2)),
        WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1),
    ),
)
CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for SIGKILL: no code catches it."""


@pytest.fixture(autouse=True)
def everything_is_stored(monkeypatch):
    monkeypatch.setattr(audit.run.intermediate, "MIN_SECONDS", -1.0)


class Costly:
    """Counts computed results, and raises Killed before one of them."""

    def __init__(self) -> None:
        self.made: Counter[str] = Counter()
        self.dies_before = 0

    def counting(self, name, real):
        def function(*arguments):
            self.dies_before -= 1
            if self.dies_before == 0:
                raise Killed
            self.made[name] += 1
            return real(*arguments)

        return function


@pytest.fixture
def costly(monkeypatch):
    found = Costly()
    monkeypatch.setattr(
        model_results, "evaluate_robustness", found.counting("attack", model_results.evaluate_robustness)
    )
    for case in ("normal", "vulnerability"):
        monkeypatch.setattr(Sandwich, case, found.counting(case, getattr(Sandwich, case)))
    return found


def rows(folder: Path) -> dict[str, str]:
    return {
        record.cell_id: json.dumps(record.to_dict() | {"seconds": None, "timing": None})
        for record in RecordStore(folder)
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of a run that stores no intermediate results."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit.run.intermediate, "MIN_SECONDS", float("inf"))
        run(CELLS, folder)
    return rows(folder)


# two radii: two attacks; two layers, two seeds: four normal cases, of each of which the worst case at two radii
ALL = {"attack": 2, "normal": 4, "vulnerability": 8}


@pytest.mark.parametrize("number", [2, 6, 14])
def test_a_killed_run_repeats_no_intermediate_result(number, undisturbed, costly, tmp_path):
    costly.dies_before = number
    with pytest.raises(Killed):
        run(CELLS, tmp_path)
    assert costly.made.total() == number - 1
    run(CELLS, tmp_path)
    assert costly.made == ALL
    assert rows(tmp_path) == undisturbed
    assert not (tmp_path / "partial").exists()


def test_processes_share_intermediate_results(undisturbed, costly, tmp_path):
    """As on a cluster, every worker has its own runner, and all share the folder."""
    for cell in CELLS:
        runner = CellRunner(RunOptions(), tmp_path)
        runner.save(runner.compute(cell), cell, RecordStore(tmp_path))
    assert costly.made == ALL
    assert rows(tmp_path) == undisturbed
    # attacks, normal cases and the features of two layers; worst cases are deleted with their cells
    assert len(list((tmp_path / "partial").rglob("*.safetensors"))) == 2 + 4 + 2


def test_intermediate_results_are_kept_while_a_cell_has_failed(tmp_path):
    run([CELL, replace(CELL, layer="no such layer")], tmp_path)
    assert list((tmp_path / "partial").glob("*.safetensors"))


def test_fast_results_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.intermediate, "MIN_SECONDS", 20.0)
    run([CELL, replace(CELL, layer="no such layer")], tmp_path)
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["features"]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda each: each.name)
def test_estimates_round_trip(estimator, tmp_path):
    images = open_images("digits", RunOptions(), RunOptions().request(50))
    model = open_model(REF, images, RunOptions())
    one = replace(SETTINGS, estimator=estimator, seeds=(0,))
    layer = LayerAudit(model.network, images.images, images.labels, "logits", one)
    found = (layer.normal[0], estimator.vulnerability(layer.inputs, Linf(0.2), 0, WarmStart(layer.normal[0])))
    same(found, again(found, tmp_path))


def test_attacks_and_certificates_round_trip(tmp_path):
    runner = CellRunner(RunOptions())
    found = runner._model(CELL).robustness(runner.inputs.open(CELL))
    same(found, again(found, tmp_path))
    row = LayerCertificate(
        layer="a", norm="linf", eps=0.1, images=2, dimension=3, certified_tier="t", confidence=0.95, heads={"own": 0.5},
        at_hubs=(1, 2), delta_curve=(CurvePoint(0.1, 1 / 3, float("nan")),), flags=("é\ud800",),
    )  # fmt: skip
    assert repr(again(row, tmp_path)) == repr(row)
    shared = torch.arange(3.0)
    same((shared, shared[1:], torch.tensor(True)), again((shared, shared[1:], torch.tensor(True)), tmp_path))


def again(part, folder: Path):
    (folder / "part").write_bytes(b"".join(file_parts(part, STORED_TYPES)))
    return read_result(folder / "part", STORED_TYPES, CPU)


def same(one, other):
    """Assert that two results have equal types, numbers and tensors; mappings may become dicts."""
    if isinstance(one, Mapping):
        assert dict(one) == dict(other)
        return
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.equal(other)
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for mine, its in zip(one, other, strict=True):
            same(mine, its)
    elif is_dataclass(one):
        for known in fields(one):
            same(getattr(one, known.name), getattr(other, known.name))
    else:
        assert one == other or one != one


ESTIMATE = MIEstimate(1.0, 0.1, 50, 3.9, 1.0)


def test_damaged_files_are_recomputed(tmp_path):
    parts = IntermediateResults(tmp_path, CPU, STORED_TYPES)
    assert parts.get({"a": 1}, lambda: ESTIMATE) == ESTIMATE
    (path,) = (tmp_path / "partial").iterdir()
    whole = path.read_bytes()
    strange = whole.replace(b"MIEstimate", b"os.system!")
    for damaged in (b"", whole[:-5], whole[:40], b"x" * 100, strange):
        path.write_bytes(damaged)
        made = []
        assert parts.get({"a": 1}, lambda made=made: made.append(1) or ESTIMATE) == ESTIMATE
        assert made == [1]
        assert path.read_bytes() == whole
    assert parts.get({"a": 1}, lambda: None) == ESTIMATE
    assert parts.get({"a": 2}, lambda: None) is None
    assert IntermediateResults(tmp_path, torch.device("meta"), STORED_TYPES).get({"a": 1}, lambda: None) is None


def test_results_that_cannot_be_stored_are_returned(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise EnvironmentFault("no space left")

    monkeypatch.setattr(audit.run.intermediate, "write_atomically", full)
    assert IntermediateResults(tmp_path, CPU, STORED_TYPES).get({}, lambda: ESTIMATE) == ESTIMATE
    monkeypatch.undo()
    assert IntermediateResults(tmp_path, CPU, STORED_TYPES).get({}, object) is not None  # a type that files cannot hold
    for folder in (None, tmp_path / "not on this machine"):
        assert IntermediateResults(folder, CPU, STORED_TYPES).get({}, lambda: ESTIMATE) == ESTIMATE
    assert not (tmp_path / "not on this machine").exists()


def test_temporary_files_are_deleted_after_an_hour(tmp_path):
    (record,) = run([CELL], tmp_path)
    name = f".{digest('x')[:60]}."
    old, new, other = (tmp_path / "cells" / each for each in (f"{name}abcdefgh", f"{name}12345678", ".gitignore"))
    for path in (old, new, other):
        path.write_text("{")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    assert run([CELL], tmp_path)[0].cell_id == record.cell_id
    assert [path.exists() for path in (old, new, other)] == [False, True, True]


def test_a_value_is_computed_once():
    memo: Memo[tuple[str, int], list[int]] = Memo()
    first = memo.get(("a", 1), lambda: [1])
    assert memo.get(("a", 1), lambda: [2]) is first
    assert ("a", 1) in memo
    assert ("a", 2) not in memo
    assert list(memo) == [[1]]


def test_the_oldest_value_is_dropped_before_the_next_is_computed():
    memo: Memo[str, int] = Memo(slots=1)
    memo.get("a", lambda: 1)
    held: list[bool] = []

    def compute() -> int:
        held.append("a" in memo)
        return 2

    assert memo.get("b", compute) == 2
    assert held == [False]
    assert list(memo) == [2]
