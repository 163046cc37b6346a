"""Checkpoints: resumed runs equal uninterrupted ones, and foreign or damaged files are refused."""

import pytest
import torch
from torch import nn

from audit.errors import IntegrityError, UsageError
from audit.random_keys import keyed_generator
from audit.training.checkpoints import Checkpoint


class Run:
    """Three steps of Adam on noise, with state beside the weights."""

    def __init__(self, path, rate=1e-2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.network = nn.Linear(4, 2)
        self.optimiser = torch.optim.Adam(self.network.parameters(), rate)
        self.generator = keyed_generator(5, 1)
        self.remembered = torch.zeros(4)
        parts = {"network": self.network, "optimiser": self.optimiser}
        state = {"remembered": self.remembered}
        self.checkpoint = Checkpoint(path, {"rate": rate}, parts, {"order": self.generator}, state)

    def train(self, until):
        for step in range(self.checkpoint.restore(), until):
            noise = torch.randn(4, generator=self.generator)
            self.remembered += noise
            self.optimiser.zero_grad()
            self.network(self.remembered).square().sum().backward()
            self.optimiser.step()
            self.checkpoint.save(step + 1)
        return self.network.weight.detach().clone()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    uninterrupted = Run(None).train(6)
    Run(tmp_path / "run.pt").train(2)
    assert torch.equal(Run(tmp_path / "run.pt").train(6), uninterrupted)


def test_a_run_without_a_file_starts_at_zero_and_clear_deletes_it(tmp_path):
    run = Run(tmp_path / "run.pt")
    assert run.checkpoint.restore() == 0
    run.train(1)
    run.checkpoint.clear()
    assert run.checkpoint.restore() == 0


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    Run(tmp_path / "run.pt").train(1)
    with pytest.raises(UsageError, match="another run"):
        Run(tmp_path / "run.pt", rate=1e-3).train(2)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    Run(tmp_path / "run.pt").train(1)
    content = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(IntegrityError, match="not a complete checkpoint"):
        Run(tmp_path / "run.pt").train(2)
