"""Unattended runs survive kills, other runs in their folder, full disks and signals."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import audit.storage
import reports.figures.all_figures
import reports.page.pictures
from audit.calibration.calibrate import settings_key
from audit.config.yaml_source import read_config
from audit.records import RecordStore, write_calibration
from audit.run.cell import expand, search_groups
from audit.run.cell_runner import CellRunner
from audit.run.run_loop import Watcher, claim, run
from reports.cli import main

YAML = """
name: unattended
dataset: digits
models: [bundled:digits-vgg-standard, bundled:digits-baseline-h-robust]
threats: [{eps: [0.1, 0.2]}]
estimators: [{name: label-level, steps: 2}]
attack: {steps: 2}
seeds: [0]
images: 50
"""
CELLS = 4
LONG = YAML.replace("eps: [0.1, 0.2]", "eps: [0.1, 0.2, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]")


def numbers(folder: Path) -> dict[str, str]:
    """Return every record as text, without its time."""
    rows = {record.cell_id: record.to_dict() for record in RecordStore(folder)}
    return {
        cell_id: json.dumps(row | {"seconds": None, "timing": None}, sort_keys=True) for cell_id, row in rows.items()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmarks, and an undisturbed run of the short one."""
    folder = tmp_path_factory.mktemp("unattended")
    (folder / "short.yaml").write_text(YAML)
    (folder / "long.yaml").write_text(LONG)
    benchmark = read_config(folder / "short.yaml")
    claim(folder / "calm", benchmark, YAML)
    run(expand(benchmark), folder / "calm")
    assert [record.valid for record in RecordStore(folder / "calm")] == [True] * CELLS
    return folder


@pytest.fixture(scope="module")
def disturbed(place: Path) -> dict[str, Any]:
    """The results of the runs that `disturbed.py` disturbed."""
    program = Path(__file__).with_name("disturbed.py")
    command = [sys.executable, str(program), str(place / "short.yaml"), str(place / "long.yaml"), str(place / "other")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(program.parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("case", ["alone", "two"])
def test_after_kills_the_records_equal_an_undisturbed_run(case, place, disturbed):
    folder = Path(disturbed[case])
    assert numbers(folder) == numbers(place / "calm")
    # completed cells are not computed again, except one killed between its record and this list
    computed = (folder.parent / "computed.txt").read_text().split()
    folders = [path for path in folder.parent.iterdir() if path.is_dir()]
    assert len(computed) <= CELLS * len(folders)
    assert not (folder / "partial").exists()


@pytest.mark.slow
def test_two_processes_in_one_folder_share_the_cells(place, disturbed):
    folder, calm = Path(disturbed["company"]), numbers(place / "calm")
    assert numbers(folder) == calm
    assert sorted((folder.parent / "computed.txt").read_text().split()) == sorted(calm)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_and_the_same_command_resumes_it(number, code, place, disturbed):
    left, seconds = disturbed[number]
    assert left == code
    assert seconds < 10
    folder, calm = place / "other" / number, numbers(place / "calm")
    kept, every = numbers(folder), expand(read_config(place / "long.yaml"))
    cells = [every[number] for group in search_groups(every) for number in group]  # in the order of computation
    assert 0 < len(kept) < len(cells)
    assert {cell_id: kept[cell_id] for cell_id in kept if cell_id in calm}.items() <= calm.items()
    seen: list[bool] = []
    run(cells[: len(kept) + 1], folder, watcher=Watcher(done=lambda _, known: seen.append(known)))
    assert seen == [True] * len(kept) + [False]


def test_a_failed_write_leaves_complete_files_and_exit_code_3(place, tmp_path, monkeypatch, capsys):
    """Every write of a run in turn: stamp, record, tables, figures, report."""
    config, folder = place / "short.yaml", tmp_path / "run"
    shutil.copytree(place / "calm", folder)
    removed = next(RecordStore(folder).path(record.cell_id) for record in RecordStore(folder))
    known = {record.cell_id: record for record in RecordStore(folder)}
    removed.unlink()
    # numbers and figures do not matter here: the cell that is left is not computed but looked up
    monkeypatch.setattr(CellRunner, "compute", lambda runner, cell: known[runner.cell_id(cell)])
    for module in (reports.figures.all_figures, reports.page.pictures):
        monkeypatch.setattr(module, "figure_bytes", lambda _figure, suffix: suffix.encode())
    (settings,) = read_config(config).settings()
    write_calibration(folder, settings_key(settings.estimator), [])
    real, failed = os.fsync, set[str]()

    def failing_at(number: int, fault: int) -> Any:
        count = 0

        def fsync(handle: int) -> None:
            nonlocal count
            count += 1
            if count == number:
                failed.add(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".")[1])
            if count >= number:  # a full disk stays full
                raise OSError(fault, os.strerror(fault))
            real(handle)

        return fsync

    for writes in range(1, 40):
        before = [path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts]
        fault = (errno.ENOSPC, errno.EROFS)[writes % 2]
        monkeypatch.setattr(audit.storage.os, "fsync", failing_at(writes, fault))
        code = main(["run", str(config), "--out", str(folder)])
        if code == 0:
            break
        assert code == 3
        assert os.strerror(fault) in capsys.readouterr().err
        assert not [path for path in folder.rglob(".*") if path.is_file()]
        assert all(path.exists() for path in before)
        removed.unlink(missing_ok=True)
    assert {"benchmark", "run", removed.stem[:60], "leaderboard", "report"} <= failed
    assert {"figure1", "figure2"} <= {name.partition("-digits")[0] for name in failed}  # one of each for every setting
    assert numbers(folder) == numbers(place / "calm")
