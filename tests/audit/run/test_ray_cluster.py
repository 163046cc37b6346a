"""A cluster of two workers gives the records of a single process, even if workers are killed."""

import os
import signal
import time
from pathlib import Path

import pytest

import audit.run.ray_cluster
from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault
from audit.records import AuditRecord
from audit.run.cell import expand
from audit.run.loading import RunOptions
from audit.run.ray_cluster import RayCluster
from audit.run.run_loop import Watcher, run
from reports.tables.ranking import write_leaderboard

YAML = """
name: cluster
dataset: digits
models: [bundled:digits-vgg-standard, "bundled:no-such-model", bundled:digits-baseline-h-robust]
threats: [{eps: [0.1, 0.2]}]
estimators: [label-level]
attack: {steps: 2}
seeds: [0]
images: 50
"""
TWO = RayCluster(workers=2)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    path.write_text(YAML)
    return expand(read_config(path))


@pytest.fixture(scope="module")
def alone(cells, tmp_path_factory):
    """The leaderboard of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(cells, folder)
    return leaderboard(folder)


def leaderboard(folder: Path) -> str:
    write_leaderboard(folder)
    return (folder / "leaderboard.csv").read_text()


def workers() -> list[int]:
    """Return the ids of the processes that compute a cell now."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(b"ray::_compute"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of Ray
def test_a_cluster_equals_one_process_although_a_worker_is_killed(cells, alone, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rvaudit[ray]'")
    killed: list[int] = []
    told: list[AuditRecord] = []

    def done(record: AuditRecord, _known: bool) -> None:
        told.append(record)
        until = time.monotonic() + 10
        while not killed and time.monotonic() < until:
            for process in workers()[:1]:
                os.kill(process, signal.SIGKILL)
                killed.append(process)

    records = run(cells, tmp_path, RunOptions(), Watcher(done=done), TWO)
    assert len(killed) == 1
    assert [record.valid for record in records] == [True, True, False, False, True, True]
    assert len(told) == len(cells)
    assert leaderboard(tmp_path) == alone
    again: list[bool] = []
    run(cells, tmp_path, RunOptions(), Watcher(done=lambda _record, known: again.append(known)), TWO)
    assert sorted(again) == [False, False, True, True, True, True]  # only failures are tried again


def test_missing_ray_is_one_error(cells, tmp_path, monkeypatch):
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(audit.run.ray_cluster, "import_module", missing)
    with pytest.raises(EnvironmentFault, match=r"rvaudit\[ray\]"):
        run(cells[:1], tmp_path, executor=RayCluster())


@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_cluster_is_one_error(cells, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rvaudit[ray]'")
    with pytest.raises(EnvironmentFault, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        run(cells[:1], tmp_path, RunOptions(), Watcher(), RayCluster(address="127.0.0.1:1"))
