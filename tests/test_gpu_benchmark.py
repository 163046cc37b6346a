"""The benchmark for GPUs, on the emulated device: it measures there what it measures on the CPU."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.config.settings import AuditSettings
from audit.information.sandwich import Sandwich
from audit.random_keys import keyed_generator

ROOT = Path(__file__).parents[1]
SETTINGS = AuditSettings(Sandwich(steps=2, start_steps=2, quantisers=(2,)), two_losses(PGD(2, 0.5)), seeds=(0,))
FACTORY = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, num_classes))
"""


def loaded(path: Path) -> ModuleType:
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A network and photographs of unequal size: a colour for a class, with noise."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(50):
        folder = tmp_path / "photos" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (16 + number % 4, 18, 3), dtype=np.uint8)
        pixels[..., number % 3] = 255
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    draws = keyed_generator(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=draws) * 0.3)
    torch.save(network.state_dict(), tmp_path / "net.pth")
    (tmp_path / "nets.py").write_text(FACTORY)
    ref = f"file:{tmp_path / 'net.pth'}?arch={tmp_path / 'nets.py'}:net&num_classes=3&resize=14&crop=12"
    return [ref, "--dataset", f"folder:{tmp_path / 'photos'}", "--images", "50", "--eps", "8/255", "--largest", "3",
            "--rounds", "1", "--device"]  # fmt: skip


def test_the_benchmark_for_gpus_prints_on_a_second_device_what_it_prints_on_the_cpu(arguments, capsys) -> None:
    benchmark, foreign = (
        loaded(ROOT / "benchmarks" / "gpu_photographs.py"),
        loaded(ROOT / "tests" / "foreign_device.py"),
    )
    benchmark.main([*arguments, "cpu"], SETTINGS)
    here = capsys.readouterr().out
    with foreign.foreign_device():
        benchmark.main([*arguments, "meta"], SETTINGS)
    there = capsys.readouterr().out
    assert [line.partition(":")[0] for line in there.splitlines()[:3]] == [f"bare, batches of {n:5}" for n in (1, 2, 3)]
    found = [re.search(r"natural .*|[\d,]+ passes claimed, [\d,]+ counted", text)[0] for text in (here, there)]
    assert found[0] == found[1]
    claimed, counted = re.search(r"([\d,]+) passes claimed, ([\d,]+) counted", there).groups()
    assert 0 < int(claimed.replace(",", "")) < int(counted.replace(",", ""))
    assert re.search(r"audit: [\d.]+ passes a second, [\d.]+ of the best bare rate", there)
