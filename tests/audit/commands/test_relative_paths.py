"""A benchmark file that names its files by relative paths, used from another folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from audit.config.yaml_source import read_config
from audit.records import RecordStore
from audit.run.cell import expand
from audit.run.loading import RunOptions
from audit.run.run_loop import claim, run
from audit.run.upkeep.start_folders import start_folders, stated_folders
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
    claim(out, benchmark, config.read_text(), base)
    (record,) = run(expand(benchmark, base), out, RunOptions(SourceSettings(trust_code=True, base=base)))
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


def _beside_the_file(project: Path) -> tuple[Path, Path]:
    """Return a benchmark file whose paths lie beside it, and another folder from which it is run."""
    elsewhere = project.parent / "elsewhere"
    elsewhere.mkdir()
    return project / "b.yaml", elsewhere


def _in_the_working_folder(project: Path) -> tuple[Path, Path]:
    """The file lies in a folder of its own beside the images; the other paths are those of the working folder."""
    (project / "configs").mkdir()
    (project / "data").rename(project / "configs" / "data")
    (project / "b.yaml").rename(project / "configs" / "b.yaml")
    return project / "configs" / "b.yaml", project


def _folder_and_pattern(project: Path) -> tuple[Path, Path]:
    """Images are PNG files in folders of classes, and the model is named by a pattern."""
    draws = np.random.default_rng(0)
    for number in range(60):
        folder = project / "photos" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    text = YAML.replace("npz:data/images.npz", "folder:photos").replace("weights/net.pth", "weights/*.pth")
    (project / "nets.py").write_text(FACTORY.replace("nn.Linear(64", "nn.Linear(192"))
    torch.save({"1.weight": torch.randn(10, 192), "1.bias": torch.zeros(10)}, project / "weights" / "net.pth")
    (project / "b.yaml").write_text(text)
    return _beside_the_file(project)


LAYOUTS = [_beside_the_file, _in_the_working_folder, _folder_and_pattern]


@pytest.fixture(params=LAYOUTS)
def finished(request: pytest.FixtureRequest, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a finished run; the working folder is a third one, without any of its files."""
    config, working = request.param(project)
    monkeypatch.chdir(working)
    compute(config, project / "runs" / "mine", config.parent)
    (project.parent / "third").mkdir()
    monkeypatch.chdir(project.parent / "third")
    return project / "runs" / "mine"


def test_cells_are_recomputed_from_another_folder(
    finished: Path, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--replay", "1", "--trust-code", "--device", "cpu"]
    assert main(["verify", "../project/runs/mine", *command]) == 0
    assert "1 of them recomputed" in capsys.readouterr().out
    assert main(["status", "../project/runs/mine"]) == 0
    assert "1 cells: 1 done" in capsys.readouterr().out
    stored = finished / "folders.json"
    stored.rename(finished / "aside")
    assert main(["verify", "../project/runs/mine", *command]) == 3
    assert "does not exist; the run keeps no folder of its paths" in " ".join(capsys.readouterr().err.split())
    (finished / "aside").rename(stored)
    project.rename(project.parent / "moved")  # the files with the run
    assert main(["verify", "../moved/runs/mine", *command]) == 0
    assert "1 of them recomputed" in capsys.readouterr().out
    (found,) = (project.parent / "moved").rglob("net.pth")
    found.unlink()
    assert main(["verify", "../moved/runs/mine", *command]) == 3
    error = " ".join(capsys.readouterr().err.split())
    assert "cannot be recomputed: " in error
    assert "does not exist; the run was started with paths from " in error
    assert str(project) in error


def test_files_of_the_same_name_in_the_working_folder_are_not_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    compute(Path("b.yaml"), project / "run", project)
    other = project.parent / "other"
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("run"))
    torch.save({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, other / "weights" / "net.pth")
    monkeypatch.chdir(other)
    assert main(["verify", str(project / "run"), "--replay", "1", "--trust-code", "--device", "cpu"]) == 0
    assert "1 of them recomputed" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", '{"folders": 3}', '{"folders": [{"path": 1}]}', "[" * 100_000, None])
def test_folders_that_are_missing_or_damaged_are_none(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "folders.json").write_text(content)
    assert start_folders(tmp_path) == ()
    assert stated_folders(tmp_path) == []
