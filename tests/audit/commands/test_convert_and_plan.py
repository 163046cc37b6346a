"""The commands `convert` and `plan`: tensors are unchanged and no code runs; forecasts are near the cost of a run."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from audit.commands.inspect.plan import duration
from audit.config.yaml_source import read_config
from audit.run.cell import expand
from audit.run.loading import batch_bytes
from audit.run.run_loop import run
from audit.run.upkeep import forecast as planning
from audit.run.upkeep.forecast import LinearCost, Rates, Work, forecast, seconds_per_pass
from model_zoo.untrusted import file_sha256
from reports.cli import main


def test_a_checkpoint_becomes_safetensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied = torch.arange(6.0).view(2, 3)
    torch.save({"state_dict": {"a.weight": tied, "b.weight": tied.T, "n": torch.tensor(3)}}, tmp_path / "c.pth")
    out = tmp_path / "deep" / "c.safetensors"
    assert main(["convert", str(tmp_path / "c.pth"), str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["tensors"], told["sha256"]) == (3, file_sha256(out))
    assert told["from_sha256"] == file_sha256(tmp_path / "c.pth")
    back = safetensors.torch.load_file(out)
    assert torch.equal(back["a.weight"], tied)
    assert torch.equal(back["b.weight"], tied.T)
    assert main(["convert", str(tmp_path / "c.pth"), str(out)]) == 2
    assert "c.safetensors exists: choose another name" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("", 2.0), ("model", 1.0), ("model_ema", 2.0), ("model.teacher", 3.0)])
def test_the_entry_or_prefix_to_convert_can_be_chosen(tmp_path: Path, key: str, value: float) -> None:
    raw = {"w": torch.ones(2), "teacher.w": torch.full((2,), 3.0)}
    torch.save({"model": raw, "model_ema": {"w": torch.full((2,), 2.0)}}, tmp_path / "c.pth")
    out = tmp_path / "c.safetensors"
    assert main(["convert", str(tmp_path / "c.pth"), str(out), *(["--key", key] if key else [])]) == 0
    assert safetensors.torch.load_file(out)["w"].tolist() == [value, value]


class _Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [(None, "o.safetensors", 3), (b"", "o.safetensors", 3), ("canary", "o.safetensors", 4), (b"", "o.pth", 2)],
)
def test_files_that_are_not_converted(tmp_path: Path, content: bytes | str | None, name: str, code: int) -> None:
    canary, source = tmp_path / "canary", tmp_path / "c.pth"
    if content == "canary":
        source.write_bytes(pickle.dumps({"w": _Canary(str(canary))}))
    elif isinstance(content, bytes):
        source.write_bytes(content)
    assert main(["convert", str(source), str(tmp_path / name)]) == code
    assert not canary.exists()
    assert not (tmp_path / name).exists()


BENCHMARK = """\
name: small
dataset: digits
models: [bundled:digits-vgg-standard]
threats: {eps: 0.2}
estimators: [{name: sandwich, steps: 2, start_steps: 1, draws: 1, quantisers: [2], annealing_steps: 2}]
attack: {steps: 2}
seeds: [0]
images: 60
"""


def test_a_forecast_is_near_the_cost_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "SIZES", (50, 80))  # shortens the test
    config, folder = tmp_path / "b.yaml", tmp_path / "run"
    config.write_text(BENCHMARK)
    assert main(["plan", str(config), "--out", str(folder), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["cells"] == {"done": 0, "failed": 0, "to do": 1}
    started = time.monotonic()
    records = run(expand(read_config(config)), folder)
    seconds = time.monotonic() - started
    spent = sum(record.passes or 0 for record in records)
    assert spent / 2 < plan["passes"] < 2 * spent
    assert seconds / 10 < plan["seconds"] < 10 * seconds  # the machine may be busy
    disk = sum(path.stat().st_size for path in (folder / "cells").iterdir())
    assert disk / 3 < plan["disk"] < 3 * disk
    assert main(["plan", str(config), "--out", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 cells done, 0 cells failed, 0 cells to do"]


def test_a_forecast_adds_up() -> None:
    rates = Rates(LinearCost(0.0, 10.0), LinearCost(1.0, 0.0), LinearCost(5.0, 2.0), LinearCost(0.5, 0.0), 1000)
    work = Work(images=100, seeds=3, attacks=2, rates=(rates, rates))
    found = forecast(work, seconds=0.01, memory=7)
    passes = 2 * 1000 + 3 * 2 * 205
    assert found == (passes, pytest.approx(passes * 0.01 + 2 * 1.0 + 3 * 2 * 0.5), 7, 2000)
    assert forecast(work._replace(rates=()), 0.01, 7) == (0.0, 0.0, 7, 0)
    assert LinearCost(-5.0, 0.01).at(10) == 0.0


def test_memory_of_a_batch_is_weights_and_activations() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8, bias=False), nn.ReLU())
    images = torch.rand(3, 1, 2, 2)
    outputs = 4 * (4 + 8 + 8)
    assert batch_bytes(network, images, 5) == 4 * 32 + 5 * (2 * outputs + 4 * 16)
    assert not network[1]._forward_hooks
    assert 0 < seconds_per_pass(network, images) < 1


@pytest.mark.parametrize(("seconds", "said"), [(0.04, "0.0 s"), (90, "90.0 s"), (600, "10.0 min"), (9000, "2.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
