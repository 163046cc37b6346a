"""Several processes on one machine give the records of a single process, even if some die."""

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

import audit.run.processes
from audit.commands.execution import executor_of
from audit.commands.options import ExecutorOptions, SourceOptions, executor_options
from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.cell import Cell, expand
from audit.run.cell_runner import CellRunner
from audit.run.loading import RunOptions, model_bytes
from audit.run.locks import lock
from audit.run.processes import FittingProcesses, Processes, cores, fitting_processes, free_bytes
from audit.run.run_loop import InProcess, Watcher, run
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
HERE = SourceOptions(offline=True, device="cpu")


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
    """Return every record as text, without its time."""
    rows = {record.cell_id: record.to_dict() for record in RecordStore(folder)}
    return {
        cell_id: json.dumps(row | {"seconds": None, "timing": None}, sort_keys=True) for cell_id, row in rows.items()
    }


def hired(serving: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    """Return a function that starts a thread instead of a process."""

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
        return audit.run.processes._Process(process, ours)

    return start


@pytest.mark.slow
def test_two_processes_equal_one_although_one_is_killed(cells, alone, tmp_path):
    killed: list[int | None] = []
    told: list[AuditRecord] = []

    def stage(_cell: Cell, stage: str) -> None:
        if stage == "attacking" and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)

    records = run(cells, tmp_path, RunOptions(), Watcher(stage, lambda record, _: told.append(record)), Processes(2))
    assert len(killed) == 1
    assert [record.valid for record in records] == [True, True, False, False, True, True]
    assert sorted(record.cell_id for record in told) == sorted(record.cell_id for record in records)
    assert numbers(tmp_path) == alone
    assert not (tmp_path / ".locks").exists()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_model_that_kills_its_process_fails_alone_after_its_retries(cells, tmp_path):
    (tmp_path / "deadly.py").write_text("import os\n\ndef make(num_classes):\n    os._exit(9)\n")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    deadly = replace(cells[0], ref=f"file:{tmp_path / 'w.pt'}?arch={tmp_path / 'deadly.py'}:make&num_classes=10")
    todo = [deadly, replace(deadly, threat=cells[1].threat, after=deadly), *cells[-2:]]
    options = RunOptions(SourceSettings(trust_code=True, offline=True))
    records = run(todo, tmp_path / "run", options, Watcher(), Processes(2, retries=0))
    assert [record.valid for record in records] == [False, False, True, True]
    said = "its worker died repeatedly, perhaps out of memory (exit code 9)"
    assert [record.reason for record in records[:2]] == [said, said]
    assert len(list(RecordStore(tmp_path / "run"))) == 4


def test_cells_locked_by_another_run_are_computed_last(cells, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "_started", hired(serve))
    monkeypatch.setattr(os, "_exit", sys.exit)  # ends only the thread that stands for a process
    told: list[tuple[str, bool]] = []
    with ExitStack() as elsewhere:
        first = CellRunner(RunOptions(), tmp_path).cell_id(cells[0])
        elsewhere.enter_context(lock(tmp_path, first, wait=False))

        def done(record: AuditRecord, known: bool) -> None:
            told.append((record.model, known))
            if len(told) == len(cells) - 2:
                elsewhere.close()

        run(cells, tmp_path, RunOptions(), Watcher(done=done), Processes(1))
    assert [name for name, _ in told[-2:]] == ["digits-vgg-standard"] * 2
    assert numbers(tmp_path) == alone
    again: list[bool] = []
    run(cells, tmp_path, RunOptions(), Watcher(done=lambda _record, known: again.append(known)), Processes(1))
    assert sorted(again) == [False, False, True, True, True, True]  # only failures are tried again


def test_processes_that_cannot_start_are_one_error(cells, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "_started", hired(lambda _line, _desk: None))
    with pytest.raises(EnvironmentFault, match=r"end as soon as they start \(SIGKILL\): use --jobs 1"):
        run(cells[:2], tmp_path, RunOptions(), Watcher(), Processes(2))


def test_a_failed_write_in_a_worker_ends_the_run(cells, tmp_path, monkeypatch):
    def full(line: Any, _desk: Any) -> None:
        line.send(Ready())
        line.recv()
        line.send(EnvironmentFault("cannot write x: No space left on device"))

    monkeypatch.setattr(audit.run.processes, "_started", hired(full))
    with pytest.raises(EnvironmentFault, match="No space left"):
        run(cells[:2], tmp_path, RunOptions(), Watcher(), Processes(1))


@pytest.mark.parametrize("count", [0, -1])
def test_the_number_of_processes_must_be_positive(count):
    with pytest.raises(UsageError, match=f"jobs {count} must be at least 1"):
        Processes(count)

    @click.command()
    @executor_options
    def command(**_where: Any) -> None:
        pass

    said = CliRunner().invoke(command, ["--jobs", str(count)])
    assert said.exit_code == 2
    assert f"{count} is not in the range x>=1" in said.output


def test_jobs_cannot_be_combined_with_ray():
    with pytest.raises(UsageError, match="--jobs 2 is for --executor local; with ray it is --workers 2"):
        executor_of(ExecutorOptions("ray", jobs=2), RunOptions())


def test_the_default_number_of_processes(cells, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "cores", lambda: 2)
    long = [replace(cell, images=None) for cell in cells]
    assert 0 < model_bytes(cells[0].ref, "digits", RunOptions()) < 1e9
    assert model_bytes(cells[2].ref, "digits", RunOptions()) == 0  # does not exist

    def ask(todo: list[Cell], device: str = "cpu") -> int:
        return fitting_processes(todo, RunOptions(device=device))

    assert ask(cells) == 1  # 300 images in total
    assert ask(long) == 2
    assert ask(long[:2]) == 1  # one model
    assert ask(long, "meta") == 1  # not a CPU
    monkeypatch.setattr(audit.run.processes, "free_bytes", lambda: 2e9)
    assert ask(long) == 1


def test_executors_by_the_number_of_jobs():
    for jobs in (None, 1, 3):
        assert executor_of(ExecutorOptions(jobs=jobs), RunOptions()) == FittingProcesses(RunOptions(), jobs)


@pytest.mark.parametrize(("jobs", "models", "used"), [(8, 3, 3), (2, 3, 2), (2, 1, 1), (1, 3, 1), (None, 3, 2)])
def test_there_are_at_most_as_many_processes_as_models(jobs, models, used, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.run.processes, "fitting_processes", lambda *_: 2)
    asked: list[int] = []

    def counting(self: Any, _work: Any) -> Any:
        asked.append(getattr(self, "count", 1))
        yield from ()

    monkeypatch.setattr(Processes, "execute", counting)
    monkeypatch.setattr(InProcess, "execute", counting)
    with pytest.raises(KeyError):  # no record was computed
        run(cells[: 2 * models], tmp_path, RunOptions(), executor=FittingProcesses(RunOptions(), jobs))
    assert asked == [used]


def test_a_finished_run_builds_no_model_to_divide_its_memory(cells, tmp_path, monkeypatch):
    records = run(cells[:2], tmp_path, RunOptions())
    assert all(record.valid for record in records)

    def stop(*_: Any) -> int:
        raise AssertionError

    monkeypatch.setattr(audit.run.processes, "fitting_processes", stop)
    assert run(cells[:2], tmp_path, RunOptions(), executor=FittingProcesses(RunOptions())) == records


def test_cores_and_free_memory():
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 1e7 < free_bytes() < 1e14


def test_free_memory_without_proc(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_words, **_named: "")
    assert 1e7 < free_bytes() < 1e14
