from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS, LabelAttack, Stage, two_losses
from audit.adversary.pgd import PGD
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import Linf
from audit.errors import InvalidModelError, UnknownNameError, UsageError
from audit.proportion import wilson


@given(count=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_equals_scipy(count, share):
    successes = round(share * count)
    found = wilson(successes, count)
    wanted = binomtest(successes, count).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-6)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.images == count


def test_wilson_solves_its_defining_equation():
    # the ends are the p at which (value - p)^2 = z^2 p (1 - p) / n
    found = wilson(7, 30)
    for p in (found.low, found.high):
        assert abs(found.value - p) == pytest.approx(1.959964 * sqrt(p * (1 - p) / 30))


@pytest.mark.parametrize(("successes", "count"), [(0, 0), (-1, 4), (5, 4)])
def test_wilson_refuses_counts_that_are_no_proportion(successes, count):
    with pytest.raises(UsageError, match="not a proportion"):
        wilson(successes, count)


class PixelLogits(nn.Module):
    """The first two pixels of an image as logits."""

    def forward(self, images):
        return images.flatten(1)[:, :2]


IMAGES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.1, 0.9]]).view(4, 1, 1, 2)
LABELS = torch.zeros(4, dtype=torch.int64)


def test_known_accuracies():
    found = measure_accuracy(PixelLogits(), IMAGES, LABELS, Linf(0.15), TIERS["smoke"], 0)
    assert found.natural.value == 0.5  # a tie and a misclassified image do not count
    assert found.robust.tolist() == [True, False, False, False]
    assert found.adversarial.value == 0.25
    assert found.passes > 0


def test_a_margin_of_two_eps_ends_in_a_tie_and_counts_as_broken():
    assert measure_accuracy(PixelLogits(), IMAGES[:1], LABELS[:1], Linf(0.4), TIERS["smoke"], 0).adversarial.value == 0


def test_adversarial_equals_clean_accuracy_at_eps_zero():
    found = measure_accuracy(PixelLogits(), IMAGES, LABELS, Linf(0.0), TIERS["smoke"], 0)
    assert found.natural == found.adversarial == wilson(2, 4)
    assert found.robust.tolist() == [True, True, False, False]


def test_misclassified_clean_images_are_never_robust():
    class WrongOnCleanImages(nn.Module):
        """Wrong on clean images, correct elsewhere."""

        def forward(self, images):
            right = (images.flatten(1)[:, :1] != 0.5).float()
            return torch.cat([right + 0 * images.flatten(1)[:, :1], 1 - right], 1)

    images = torch.full((3, 1, 1, 2), 0.5)
    found = measure_accuracy(WrongOnCleanImages(), images, LABELS[:3], Linf(0.1), TIERS["smoke"], 0)
    assert (found.natural.value, found.adversarial.value, found.passes) == (0, 0, 0)


def test_results_depend_on_the_seed_only():
    images = 0.2 + 0.6 * torch.rand(40, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    labels = images.flatten(1).argmax(1)
    runs = []
    for batch_size in (1, 7, 64):
        attack = two_losses(PGD(9, 0.25, batch_size=batch_size), PGD(3, 0.25, False, batch_size=batch_size))
        torch.rand(3)
        runs.append(measure_accuracy(PixelLogits(), images, labels, Linf(0.1), attack, 5))
    assert len({tuple(run.robust.tolist()) for run in runs}) == 1
    assert len({run.passes for run in runs}) == 1
    wanted = (images.flatten(1).diff(dim=1).abs().flatten() > 0.2).float().mean()
    assert runs[0].adversarial.value == pytest.approx(float(wanted))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_outputs_that_are_not_finite_are_refused(bad):
    images = IMAGES.clone()
    images[1, 0, 0, 0] = bad
    with pytest.raises(InvalidModelError, match="not finite for 1 of 4 images"):
        logits_of(PixelLogits(), images, 2)
    with pytest.raises(InvalidModelError, match="not finite for 1 of 4 images"):
        measure_accuracy(PixelLogits(), images, LABELS, Linf(0.1), TIERS["smoke"], 0)


def test_a_network_with_nan_outputs_under_attack_is_refused():
    class NanUnderAttack(nn.Module):
        def forward(self, images):
            logits = images.flatten(1)
            return torch.where(logits[:, :1] < 0.7, logits * torch.nan, logits)

    with pytest.raises(InvalidModelError, match="not finite"):
        measure_accuracy(NanUnderAttack(), IMAGES[:1], LABELS[:1], Linf(0.3), TIERS["smoke"], 0)


def test_attacks_have_names():
    assert TIERS["smoke"].name == "ce-10+margin-10"
    assert TIERS["audit"].name == (
        "ce-1+ce-3+margin-10+targeted-8x3-near+margin-32-near+ce-32-near+targeted-32x3-near+ce-32x3-near"
        "+targeted-32x2x3-near+margin-32x3-near+noise-100+square-300"
    )
    assert len(set(TIERS["audit"].names_in("linf"))) == 12
    assert two_losses(PGD(5, restarts=2), PGD(40)).name == "ce-5x2+margin-40"


def test_illegal_attacks_are_refused_with_the_legal_values():
    with pytest.raises(UnknownNameError, match=r"margins.*margin"):
        Stage("margins", PGD())
    for loss, targets in (("targeted", 0), ("ce", 2)):
        with pytest.raises(UsageError, match="at least 1 for the targeted loss"):
            Stage(loss, PGD(), targets)
    with pytest.raises(UsageError, match="at least one"):
        LabelAttack(())
    with pytest.raises(UsageError, match="noise -1"):
        LabelAttack((Stage("ce", PGD()),), noise=-1)
