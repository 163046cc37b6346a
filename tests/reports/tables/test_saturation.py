"""No saturated row is ranked: not among the committed rows, and not on a board that is made to saturate."""

from math import isclose, log
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.flags import FlagCode
from audit.information.sandwich import Sandwich
from audit.run.network_audit import audit_network
from reports.page.cells import unranked_reason
from reports.tables.ranking import UNRANKED, leaderboard
from reports.tables.table import to_frame

COMMITTED = sorted((Path(__file__).parents[3] / "docs").rglob("*.csv"))
BOARDS = [path for path in COMMITTED if {"rank", "worst_nats", "ceiling_nats"} <= set(pd.read_csv(path, nrows=0))]
QUICK = {"steps": 2, "start_steps": 2, "quantisers": (2,), "widths": (4.0,), "annealing_steps": 3}


def at_its_ceiling(row):
    """Whether the worst case is within 0.1 of ln(images); at ln(classes) an estimate is not saturated."""
    of_classes = isclose(row["ceiling_nats"], log(row["num_classes"]), abs_tol=1e-6)
    return row["worst_nats"] > row["ceiling_nats"] - 0.1 and not of_classes


def test_there_are_committed_boards():
    assert len(BOARDS) >= 2
    assert sum(len(pd.read_csv(path)) for path in BOARDS) >= 80


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_committed_row_is_ranked_at_its_ceiling(path):
    ranked = pd.read_csv(path).query("rank != 'unranked'")
    assert not [row["model"] for _, row in ranked.iterrows() if at_its_ceiling(row)]


@pytest.mark.parametrize("worst", [5.65, 5.69, log(300)])
def test_a_row_at_its_ceiling_is_found(worst):
    assert at_its_ceiling({"worst_nats": worst, "ceiling_nats": log(300), "num_classes": 10})
    assert not at_its_ceiling({"worst_nats": 2.29, "ceiling_nats": log(10), "num_classes": 10})


def board(noise, dimensions):
    """Return the leaderboard of three random networks, their first layers of `dimensions` features."""
    images, records = torch.rand(80, 1, 6, 6, generator=torch.Generator().manual_seed(0)), []
    for seed in range(3):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Flatten(), nn.Linear(36, dimensions), nn.Tanh(), nn.Linear(dimensions, 3))
        settings = AuditSettings(Sandwich(noise=noise, **QUICK), two_losses(PGD(2, 0.5)), seeds=(0,))
        labels = network(images).argmax(1)
        records.append(audit_network(network.requires_grad_(False), images, labels, "2", Linf(0.001), settings))
    return leaderboard(to_frame(records))


@pytest.mark.parametrize("dimensions", [20, 400])
def test_a_board_made_to_saturate_has_no_ranks(dimensions):
    table = board(0.05, dimensions)
    assert (table["worst_nats"] > log(80) - 0.1).all()
    assert (table["rank"] == UNRANKED).all()
    for _, row in table.iterrows():
        told = unranked_reason(row)
        assert told.count(f"{FlagCode.SATURATED}: ") >= 2
        assert "worst_nats 4.38 is within 0.1 of its ceiling ln(images) = 4.38: it would take over a billion" in told
        assert "the plug-in pair is " in told
        assert pd.isna(row["adversarial_accuracy_bound"])


@pytest.mark.parametrize("dimensions", [20, 400])
def test_the_same_board_is_ranked_by_the_noise_that_fits(dimensions):
    table = board(None, dimensions)
    assert sorted(table["rank"]) == ["1", "2", "3"]
    assert (table["normal_nats"] - 1.5).abs().max() < 0.15
