"""A benchmark file that names its files by relative paths, used from another folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from audit.config.yaml_source import read_config
from audit.records import RecordStore
from audit.run.cell import expand
from audit.run.loading import RunOptions
from audit.run.run_loop import claim, run
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings
from reports.cli import main

FACTORY = """from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
YAML = """name: mine
dataset: npz:data/images.npz
models: ['file:weights/net.pth?arch=nets.py:net&num_classes=10']
threats: {eps: 0.05}
estimators: [{name: label-level, steps: 3}]
attack: {steps: 2}
seeds: [0]
images: 60
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("data", "weights"):
        (folder / name).mkdir(parents=True)
    (folder / "nets.py").write_text(FACTORY)
    (folder / "b.yaml").write_text(YAML)
    draws = torch.Generator().manual_seed(0)
    weights = {"1.weight": torch.randn(10, 64, generator=draws), "1.bias": torch.zeros(10)}
    torch.save(weights, folder / "weights" / "net.pth")
    found = load_images("digits", ImageRequest(count=60))
    np.savez(folder / "data" / "images.npz", images=found.images.numpy(), labels=found.labels.numpy())
    return folder


def compute(config: Path, out: Path, base: Path | None) -> str:
    benchmark = read_config(config)
    claim(out, benchmark, config.read_text())
    (record,) = run(expand(benchmark), out, RunOptions(SourceSettings(trust_code=True, base=base)))
    assert record.valid, record.reason
    return record.cell_id


def test_the_folder_that_a_run_is_started_from_decides_no_id(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    ids = {compute(Path("b.yaml"), tmp_path / "inside", Path.cwd())}
    for place in ("elsewhere", "elsewhere/below"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        ids.add(compute(project / "b.yaml", tmp_path / place / "run", project))
    assert len(ids) == 1
    assert main(["status", "run"]) == 0
    assert "1 cells: 1 done" in capsys.readouterr().out
    (record,) = RecordStore(tmp_path / "elsewhere" / "run")
    assert record.dataset == "npz:data/images.npz"
    assert record.details["notes"]["recorded_ref"] == "file:weights/net.pth?arch=nets.py:net&num_classes=10"


@pytest.mark.parametrize("options", [[], ["--schema"]])
def test_validate_looks_beside_the_file(
    options: list[str],
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "project/b.yaml", "--trust-code", *options]) == 0
    capsys.readouterr()
    (project / "weights" / "net.pth").rename(project / "weights" / "nets.pth")
    assert main(["validate", "project/b.yaml", "--trust-code", "--json", *options]) == 3
    (fault,) = json.loads(capsys.readouterr().out)
    assert "weights/net.pth does not exist" in fault["message"]


def test_run_looks_beside_the_file_and_the_working_folder_first(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(_config, _text, _folder, sources, _executor):
        seen.append(sources.base)
        return []

    monkeypatch.setattr("audit.commands.execution.run_benchmark", stop)
    monkeypatch.setattr("audit.commands.execution.publish", lambda *_, **__: None)
    assert main(["run", "project/b.yaml", "--trust-code"]) == 0
    assert seen == [project]
