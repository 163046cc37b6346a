"""The whole evaluation: per-image results, ladders, comparisons, transfer, single attacks."""

import pytest
import torch
from torch import nn

from audit.accuracy import measure_accuracy
from audit.attacks import AUDIT, TIERS, LabelAttack, Stage
from audit.errors import UnknownNameError, UsageError
from audit.pgd import PGD
from audit.robustness import ATTACKS, Target, alone, attacked, climb, compared, transferred
from audit.threat import L2, Linf
from audit.types import keyed_generator

QUICK = LabelAttack(AUDIT.stages, noise=5)


class Plane(nn.Module):
    """Classes split by planes, 1.5 pixels of mean apart: the distance to the boundary is known."""

    def __init__(self, classes=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=keyed_generator(1)))

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weight.T


def target(classes=2, count=30):
    network = Plane(classes).eval()
    images = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=keyed_generator(2))
    return Target(network, images, network(images).argmax(1))


def reach(subject):
    """The smallest linf radius at which each image of two classes is lost."""
    difference = (subject.network.weight[0] - subject.network.weight[1]).detach()
    logits = subject.network(subject.images).detach()
    return (logits[:, 0] - logits[:, 1]).abs() / difference.abs().sum()


def test_every_image_has_its_own_result():
    subject = target()
    subject.labels[:4] = 1 - subject.labels[:4]
    found = measure_accuracy(subject.network, subject.images, subject.labels, Linf(0.05), QUICK, 0)
    siege = found.siege
    assert not siege.correct[:4].any()
    wanted = (reach(subject) > 0.05) & siege.correct
    assert torch.equal(siege.robust, wanted)
    lost = siege.correct & ~siege.robust
    assert (siege.stage[lost] >= 0).all()
    assert (siege.step[lost] >= 0).all()
    assert (siege.stage[~lost] == -1).all()
    assert (siege.margin[lost] <= 0).all()
    assert (siege.margin[siege.robust] > 0).all()
    assert Linf(0.05).distance(siege.images, subject.images).max() <= 0.05 + 1e-6
    assert found.names[:2] == ("ce-10", "margin-10")


def test_the_ladder_knows_the_radius_that_breaks_each_image():
    subject = target()
    ladder = climb(subject, Linf(0.08), 0)
    radii = [rung.eps for rung in ladder.rungs]
    assert radii == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32])
    wanted = [
        min((eps for eps in radii if eps >= distance), default=float("inf")) for distance in reach(subject).tolist()
    ]
    assert ladder.smallest.tolist() == pytest.approx(wanted)
    shares = [rung.accuracy.value for rung in ladder.rungs]
    assert shares == sorted(shares, reverse=True)
    assert all(check.passed is not False for check in ladder.checks)


def test_radii_beyond_a_grey_image_are_cut_and_there_nobody_stands():
    ladder = climb(target(), Linf(0.3), 0)
    assert ladder.rungs[-1].eps == 0.5
    assert ladder.rungs[-1].accuracy.value == 0
    assert [check.passed for check in ladder.checks] == [True, True]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 30])
def test_an_honest_network_passes_every_check(classes, count):
    subject = target(classes, count)
    found = attacked(subject, Linf(0.05), QUICK, 0)
    assert found.trustworthy
    checks = (*found.checks, *compared(subject, Linf(0.05), QUICK, 0))
    assert not [check for check in checks if check.passed is False]
    assert {check.number for check in checks} >= {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14}


def test_where_nothing_is_right_nothing_is_compared_and_nothing_fails():
    subject = target()
    wrong = Target(subject.network, subject.images, 1 - subject.labels)
    found = attacked(wrong, Linf(0.05), AUDIT, 0)
    assert found.accuracy.adversarial.value == 0
    assert found.trustworthy
    assert compared(wrong, Linf(0.05), AUDIT, 0) == ()


class Rounded(nn.Module):
    """Answers that do not move with the pixels until they jump: no gradient, and no robustness either."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images + ((images * 20).round() / 20 - images).detach() - (images - images.detach()))


def test_a_masked_network_is_not_trusted():
    subject = target()
    masked = Target(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = attacked(masked, Linf(0.05), TIERS["smoke"], 0)
    assert not found.trustworthy
    assert {check.number for check in found.checks if check.passed is False} & {2, 5}


def test_square_breaks_what_gradients_do_not_and_says_so():
    subject = target(count=12)
    masked = Target(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = attacked(masked, Linf(0.1), LabelAttack((Stage("ce", PGD(2)),), queries=300), 0)
    (square,) = [check for check in found.checks if check.number == 15]
    assert square.passed is False
    assert found.accuracy.adversarial.value < 1


def test_images_transfer_between_networks_that_are_alike_and_not_to_one_that_is_not():
    subject = target()
    alike = Target(Plane().eval(), subject.images, subject.labels)
    contrary = Plane().eval()
    contrary.weight.data = contrary.weight.data.flip(0)
    matrix = transferred(
        {"a": subject, "b": alike, "c": Target(contrary, subject.images, 1 - subject.labels)}, Linf(0.1), 0
    )
    assert torch.equal(matrix["a"]["a"], matrix["a"]["b"])
    assert not matrix["a"]["a"].all()
    assert torch.equal(matrix["a"]["a"], reach(subject) > 0.1)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "margin", "square"])
def test_single_attacks_by_name(name):
    subject = target(count=12)
    found = alone(name, subject, Linf(0.1), 0)
    assert found.name == name
    assert 0 <= found.accuracy.value < 1
    assert (found.passes > 0) == (name != "square")
    assert not (found.robust & (reach(subject) <= 0.1 / 1.25)).any() or name == "square"
    assert found.robust[reach(subject) > 0.1].all()


@pytest.mark.parametrize("name", ["cw", "ddn"])
def test_attacks_of_smallest_norm_take_an_l2_ball(name):
    subject = target(count=12)
    assert alone(name, subject, L2(3.0), 0).accuracy.value == 0
    assert alone(name, subject, L2(1e-4), 0).accuracy.value == 1
    with pytest.raises(UsageError, match="--norm l2"):
        alone(name, subject, Linf(0.1), 0)


def test_an_unknown_attack_is_named_with_its_neighbour():
    with pytest.raises(UnknownNameError, match="did you mean 'fgsm'"):
        alone("fgms", target(), Linf(0.1), 0)
    assert "autoattack-standard" in ATTACKS
