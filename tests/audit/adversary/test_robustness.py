"""The whole evaluation: per-image results, ladders, comparisons, transfer, single attacks."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import AUDIT, TIERS, LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.robustness import ATTACKS, Target, _found_halfway, alone, attacked, climb, compared, transferred
from audit.adversary.threat import L1, L2, Linf
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator

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


class Hollow(nn.Module):
    """The margin falls the wrong way to a floor that holds, and beyond a hill on the other side to under zero."""

    def forward(self, images):
        place = (images.flatten(1)[:, 0] - 0.5) * 10
        margins = 1 + 0.3 * place - place.clamp_min(0.5) + 0.5
        return torch.stack([margins, torch.zeros_like(margins)], 1)


def test_what_lies_behind_a_hill_is_excused_and_what_a_mask_hides_is_not():
    images = torch.full((6, 1, 4, 4), 0.5)
    labels, broken, everyone = torch.zeros(6, dtype=torch.long), images.clone(), torch.arange(6)
    broken[:, 0, 0, 0] = 0.8
    honest = Target(Hollow().eval(), images, labels)
    assert (honest.network(broken).argmax(1) == 1).all()
    stuck = measure_accuracy(honest.network, images, labels, L2(0.31), LabelAttack((Stage("margin", PGD(40, 0.1)),)), 0)
    assert stuck.robust.any()  # else nothing needs an excuse
    assert torch.equal(_found_halfway(honest, broken, L2(0.31), everyone, 0), everyone)
    masked = Target(Rounded(honest.network).eval(), images, labels)
    assert len(_found_halfway(masked, broken, L2(0.31), everyone, 0)) == 0


@pytest.mark.parametrize(("threat", "name"), [(L2(0.4), "l2"), (L1(1.6), "l1")])
def test_a_mask_is_not_excused_in_other_norms_either(threat, name):
    subject = target(count=12)
    masked = Target(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = attacked(masked, threat, LabelAttack((Stage("margin", PGD(10)),), queries=300), 0)
    (asked,) = [check for check in found.checks if check.number == 15]
    assert asked.passed is False, name
    assert asked.figure > 0.1


class Drawing(Plane):
    """A plane whose every pass is shifted by as much at random as images lie from it, or more."""

    def forward(self, images):
        return super().forward(images) + torch.randn(len(images), 2)


def test_every_measurement_of_a_network_that_draws_is_keyed_and_leaves_the_global_generator_alone():
    plain = target(count=4)
    subject = Target(Drawing().eval(), plain.images, plain.labels)
    quick = LabelAttack((Stage("margin", PGD(4)),), noise=2)

    def everything():
        return (
            compared(subject, Linf(0.05), quick, 0),
            climb(subject, Linf(0.05), 0, (0.5, 1.0)),
            transferred({"a": subject}, Linf(0.05), 0)["a"]["a"],
            alone("fgsm", subject, Linf(0.05), 0).robust,
            alone("ddn", subject, L2(0.1), 0).robust,
        )

    before = torch.random.get_rng_state()
    first = everything()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again = everything()
    assert first[0] == again[0]
    assert torch.equal(first[1].smallest, again[1].smallest)
    for one, other in zip(first[2:], again[2:], strict=True):
        assert torch.equal(one, other)


def test_the_ladder_of_a_network_that_draws_goes_by_the_majority_of_its_draws():
    plain = target(count=30)
    far = Target(plain.network, plain.images[reach(plain) > 0.02], plain.labels[reach(plain) > 0.02])

    class Faint(Plane):
        def forward(self, images):
            return super().forward(images) + 0.4 * torch.randn(len(images), 2)

    network = Faint().eval()
    found = climb(Target(network, far.images, far.labels), Linf(0.004), 0, (1.0,))
    singles = torch.stack([network(far.images).argmax(1) == far.labels for _ in range(40)])
    assert not singles.all()  # single draws would call some images broken
    assert found.rungs[0].accuracy.value == climb(far, Linf(0.004), 0, (1.0,)).rungs[0].accuracy.value == 1


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
