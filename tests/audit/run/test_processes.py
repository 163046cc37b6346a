"""Several processes of this machine give the records of one, also where they die."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

import audit.commands.around_runs
import audit.run.processes
from audit.commands.around_runs import executor_options, run_cells
from audit.errors import EnvironmentFault, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell, read_config
from audit.run.cell_runner import RunOptions, Watcher, Workbench
from audit.run.processes import Jobs, cores, free_bytes, run_in_jobs
from audit.run.run_loop import expand, one_at_a_time, run
from audit.run.worker import Ready, serve
from model_zoo.load import SourceSettings

YAML = """
name: shared
dataset: digits
models: [bundled:digits-vgg-standard, "bundled:no-such-model", bundled:digits-baseline-h-robust]
threats: [{eps: [0.1, 0.2]}]
estimators: [{name: label-level, steps: 2}]
attack: {steps: 2}
seeds: [0]
images: 50
"""
HERE: dict[str, Any] = {
    "trust_code": False, "offline": True, "model_dir": None, "data_dir": Path("data"), "device": "cpu"
}  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    path = tmp_path_factory.mktemp("shared") / "shared.yaml"
    path.write_text(YAML)
    return expand(read_config(path))


@pytest.fixture(scope="module")
def alone(cells: list[Cell], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The records of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(cells, folder)
    return numbers(folder)


def numbers(folder: Path) -> dict[str, str]:
    """Return every record as text, less what a clock said."""
    rows = {record.cell_id: record.to_dict() for record in RecordStore(folder)}
    return {cell_id: json.dumps(row | {"seconds": None}, sort_keys=True) for cell_id, row in rows.items()}


def hired(serving: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """Return what starts a thread in the place of a process: all but the process itself is real."""

    def start(desk: Any) -> Any:
        ours, theirs = multiprocessing.Pipe()

        def last() -> None:
            with suppress(SystemExit):
                serving(theirs, desk)
            theirs.close()

        thread = threading.Thread(target=last)
        thread.start()
        process = SimpleNamespace(
            join=lambda _timeout=None: thread.join(0.2), exitcode=-9, terminate=lambda: None, close=lambda: None,
            is_alive=lambda: False,
        )  # fmt: skip
        return audit.run.processes._Worker(process, ours)

    return start


@pytest.mark.slow
def test_two_processes_give_the_records_of_one_though_one_of_them_is_killed(cells, alone, tmp_path):
    killed: list[int | None] = []
    told: list[AuditRecord] = []

    def stage(_cell: Cell, stage: str) -> None:
        if stage == "attacking" and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    records = run_in_jobs(cells, tmp_path, RunOptions(), Watcher(stage, lambda record, _: told.append(record)), Jobs(2))
    assert len(killed) == 1
    assert [record.valid for record in records] == [True, True, False, False, True, True]
    assert sorted(record.cell_id for record in told) == sorted(record.cell_id for record in records)
    assert numbers(tmp_path) == alone
    assert not (tmp_path / ".locks").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_model_that_kills_its_process_fails_alone_and_is_not_tried_for_ever(cells, tmp_path):
    (tmp_path / "deadly.py").write_text("import os\n\ndef make(num_classes):\n    os._exit(9)\n")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    deadly = replace(cells[0], ref=f"file:{tmp_path / 'w.pt'}?arch={tmp_path / 'deadly.py'}:make&num_classes=10")
    todo = [deadly, replace(deadly, threat=cells[1].threat, after=deadly), *cells[-2:]]
    options = RunOptions(SourceSettings(trust_code=True, offline=True))
    records = run_in_jobs(todo, tmp_path / "run", options, Watcher(), Jobs(2, retries=0))
    assert [record.valid for record in records] == [False, False, True, True]
    said = "its worker died again and again, perhaps for want of memory (exit code 9)"
    assert [record.reason for record in records[:2]] == [said, said]
    assert len(list(RecordStore(tmp_path / "run"))) == 4


def test_a_cell_that_another_run_is_at_is_left_for_the_end(cells, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "_started", hired(serve))
    monkeypatch.setattr(os, "_exit", sys.exit)  # of a thread, where the run has no more ears for it
    told: list[tuple[str, bool]] = []
    with ExitStack() as elsewhere:
        first = Workbench(RunOptions(), Watcher(), tmp_path).cell_id(cells[0])
        elsewhere.enter_context(one_at_a_time(tmp_path, first, wait=False))

        def done(record: AuditRecord, known: bool) -> None:
            told.append((record.model, known))
            if len(told) == len(cells) - 2:
                elsewhere.close()

        run_in_jobs(cells, tmp_path, RunOptions(), Watcher(done=done), Jobs(1))
    assert [name for name, _ in told[-2:]] == ["digits-vgg-standard"] * 2
    assert numbers(tmp_path) == alone
    again: list[bool] = []
    run_in_jobs(cells, tmp_path, RunOptions(), Watcher(done=lambda _record, known: again.append(known)), Jobs(1))
    assert sorted(again) == [False, False, True, True, True, True]  # what failed is tried again, nothing else


def test_processes_that_end_at_once_are_one_sentence(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "_started", hired(lambda _line, _desk: None))
    with pytest.raises(EnvironmentFault, match=r"end at once \(SIGKILL\): use --jobs 1"):
        run_in_jobs(cells[:2], tmp_path, RunOptions(), Watcher(), Jobs(2))


def test_a_write_that_fails_in_a_process_ends_the_run(cells, tmp_path, monkeypatch):
    def full(line: Any, _desk: Any) -> None:
        line.send(Ready())
        line.recv()
        line.send(EnvironmentFault("cannot write x: No space left on device"))

    monkeypatch.setattr(audit.run.processes, "_started", hired(full))
    with pytest.raises(EnvironmentFault, match="No space left"):
        run_in_jobs(cells[:2], tmp_path, RunOptions(), Watcher(), Jobs(1))


@pytest.mark.parametrize("count", [0, -1])
def test_no_processes_at_all_is_an_error(count):
    with pytest.raises(UsageError, match=f"jobs {count} must be at least 1"):
        Jobs(count)

    @click.command()
    @executor_options
    def command(**_where: Any) -> None:
        pass

    said = CliRunner().invoke(command, ["--jobs", str(count)])
    assert said.exit_code == 2
    assert f"{count} is not in the range x>=1" in said.output


def test_jobs_are_not_for_ray(cells, tmp_path):
    with pytest.raises(UsageError, match="--jobs 2 is for --executor local; with ray it is --workers 2"):
        run_cells(cells, tmp_path, {**HERE, "executor": "ray", "jobs": 2})


def test_as_many_processes_as_models_cores_and_memory_allow_where_the_run_is_long(cells, tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr("audit.run.processes.run_in_jobs", lambda *words: asked.append(words[-1].count))
    monkeypatch.setattr("audit.run.run_loop.run", lambda *_words: asked.append(1))
    monkeypatch.setattr(audit.run.processes, "cores", lambda: 2)
    long = [replace(cell, images=None) for cell in cells]
    largest = audit.commands.around_runs._model_bytes(cells[0], HERE)
    assert 0 < largest < 1e9
    assert audit.commands.around_runs._model_bytes(cells[2], HERE) == 0  # there is no such model

    def ask(todo: list[Cell], jobs: int | None = None, device: str = "cpu") -> int:
        run_cells(todo, tmp_path, {**HERE, "device": device, "jobs": jobs})
        return asked.pop()

    assert ask(cells) == 1  # 300 images in all
    assert ask(long) == 2
    assert ask(long[:2]) == 1  # one model
    assert ask(long, 8) == 3  # three models
    assert ask(cells, 2) == 2
    assert ask(long, device="meta") == 1  # no CPU
    monkeypatch.setattr(audit.run.processes, "free_bytes", lambda: 2e9)
    assert ask(long) == 1


def test_a_machine_has_cores_and_memory():
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 1e7 < free_bytes() < 1e14


def test_memory_is_told_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_words, **_named: "")
    assert 1e7 < free_bytes() < 1e14
