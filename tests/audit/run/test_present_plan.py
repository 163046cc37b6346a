"""The same command in the same folder after weights, images or code have changed: only present cells are ranked."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault, IntegrityError
from audit.records import AuditRecord, RecordStore, read_records
from audit.run.cell import expand
from audit.run.loading import RunOptions
from audit.run.run_loop import claim, run
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings
from reports.cli import main
from reports.publish import write_reports

FACTORY = """from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
YAML = """name: mine
dataset: npz:{folder}/images.npz
models: ['file:{folder}/net.pth?arch={folder}/nets.py:net&num_classes=10&name=net', bundled:digits-vgg-robust]
threats: {{eps: 0.05}}
estimators: [{{name: label-level, steps: 3}}]
attack: {{steps: 2}}
seeds: [0]
images: 60
"""


def write_weights(folder: Path, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    weights = {"1.weight": torch.randn(10, 64, generator=draws), "1.bias": torch.zeros(10)}
    torch.save(weights, folder / "net.pth")


def write_images(folder: Path, first: int) -> None:
    found = load_images("digits", ImageRequest(count=first + 60))
    images = found.images[first:].numpy()
    np.savez(folder / "images.npz", images=images, labels=found.labels[first:].numpy())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nets.py").write_text(FACTORY)
    write_weights(tmp_path, 0)
    write_images(tmp_path, 0)
    (tmp_path / "b.yaml").write_text(YAML.format(folder=tmp_path))
    computed(tmp_path)  # the reports of this first run are looked at by nothing
    return tmp_path


def computed(folder: Path) -> list[AuditRecord]:
    config = read_config(folder / "b.yaml")
    claim(folder / "run", config, (folder / "b.yaml").read_text())
    return run(expand(config), folder / "run", RunOptions(SourceSettings(trust_code=True)))


def compute(folder: Path) -> list[AuditRecord]:
    found = computed(folder)
    write_reports(folder / "run")
    return found


CHANGES = {
    "weights": (lambda folder: write_weights(folder, 1), 1),
    "images": (lambda folder: write_images(folder, 20), 2),
    "code": (lambda folder: (folder / "nets.py").write_text(FACTORY + "\n# another network\n"), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_the_present_cells_are_ranked_and_the_others_named(
    change: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {record.cell_id for record in RecordStore(folder / "run")}
    alter, stale = CHANGES[change]
    alter(folder)
    records = compute(folder)
    present, store = {record.cell_id for record in records}, RecordStore(folder / "run")
    old = before - present
    assert len(old) == stale
    assert {record.cell_id for record in store} == before | present
    assert {record.cell_id for record in read_records(folder / "run")} == present
    assert {record.cell_id for record in store.others()} == old
    for name in ("leaderboard.csv", "leaderboard.parquet"):
        path = folder / "run" / name
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        assert set(table["cell_id"]) == present
    capsys.readouterr()
    sentence = f"run also holds {stale} record{'s' if stale > 1 else ''} of earlier runs, which are not ranked: "
    rvs = [f"RV {record.rv:.3f}" for record in store.others()]
    assert main(["leaderboard", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    assert sentence in shown
    assert all(rv in shown.partition(sentence)[2] for rv in rvs)
    assert main(["leaderboard", str(folder / "run"), "--json"]) == 0
    captured = capsys.readouterr()
    assert {row["cell_id"] for row in json.loads(captured.out)} == present
    assert sentence in captured.err
    assert main(["status", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    assert "2 cells: 2 done, 0 failed, 0 to do" in shown
    assert sentence in shown
    assert main(["status", str(folder / "run"), "--json"]) == 0
    assert {row["cell_id"] for row in json.loads(capsys.readouterr().out)} == present
    assert sentence in (folder / "run" / "report.html").read_text()
    assert main(["verify", str(folder / "run")]) == 0


def test_after_a_change_that_breaks_the_model_the_old_result_is_no_result(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "net.pth").write_bytes(b"no weights")
    records = compute(folder)
    assert [record.valid for record in records] == [False, True]
    capsys.readouterr()
    assert main(["status", str(folder / "run")]) == 1
    assert "2 cells: 1 done, 1 failed, 0 to do" in capsys.readouterr().out
    table = pd.read_csv(folder / "run" / "leaderboard.csv")
    assert list(table[table["status"] == "valid"]["model"]) == ["digits-vgg-robust"]
    assert "run also holds 1 record of earlier runs" in (folder / "run" / "report.html").read_text()
    write_weights(folder, 0)  # the first weights again: their record counts again
    assert all(record.valid for record in compute(folder))
    assert not any(record.valid for record in RecordStore(folder / "run").others())
    assert "also holds" not in (folder / "run" / "report.html").read_text()


def test_a_run_that_is_ended_early_shows_no_results_of_the_run_before(folder: Path) -> None:
    write_images(folder, 20)
    config = read_config(folder / "b.yaml")

    class Ended:
        def execute(self, work):
            yield from ()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(expand(config), folder / "run", RunOptions(SourceSettings(trust_code=True)), executor=Ended())
    with pytest.raises(EnvironmentFault, match="run holds records of earlier runs only: none of its present plan"):
        read_records(folder / "run")
    assert len(RecordStore(folder / "run").others()) == 2


def test_in_a_folder_without_a_plan_all_records_count_and_twins_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(folder, 1)
    compute(folder)
    (folder / "run" / "plan.json").unlink()
    assert len(read_records(folder / "run")) == 3
    capsys.readouterr()
    assert main(["leaderboard", str(folder / "run")]) == 0
    shown = capsys.readouterr().out
    assert "run holds several records of one cell; run its benchmark again to rank the present ones: net, " in shown
    compute(folder)
    assert len(read_records(folder / "run")) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": "rvaudit.plan/2", "cells": []}', '{"schema": "rvaudit.plan/1"}']
)
def test_a_damaged_plan_is_an_error(text: str, folder: Path) -> None:
    (folder / "run" / "plan.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"plan\.json"):
        read_records(folder / "run")
