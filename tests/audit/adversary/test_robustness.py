"""Robustness evaluation: outcomes per image, accuracy against eps, comparisons, transfer, single attacks."""

import pytest
import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.check_rules import RULES
from audit.adversary.label_attack import AUDIT, TIERS, LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.robustness import (
    TargetModel,
    _broken_from_halfway,
    compare_attacks,
    evaluate_robustness,
    measure_eps_curve,
)
from audit.adversary.single_attacks import ATTACKS, run_attack, transfer_matrix
from audit.adversary.threat import L1, L2, Linf
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator

QUICK = LabelAttack(AUDIT.stages, noise=5)


class Plane(nn.Module):
    """A linear classifier, with a known distance from images to the boundary."""

    def __init__(self, classes=2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=keyed_generator(1)))

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weight.T


def target(classes=2, count=30):
    network = Plane(classes).eval()
    images = 0.3 + 0.4 * torch.rand(count, 1, 4, 4, generator=keyed_generator(2))
    return TargetModel(network, images, network(images).argmax(1))


def boundary_distance(subject):
    """The l-inf distance of each image to the boundary between two classes."""
    difference = (subject.network.weight[0] - subject.network.weight[1]).detach()
    logits = subject.network(subject.images).detach()
    return (logits[:, 0] - logits[:, 1]).abs() / difference.abs().sum()


def test_every_image_has_an_outcome():
    subject = target()
    subject.labels[:4] = 1 - subject.labels[:4]
    found = measure_accuracy(subject.network, subject.images, subject.labels, Linf(0.05), QUICK, 0)
    outcome = found.outcome
    assert not outcome.correct[:4].any()
    wanted = (boundary_distance(subject) > 0.05) & outcome.correct
    assert torch.equal(outcome.robust, wanted)
    broken = outcome.correct & ~outcome.robust
    assert (outcome.stage[broken] >= 0).all()
    assert (outcome.step[broken] >= 0).all()
    assert (outcome.stage[~broken] == -1).all()
    assert (outcome.margin[broken] <= 0).all()
    assert (outcome.margin[outcome.robust] > 0).all()
    assert Linf(0.05).distance(outcome.images, subject.images).max() <= 0.05 + 1e-6
    assert found.names[:2] == ("ce-10", "margin-10")


def test_the_eps_curve_has_the_radius_that_breaks_each_image():
    subject = target()
    curve = measure_eps_curve(subject, Linf(0.08), 0)
    radii = [point.eps for point in curve.points]
    assert radii == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32])
    wanted = [
        min((eps for eps in radii if eps >= distance), default=float("inf"))
        for distance in boundary_distance(subject).tolist()
    ]
    assert curve.smallest.tolist() == pytest.approx(wanted)
    shares = [point.accuracy.value for point in curve.points]
    assert shares == sorted(shares, reverse=True)
    assert all(check.passed is not False for check in curve.checks)


def test_radii_are_limited_to_the_grey_covering_one_where_no_image_is_robust():
    curve = measure_eps_curve(target(), Linf(0.3), 0)
    assert curve.points[-1].eps == 0.5
    assert curve.points[-1].accuracy.value == 0
    assert [check.passed for check in curve.checks] == [True, True]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 30])
def test_a_linear_network_passes_every_check(classes, count):
    subject = target(classes, count)
    found = evaluate_robustness(subject, Linf(0.05), QUICK, 0)
    assert found.trustworthy
    checks = (*found.checks, *compare_attacks(subject, Linf(0.05), QUICK, 0))
    assert not [check for check in checks if check.passed is False]
    skipped = {"gradient_free_attack", "transfer_attack", "eps_monotonicity", "unbounded_eps"}
    wanted = {rule.id for rule in RULES.values() if rule.level != "gate" and not rule.id.startswith("worst_case")}
    assert {check.id for check in checks} == wanted - skipped


def test_without_correct_images_no_attacks_are_compared_and_no_check_fails():
    subject = target()
    wrong = TargetModel(subject.network, subject.images, 1 - subject.labels)
    found = evaluate_robustness(wrong, Linf(0.05), AUDIT, 0)
    assert found.accuracy.adversarial.value == 0
    assert found.trustworthy
    assert compare_attacks(wrong, Linf(0.05), AUDIT, 0) == ()


