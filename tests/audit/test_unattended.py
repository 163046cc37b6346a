"""What may happen to a run that nobody watches: kills, company, full disks, signals."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import audit.records
from audit.records import RecordStore
from reports.cli import main

YAML = """
name: unattended
dataset: digits
models: [bundled:digits-vgg-standard, bundled:digits-baseline-h-robust]
layers: [logits, penultimate]
threats: [{eps: [0.1, 0.2]}]
estimators: [label-level]
attack: {steps: 2}
seeds: [0]
images: 50
"""
CELLS = 8
# One process that has imported everything forks one worker after the other, so that thirty kills take seconds.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from audit.benchmark import expand, run
from audit.config import read_config
from audit.workbench import Watcher

torch.set_num_threads(1)
config, folder, kills, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
cells = expand(read_config(config))
draw = random.Random(7)

def work():
    child = os.fork()
    if child:
        return child
    def done(record, known):
        if not known:
            with (folder.parent / "computed.txt").open("a") as file:
                file.write(record.cell_id + "\\n")
    try:
        run(cells, folder, watcher=Watcher(done=done))
    finally:
        os._exit(0)

killed = 0
while killed < kills:
    children = [work() for _ in range(workers)]
    time.sleep(draw.uniform(0.02, 0.5))
    for child in children:
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            killed += 1
    if len(list((folder / "cells").glob("*.json"))) == len(cells):  # it got through: begin again elsewhere
        folder = folder.with_name(folder.name + "-")
        folder.mkdir()
print(folder, flush=True)
children = [work() for _ in range(workers)]
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def numbers(folder: Path) -> dict[str, str]:
    """Return every record as text, less what a clock said."""
    rows = {record.cell_id: record.to_dict() for record in RecordStore(folder)}
    return {cell_id: json.dumps(row | {"seconds": None}, sort_keys=True) for cell_id, row in rows.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The benchmark's file, and a run of it that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "unattended.yaml").write_text(YAML)
    assert main(["run", str(folder / "unattended.yaml"), "--out", str(folder / "run")]) == 0
    assert len(numbers(folder / "run")) == CELLS
    return folder / "unattended.yaml", folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "workers"), [(30, 1), (12, 2)])
def test_after_any_number_of_kills_the_records_are_those_of_an_undisturbed_run(kills, workers, undisturbed, tmp_path):
    config, calm = undisturbed
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", KILLER, str(config), str(tmp_path / "run"), str(kills), str(workers)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
    folder = Path(done.stdout.strip())
    assert numbers(folder) == numbers(calm)
    # a finished cell is not computed again: at most the one that a kill caught between its record and this list is
    computed = (tmp_path / "computed.txt").read_text().split()
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(computed) <= CELLS * len(folders)


def test_two_processes_in_one_folder_share_the_cells(undisturbed, tmp_path):
    config, calm = undisturbed
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", KILLER, str(config), str(tmp_path / "run"), "0", "2"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert numbers(tmp_path / "run") == numbers(calm)
    assert sorted((tmp_path / "computed.txt").read_text().split()) == sorted(numbers(calm))


def test_a_write_that_fails_leaves_whole_files_and_exit_code_3(undisturbed, tmp_path, monkeypatch, capsys):
    config, calm = undisturbed
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", str(calm), str(folder)], check=True)
    (removed := next(iter((folder / "cells").iterdir()))).unlink()  # one cell is left to do, and all reports
    real, writes = os.fsync, 0

    def fails_at(number: int, fault: int):
        count = 0

        def fsync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(fault, os.strerror(fault))
            real(handle)

        return fsync

    while True:
        writes += 1
        before = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != ".locks"]
        fault = (errno.ENOSPC, errno.EROFS)[writes % 2]
        monkeypatch.setattr(audit.records.os, "fsync", fails_at(writes, fault))
        code = main(["run", str(config), "--out", str(folder)])
        monkeypatch.undo()
        if code == 0:
            break
        assert code == 3
        assert os.strerror(fault) in capsys.readouterr().err
        assert not [path for path in folder.rglob(".*") if path.is_file()]
        assert all(path.exists() for path in before)
        RecordStore(folder).path(removed.stem).unlink(missing_ok=True)
    assert writes > 8  # records, tables, figures and the report were each in the way once
    assert numbers(folder) == numbers(calm)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_soon_and_the_same_command_resumes(number, code, undisturbed, tmp_path):
    config, calm = undisturbed
    command = [sys.executable, "-m", "reports.cli", "run", str(config), "--out", str(tmp_path / "run")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=alone) as running:
        assert running.stderr is not None
        assert running.stderr.readline().startswith("[1/")
        running.send_signal(number)
        assert running.wait(timeout=10) == code
    kept = numbers(tmp_path / "run")
    assert 0 < len(kept) < CELLS
    assert main(["run", str(config), "--out", str(tmp_path / "run")]) == 0
    assert numbers(tmp_path / "run") == numbers(calm)
