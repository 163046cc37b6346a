"""The attack that gives up images out of reach: falling steps, reach, and what it must not give up."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import AUDIT, NearStage, margin_objective
from audit.adversary.pgd import PGD, FallingPGD, minimise
from audit.adversary.staged.reach import Reach
from audit.adversary.threat import Linf, threat_model
from audit.errors import UsageError
from audit.random_keys import keyed_generator


def test_steps_fall_by_one_ratio_in_every_run():
    pgd = FallingPGD(5, 2.0, last_step=0.125)
    lengths = [pgd.step_length(step, 0.5) for step in range(5)]
    assert lengths == pytest.approx([1.0, 0.5, 0.25, 0.125, 0.0625])
    again = [pgd.step_length(step, 0.5) for step in range(6, 11)]  # number 5 is the last evaluation of the first run
    assert again == pytest.approx(lengths)
    assert FallingPGD(1, 2.0).step_length(0, 0.5) == 1.0
    assert PGD(5, 0.3).step_length(4, 0.5) == pytest.approx(0.15)


@pytest.mark.parametrize("last", [0.0, -1.0, 0.6])
def test_a_last_step_that_does_not_fall_is_refused(last):
    with pytest.raises(UsageError, match=f"last_step {last} is outside"):
        FallingPGD(5, 0.5, last_step=last)


def test_falling_steps_reach_what_equal_ones_step_over():
    """The margin |x - 0.6| - 0.001 is negative in a slot much narrower than an equal step."""

    class Slot(nn.Module):
        def forward(self, images):
            distance = (images.flatten(1)[:, 0] - 0.6).abs()
            return torch.stack([distance, torch.full_like(distance, 0.001)], 1)

    network, labels = Slot().eval(), torch.zeros(40, dtype=torch.long)
    images = torch.linspace(0.52, 0.57, 40).view(40, 1, 1, 1)
    broken = []
    for pgd in (PGD(32, 0.25, random_start=False), FallingPGD(32, 1.0, random_start=False, last_step=0.01)):
        objective = margin_objective(network, labels)
        broken.append(int(minimise(objective, images, Linf(0.1), pgd, keyed_generator(1)).done.sum()))
    assert broken[0] < 20
    assert broken[1] == 40


def test_reach_is_the_margin_left_by_the_margin_lost():
    clean = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    reach, margins = Reach(clean), torch.tensor([0.5, 0.2, 0.9, 1.0, 0.5])
    assert reach.within(margins, 0.1).all()  # nothing is known of random vertices
    reach.compare(torch.arange(5), torch.tensor([0.99, 0.99, 0.99, 0.99, 0.8]))
    # 0.5 / 0.5, 0.2 / 0.8 and 0.9 / 0.1; no gradient led the fourth, and random vertices took 0.2 of the last's 0.5
    assert reach.within(margins, 0.3).tolist() == [False, True, False, True, True]
    assert reach.within(margins, 1.0).tolist() == [True, True, False, True, True]


class Linear(nn.Module):
    """Logits (w x, 0) of flat images: exactly robust where w x exceeds eps times the l1 length of w."""

    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(torch.randn(size, generator=generator))
        self.eval()

    def forward(self, images):
        value = images.flatten(1) @ self.weight
        return torch.stack([value, torch.zeros_like(value)], 1)


def linear_case(count=60, size=400, eps=0.02):
    """Return network, images inside the pixel range, labels, and the exact verdicts."""
    network = Linear(size)
    images = 0.5 + 0.05 * torch.randn(count, 1, 20, 20, generator=torch.Generator().manual_seed(5))
    values = network(images)[:, 0].detach()
    wanted = torch.linspace(0.2, 3.0, count) * eps * float(network.weight.detach().abs().sum())
    images += (wanted - values).view(-1, 1, 1, 1) * (network.weight / network.weight.square().sum()).detach().view(
        1, 1, 20, 20
    )
    assert (images > eps).all()
    assert (images < 1 - eps).all()
    labels = torch.zeros(count, dtype=torch.long)
    return network, images, labels, wanted > eps * float(network.weight.detach().abs().sum())


def test_far_images_cost_little_and_verdicts_are_exact():
    network, images, labels, robust = linear_case()
    found = measure_accuracy(network, images, labels, Linf(0.02), AUDIT, 0)
    assert torch.equal(found.robust, robust)
    far = int(robust.sum())
    # 14 passes of the opening; the long stages are only for the few images within 0.4
    assert found.passes < 40 * far
    assert found.forwards < 200 * far  # noise and queries in full would take over 400


def test_images_that_no_gradient_leads_are_never_given_up():
    """With a zero gradient every stage, all noise and all queries run on every survivor."""

    class NoGradient(Linear):
        def forward(self, images):
            return super().forward(images).detach() + 0 * images.flatten(1).sum(1, keepdim=True)

    _, images, labels, robust = linear_case(count=12)
    network = NoGradient(400)
    found = measure_accuracy(network, images, labels, Linf(0.02), AUDIT, 0)
    far = int(robust.sum())
    stages = [stage for stage in AUDIT.stages_in("linf") if isinstance(stage, NearStage)]
    whole = sum(stage.pgd.steps * stage.pgd.restarts for stage in stages)  # two classes: one target each
    assert found.passes >= whole * far
    assert found.forwards >= (AUDIT.noise + AUDIT.queries) * far


def test_other_norms_and_attacks_run_as_before():
    assert AUDIT.stages_in("l2") == AUDIT.stages_in("l1") == AUDIT.stages
    assert not AUDIT.reaches_in("l2")
    network, images, labels, _ = linear_case(count=8)
    found = measure_accuracy(network, images, labels, threat_model("l2", 1e-6), AUDIT, 0)
    assert found.forwards >= (AUDIT.noise + AUDIT.queries) * 8