class Rounded(nn.Module):
    """A piecewise constant network: zero gradient without robustness."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images + ((images * 20).round() / 20 - images).detach() - (images - images.detach()))


def test_a_masked_network_is_not_trusted():
    subject = target()
    masked = TargetModel(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = evaluate_robustness(masked, Linf(0.05), TIERS["smoke"], 0)
    assert not found.trustworthy
    failed = {check.id for check in found.checks if check.passed is False}
    assert {"zero_margin_gradient", "zero_cross_entropy_gradient", "unbounded_attack"} & failed


def test_square_breaks_masked_images_and_fails_the_check():
    subject = target(count=12)
    masked = TargetModel(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = evaluate_robustness(masked, Linf(0.1), LabelAttack((Stage("ce", PGD(2)),), queries=300), 0)
    (square,) = [check for check in found.checks if check.id == "gradient_free_attack"]
    assert square.passed is False
    assert found.accuracy.adversarial.value < 1


class LocalMinimum(nn.Module):
    """The margin has a positive local minimum on one side, and a negative minimum behind a maximum on the other."""

    def forward(self, images):
        place = (images.flatten(1)[:, 0] - 0.5) * 10
        margins = 1 + 0.3 * place - place.clamp_min(0.5) + 0.5
        return torch.stack([margins, torch.zeros_like(margins)], 1)


def test_a_descent_from_halfway_leaves_local_minima_but_not_masked_gradients():
    images = torch.full((6, 1, 4, 4), 0.5)
    labels, broken, everyone = torch.zeros(6, dtype=torch.long), images.clone(), torch.arange(6)
    broken[:, 0, 0, 0] = 0.8
    plain = TargetModel(LocalMinimum().eval(), images, labels)
    assert (plain.network(broken).argmax(1) == 1).all()
    stuck = measure_accuracy(plain.network, images, labels, L2(0.31), LabelAttack((Stage("margin", PGD(40, 0.1)),)), 0)
    assert stuck.robust.any()  # by gradient-based search
    assert torch.equal(_broken_from_halfway(plain, broken, L2(0.31), everyone, 0), everyone)
    masked = TargetModel(Rounded(plain.network).eval(), images, labels)
    assert len(_broken_from_halfway(masked, broken, L2(0.31), everyone, 0)) == 0


@pytest.mark.parametrize(("threat", "name"), [(L2(0.4), "l2"), (L1(1.6), "l1")])
def test_a_masked_network_fails_in_other_norms(threat, name):
    subject = target(count=12)
    masked = TargetModel(Rounded(subject.network).eval(), subject.images, subject.labels)
    found = evaluate_robustness(masked, threat, LabelAttack((Stage("margin", PGD(10)),), queries=300), 0)
    (gradient_free,) = [check for check in found.checks if check.id == "gradient_free_attack"]
    assert gradient_free.passed is False, name
    assert gradient_free.figure > 0.1


class RandomPlane(Plane):
    """A plane with random logits, of noise larger than the margins."""

    def forward(self, images):
        return super().forward(images) + torch.randn(len(images), 2)


def test_measurements_of_a_randomised_network_are_keyed_and_leave_the_global_generator_unchanged():
    plain = target(count=4)
    subject = TargetModel(RandomPlane().eval(), plain.images, plain.labels)
    quick = LabelAttack((Stage("margin", PGD(4)),), noise=2)

    def everything():
        return (
            compare_attacks(subject, Linf(0.05), quick, 0),
            measure_eps_curve(subject, Linf(0.05), 0, (0.5, 1.0)),
            transfer_matrix({"a": subject}, Linf(0.05), 0)["a"]["a"],
            run_attack("fgsm", subject, Linf(0.05), 0).robust,
            run_attack("ddn", subject, L2(0.1), 0).robust,
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


def test_the_eps_curve_of_a_randomised_network_uses_the_majority_vote():
    plain = target(count=30)
    far = TargetModel(
        plain.network, plain.images[boundary_distance(plain) > 0.02], plain.labels[boundary_distance(plain) > 0.02]
    )

    class SlightlyRandom(Plane):
        def forward(self, images):
            return super().forward(images) + 0.4 * torch.randn(len(images), 2)

    network = SlightlyRandom().eval()
    found = measure_eps_curve(TargetModel(network, far.images, far.labels), Linf(0.004), 0, (1.0,))
    singles = torch.stack([network(far.images).argmax(1) == far.labels for _ in range(40)])
    assert not singles.all()  # single draws misclassify some images
    assert (
        found.points[0].accuracy.value == measure_eps_curve(far, Linf(0.004), 0, (1.0,)).points[0].accuracy.value == 1
    )


def test_images_transfer_between_equal_networks():
    subject = target()
    alike = TargetModel(Plane().eval(), subject.images, subject.labels)
    contrary = Plane().eval()
    contrary.weight.data = contrary.weight.data.flip(0)
    matrix = transfer_matrix(
        {"a": subject, "b": alike, "c": TargetModel(contrary, subject.images, 1 - subject.labels)}, Linf(0.1), 0
    )
    assert torch.equal(matrix["a"]["a"], matrix["a"]["b"])
    assert not matrix["a"]["a"].all()
    assert torch.equal(matrix["a"]["a"], boundary_distance(subject) > 0.1)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd", "margin", "square"])
def test_single_attacks_by_name(name):
    subject = target(count=12)
    found = run_attack(name, subject, Linf(0.1), 0)
    assert found.name == name
    assert 0 <= found.accuracy.value < 1
    assert (found.passes > 0) == (name != "square")
    assert not (found.robust & (boundary_distance(subject) <= 0.1 / 1.25)).any() or name == "square"
    assert found.robust[boundary_distance(subject) > 0.1].all()


@pytest.mark.parametrize("name", ["cw", "ddn"])
def test_minimum_norm_attacks_need_an_l2_ball(name):
    subject = target(count=12)
    assert run_attack(name, subject, L2(3.0), 0).accuracy.value == 0
    assert run_attack(name, subject, L2(1e-4), 0).accuracy.value == 1
    with pytest.raises(UsageError, match="--norm l2"):
        run_attack(name, subject, Linf(0.1), 0)


def test_an_unknown_attack_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="did you mean 'fgsm'"):
        run_attack("fgms", target(), Linf(0.1), 0)
    assert "autoattack-standard" in ATTACKS
