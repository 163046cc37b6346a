"""Is an attack to be believed: honest networks raise no alarm, mutants do, and limits are where they are said."""

import importlib.util
import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from audit.adversary import attack_checks as checks
from audit.adversary.accuracy import measure_accuracy
from audit.adversary.attack_checks import TRUST, trustworthy
from audit.adversary.gradient_checks import objective_checks, quick_checks, reaching_eps, worst_case_checks
from audit.adversary.label_attack import TIERS, LabelAttack, margin, margin_objective
from audit.adversary.threat import THREATS, Linf, threat_model
from audit.errors import EnvironmentFault, UsageError
from audit.types import Judged
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[3]
THIRD_PARTY = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))


def _file(name):
    """A helper beside the tests, whose folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS, CAUGHT_BY = (getattr(_file("mutants"), table) for table in ("MUTANTS", "CAUGHT_BY"))
NORMS = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 0.8), ("l1", 3.0)])
NOISE = LabelAttack(noise=100)
ALL = [1, 2, 2, 3, 4, 5, 7, 8]


@cache
def network_of(model):
    return load_model(f"bundled:digits-{model}").network


@cache
def digits():
    return load_images("digits", ImageRequest(count=110))


def checked(network, threat=None, seed=0):
    return quick_checks(network, digits().images, digits().labels, threat or Linf(0.2), seed)


def failed(found):
    return {check.number for check in found if check.passed is False}


def by_number(found):
    return {check.number: check for check in found}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- honest networks and mutants


@pytest.mark.parametrize("training", ["standard", "robust-quarter", "robust"])
@pytest.mark.parametrize("family", ["baseline-h", "vgg", "resnet", "densenet"])
def test_no_bundled_network_raises_an_alarm(family, training):
    found = checked(network_of(f"{family}-{training}"))
    assert [check.number for check in found] == ALL
    assert all(check.passed for check in found)
    assert 100 * 4 <= sum(check.passes for check in found) <= 100 * 52
    assert by_number(found)[8].figure < 1e-6  # far from the limit of 1e-4


@NORMS
def test_nor_does_it_in_another_norm(norm, eps):
    assert failed(checked(network_of("resnet-robust"), threat_model(norm, eps))) == set()


@pytest.mark.parametrize("model", ["vgg-robust", "baseline-h-standard"])
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_by_the_checks_that_must_catch_it(name, model):
    found = checked(MUTANTS[name](network_of(model)))
    assert CAUGHT_BY[name] <= failed(found)
    # a softmax too many misleads nobody who follows the margin; all others have no number to rank by
    assert trustworthy(found) == (name == "softmax output")


@NORMS
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_in_every_norm(name, norm, eps):
    assert failed(checked(MUTANTS[name](network_of("baseline-h-robust")), threat_model(norm, eps))) >= CAUGHT_BY[name]


def test_the_sine_has_the_right_slope_and_only_steps_tell():
    found = by_number(checked(MUTANTS["sine"](network_of("vgg-robust"))))
    assert found[3].passed
    assert not found[4].passed


def test_mutants_hide_nothing_on_clean_images():
    """Their defects mislead attacks, not users: else the checks would only see images that are wrong anyway."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for make in MUTANTS.values():
            right = margin(make(network_of("vgg-robust"))(digits().images), digits().labels) > 0
            assert int(right.sum()) >= 80


@pytest.mark.third_party
@pytest.mark.skipif(not THIRD_PARTY.is_dir(), reason=f"no third-party files in {THIRD_PARTY}")
@pytest.mark.parametrize(
    ("file", "arch", "data", "eps"),
    [
        ("cifar_cnn_a_adv.model", "cnn_a&mean=.4914,.4822,.4465&std=.2023,.1994,.2010", "cifar10-test-a", 2 / 255),
        ("mnist_cnn_a_adv.model", "mnist_cnn_a", "mnist-test", 0.3),
    ],
)
def test_networks_of_others_raise_no_alarm_and_their_mutants_do(file, arch, data, eps):
    ref = f"file:{THIRD_PARTY}/checkpoints/{file}?arch={ROOT}/tests/third_party_nets.py:{arch}&num_classes=10"
    network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
    images = load_images(f"parquet:{THIRD_PARTY}/data/{data}.parquet", ImageRequest(count=80))
    assert failed(quick_checks(network, images.images, images.labels, Linf(eps), 0)) == set()
    for name, make in MUTANTS.items():
        found = quick_checks(make(network, eps), images.images, images.labels, Linf(eps), 0)
        assert failed(found) >= CAUGHT_BY[name]


# --- figures and limits of the quick checks, on networks whose answers are known


class Plane(nn.Module):
    """A linear network with a few classes, and a factor by which its gradient is wrong."""

    def __init__(self, classes=2, factor=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, classes, generator=seeded()))
        self.factor = factor

    def forward(self, images):
        logits = images.flatten(1) @ self.weight
        return self.factor * logits + (1 - self.factor) * logits.detach()


def plane_data(network, count=20):
    images = 0.4 + 0.2 * torch.rand(count, 1, 8, 8, generator=seeded(1))
    return images, network(images).argmax(1)


@NORMS
@pytest.mark.parametrize(
    ("factor", "slope", "linear"),
    [
        (1.0, True, True),
        (0.6, True, True),
        (0.4, False, False),
        (1.9, True, True),
        (2.5, False, True),
        (4, False, False),
    ],
)
def test_a_gradient_wrong_by_a_factor_fails_from_the_stated_limits_on(norm, eps, factor, slope, linear):
    network = Plane(factor=factor)
    found = by_number(quick_checks(network, *plane_data(network), threat_model(norm, eps / 4), 0))
    assert found[3].passed == slope
    assert found[3].figure == float(slope)
    assert found[4].passed == linear
    assert found[4].figure == pytest.approx(1 / factor, rel=1e-3)


@pytest.mark.parametrize(("zeros", "passes"), [(0, True), (1, True), (2, False)])
def test_shares_of_zero_gradients_are_counted(zeros, passes):
    network = Plane(3)
    images, _ = plane_data(network, 100)
    # marked by a corner pixel that no gradient moves: cut off there
    images[:zeros, 0, 0, 0] = 1.0

    class Cut(nn.Module):
        def forward(self, batch):
            held = (batch[:, 0, 0, 0] > 0.9)[:, None]
            logits = network(batch)
            return torch.where(held, logits.detach(), logits)

    found = quick_checks(Cut(), images, network(images).argmax(1), Linf(0.05), 0)
    of_margin, of_loss = found[1:3]
    assert of_margin.number == of_loss.number == 2
    assert of_margin.figure == of_loss.figure == zeros / 100
    assert of_margin.passed == (zeros == 0)
    assert of_loss.passed == passes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("count", [1, 7])
@NORMS
def test_few_classes_and_few_images_are_enough(classes, count, norm, eps):
    network = Plane(classes)
    found = quick_checks(network, *plane_data(network, count), threat_model(norm, eps), 0)
    assert all(check.passed for check in found)


def test_clipping_the_input_stalls_attacks_at_the_edge_of_the_range_and_the_unbounded_attack_tells():
    """An honest-looking layer with no gradient at 0 and 1, where half of the digits' pixels are."""

    class Clipped(nn.Module):
        def forward(self, images):
            return network_of("vgg-robust")(functional.hardtanh(images, 0.0, 1.0))

    smoke = replace(TIERS["smoke"], fast=False)
    few = digits().images[:60], digits().labels[:60]
    plain, clipped = (measure_accuracy(n, *few, Linf(0.3), smoke, 0) for n in (network_of("vgg-robust"), Clipped()))
    assert clipped.adversarial.value > plain.adversarial.value + 0.1
    assert failed(checked(Clipped())) == {5}


def test_a_network_that_looks_at_the_whole_batch_is_not_deterministic():
    network = nn.Sequential(nn.BatchNorm2d(1, momentum=0.0), network_of.__wrapped__("vgg-robust"))  # one of its own
    network.train()
    assert 8 in failed(checked(network))


def test_outputs_that_are_finite_only_at_times_are_not_deterministic():
    class Moody(nn.Module):
        def forward(self, images):
            return network_of("vgg-robust")(images) + (torch.nan if len(images) == 13 else 0)

    found = by_number(checked(Moody()))
    assert found[8].passed is False
    assert found[8].figure == 2


def test_a_fault_far_from_the_images_fails_the_unbounded_attack():
    class Root(nn.Module):
        def forward(self, images):
            depth = (0.7 - images).sqrt().flatten(1).sum(1)
            return torch.stack([depth, -1 + 0 * depth], 1)

    images = torch.full((4, 1, 8, 8), 0.3)
    found = by_number(quick_checks(Root(), images, torch.zeros(4, dtype=torch.long), Linf(0.1), 0))
    assert found[3].passed
    assert found[5].passed is False
    assert "not finite" in found[5].reason


# --- what cannot be checked


class Faulty(nn.Module):
    """A linear network that goes wrong in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.plane = how, Plane(3)

    def forward(self, images):
        logits = self.plane(images)
        if self.how == "nan":
            return logits / 0 * 0
        if self.how == "nan at a random start" and not (images * 16 == (images * 16).round()).all():
            return logits + torch.nan
        if self.how == "nan gradient":
            return logits + (logits * 0).sqrt()
        if self.how == "inference":
            with torch.inference_mode():
                return self.plane(images)
        if self.how == "in place":
            powers = logits.exp()
            kept = 1 * powers
            powers.add_(1)  # what the backward pass of exp needs is gone
            return kept.log()
        return logits


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "the network's output is not finite for 4 of 4 images"),
        ("nan at a random start", "the objective is not finite for 4 of 4 images"),
        ("nan gradient", "not finite"),
        ("inference", "gives no gradient"),
        ("in place", "cannot be computed"),
    ],
)
def test_where_there_is_no_gradient_the_first_check_fails_and_the_others_do_not_apply(how, reason):
    images = (torch.rand(4, 1, 8, 8, generator=seeded()) * 16).round() / 16
    labels = Faulty("")(images).argmax(1)
    found = quick_checks(Faulty(how), images, labels, Linf(0.1), 0)
    assert [check.number for check in found] == ALL
    assert found[0].passed is False
    assert reason in found[0].reason
    assert not trustworthy(found)
    for check in found[1:6]:
        assert check.passed is None
        assert check.figure is None
        assert check.reason
    # outputs can be looked at all the same, where there are any
    assert [check.passed for check in found[6:]] == [None if how == "nan" else True] * 2


def test_nothing_applies_where_no_image_is_right():
    network = Plane(2)
    images, labels = plane_data(network)
    found = quick_checks(network, images, 1 - labels, Linf(0.1), 0)
    assert [check.number for check in found] == ALL
    assert all(check.passed is None and check.reason == "the network gets no image right" for check in found)
    assert trustworthy(found)


def test_no_image_at_all_is_like_none_right():
    found = quick_checks(Plane(), torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), Linf(0.1), 0)
    assert all(check.passed is None for check in found)


def test_at_eps_zero_there_is_no_step_to_judge():
    found = by_number(checked(network_of("vgg-robust"), Linf(0.0)))
    assert found[3].passed is found[4].passed is None
    assert found[3].reason == "eps is 0"
    assert found[5].passed


def test_running_out_of_memory_is_no_verdict_on_the_network():
    class Hungry(Plane):
        def forward(self, images):
            if images.requires_grad:
                raise RuntimeError("out of memory")
            return super().forward(images)

    network = Hungry()
    images, labels = plane_data(network, 1)
    with pytest.raises(EnvironmentFault, match="a single image"):
        quick_checks(network, images, labels, Linf(0.1), 0)


# --- what the checks leave behind, and what they cost


@pytest.mark.parametrize("name", ["noisy logits", "random gradient"])
def test_the_seed_decides_and_the_global_generator_is_left_alone(name):
    network = MUTANTS[name](network_of("vgg-robust"))
    before = torch.random.get_rng_state()
    first = checked(network, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert checked(network, seed=3) == first
    assert checked(network, seed=4) != first


def test_parameters_keep_no_gradient():
    network = Plane(3)
    with torch.no_grad():
        found = quick_checks(network, *plane_data(network), Linf(0.1), 0)
    assert failed(found) == set()
    assert network.weight.grad is None
    assert network.weight.requires_grad


def test_passes_are_counted_and_no_more_images_asked_for_than_needed():
    class Counting(Plane):
        differentiated = seen = 0

        def forward(self, images):
            if images.requires_grad:
                self.differentiated += len(images)
            self.seen = max(self.seen, int(images[:, 0, 0, 0].max() * 1000))
            return super().forward(images)

    network = Counting()
    images, labels = plane_data(network, 1000)
    wanted = quick_checks(network, images, labels, Linf(0.02), 0)
    network.differentiated = network.seen = 0
    images[300:] = 5.0  # outside of any ball: would be seen
    found = quick_checks(network, images, labels, Linf(0.02), 0)
    assert found == wanted
    assert sum(check.passes for check in found) == network.differentiated
    assert network.seen < 1100


# --- objectives


def critic(images, index):
    value = (images * (1 + index).view(-1, 1, 1, 1)).square().flatten(1).sum(1)
    return Judged(value, torch.zeros(len(images), dtype=torch.bool))


@NORMS
def test_an_honest_objective_passes_the_first_three(norm, eps):
    images = torch.rand(130, 1, 8, 8, generator=seeded())
    found = objective_checks(critic, images, threat_model(norm, eps), 0)
    assert [(check.number, check.passed) for check in found] == [(1, True), (2, True), (3, True)]
    assert found[0].passes == 100
    assert found[2].figure == 1


def test_objectives_with_defects_fail_and_say_why():
    images = torch.rand(10, 1, 8, 8, generator=seeded())

    def cut(batch, index):
        return critic(batch.detach(), index)

    def flat(batch, index):
        value = critic(batch, index).value
        return Judged(torch.where(index < 3, value.detach(), value), index < 0)

    def noisy(batch, index):
        return Judged(critic(batch, index).value + 1e3 * torch.randn(len(batch)), index < 0)

    none, *rest = objective_checks(cut, images, Linf(0.1), 0)
    assert none.passed is False
    assert "no gradient" in none.reason
    assert [(check.number, check.passed) for check in rest] == [(2, None), (3, None)]
    assert objective_checks(flat, images, Linf(0.1), 0)[1].figure == 0.3
    assert failed(objective_checks(flat, images, Linf(0.1), 0)) == {2, 3}
    before = torch.random.get_rng_state()
    assert failed(objective_checks(noisy, images, Linf(0.1), 0)) == {3}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [check.passed for check in objective_checks(critic, images[:0], Linf(0.1), 0)] == [None] * 3


def test_the_margin_is_judged_alike_as_an_objective():
    network = network_of("vgg-robust")
    right = margin(network(digits().images), digits().labels) > 0
    images, labels = digits().images[right], digits().labels[right]
    found = objective_checks(margin_objective(network, labels), images, Linf(0.2), 0)
    assert found[2].figure == by_number(checked(network))[3].figure


def test_the_worst_case_of_an_honest_objective_falls_with_steps_and_with_eps():
    images = 0.2 + 0.8 * torch.rand(12, 1, 8, 8, generator=seeded())
    found = worst_case_checks(critic, images, Linf(0.05), 0)
    assert [(check.number, check.passed) for check in found] == [
        (1, True),
        (2, True),
        (3, True),
        (11, True),
        (18, True),
    ]
    assert all(check.name.startswith("worst case: ") for check in found)
    assert [check.level for check in found] == ["trust", "trust", "trust", "note", "note"]
    assert sum(check.passes for check in found) <= 19 * len(images)
    assert found[4].figure > 1.5  # twice as far, nearly


def test_a_worst_case_that_leads_nowhere_is_not_trusted():
    images = torch.rand(12, 1, 8, 8, generator=seeded())

    def rounded(batch, index):
        return Judged(
            critic((batch * 20).round() / 20 + 0 * batch, index).value + 0 * batch.flatten(1).sum(1), index < 0
        )

    def uphill(batch, index):
        value = critic(batch, index).value
        return Judged(2 * value.detach() - value, index < 0)

    def cut(batch, index):
        return critic(batch.detach(), index)

    for objective, wrong in ((rounded, {2, 3, 11, 18}), (uphill, {3, 11, 18}), (cut, {1})):
        found = worst_case_checks(objective, images, Linf(0.05), 0)
        assert failed(found) == wrong
        assert not trustworthy(found)
        assert [check.number for check in found] == [1, 2, 3, 11, 18]


# --- noise


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_noise_breaks_what_is_near_the_boundary_and_never_what_is_out_of_reach(norm):
    network, threat = Plane(2), threat_model(norm, 0.1)
    images, labels = plane_data(network, 60)
    slope = network.weight.detach() @ torch.tensor([1.0, -1.0])
    reach = 0.1 * torch.linalg.vector_norm(slope, {"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    # put every image at a known margin: half in easy reach, half out of it
    margins = torch.where(torch.arange(60) % 2 == 0, 0.01 * reach, 1.01 * reach)
    sign = torch.where(labels == 0, 1.0, -1.0)
    now = (images.flatten(1) @ slope) * sign
    images = images + ((margins - now) * sign / slope.square().sum()).view(-1, 1, 1, 1) * slope.view(1, 1, 8, 8)
    standing, again = (measure_accuracy(network, images, labels, threat, NOISE, 0).robust for _ in range(2))
    assert torch.equal(standing, torch.arange(60) % 2 == 1)
    assert torch.equal(standing, again)


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_noise_is_legal_and_as_long_as_eps(norm):
    images, seen = 0.3 + 0.4 * torch.rand(3, 1, 8, 8, generator=seeded()), []

    class Recording(nn.Module):
        def forward(self, batch):
            seen.append(batch)
            return torch.tensor([1.0, 0.0]).expand(len(batch), 2)

    threat = threat_model(norm, 0.2)
    labels, corners = torch.zeros(3, dtype=torch.long), LabelAttack(noise=9, fast=False)
    assert measure_accuracy(Recording(), images, labels, threat, corners, 0).robust.all()
    seen = seen[1:]  # the clean images come first
    lengths = torch.cat([threat.distance(batch, images) for batch in seen])
    assert len(lengths) == 27
    torch.testing.assert_close(lengths, torch.full((27,), 0.2))
    # in l1 a corner is one pixel of 64, and two draws may agree
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) >= (24 if norm == "l1" else 27)


def test_a_network_that_draws_is_worded_as_such_and_not_trusted():
    sound = checked(network_of("baseline-h-robust"))
    assert checks.verdict(sound) == "measured"
    assert not checks.randomised(sound)
    drawing = [check._replace(passed=False) if check.number == 8 else check for check in sound]
    assert checks.randomised(drawing)
    assert not trustworthy(drawing)
    assert checks.verdict(drawing) == "randomised: majority verdict of 20 draws, no point estimate"
    masked = [check._replace(passed=False) if check.number == 3 else check for check in sound]
    assert checks.verdict(masked) == checks.UPPER_BOUND


# --- attacks compared


def mask(standing, count=1000):
    return torch.arange(count) < standing


@pytest.mark.parametrize(
    ("check", "number", "most"),
    [
        (checks.losses_agree, 9, 30),
        (checks.rescaling_gains_little, 10, 10),
        (checks.steps_gain_little, 11, 5),
        (checks.restarts_gain_little, 12, 5),
        (lambda robust, single: checks.single_step_beaten(single, robust), 6, 0),
        (checks.noise_breaks_nothing, 14, 0),
        (lambda robust, square: checks.queries_gain_little(robust, square, 300), 15, 2),
        (checks.transfer_breaks_nothing, 16, 0),
    ],
)
def test_two_attacks_may_differ_by_the_limit_and_by_no_image_more(check, number, most):
    within, beyond = (check(mask(500), mask(500 - fewer)) for fewer in (most, most + 1))
    assert within.passed
    assert within.figure == most / 1000
    assert beyond.passed is False
    assert beyond.figure == (most + 1) / 1000
    assert within.number == beyond.number == number
    assert beyond.level == ("trust" if number in TRUST else "note")
    assert trustworthy([within])
    assert trustworthy([beyond]) == (number not in TRUST)
    assert check(mask(0, 0), mask(0, 0)).passed is None
    with pytest.raises(UsageError, match=r"cannot be compared"):
        check(mask(1), mask(1, 3))


def test_images_count_one_by_one_where_a_union_is_meant():
    """An attack that breaks one image more and misses another has missed it."""
    ours, theirs = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    assert checks.transfer_breaks_nothing(ours, theirs).figure == pytest.approx(1 / 3)
    assert checks.single_step_beaten(theirs, ours).figure == pytest.approx(1 / 3)
    assert checks.restarts_gain_little(ours, theirs).figure == 0  # accuracies are compared there


def test_the_losses_may_differ_either_way():
    assert checks.losses_agree(mask(500), mask(600)).figure == checks.losses_agree(mask(600), mask(500)).figure == 0.1
    assert checks.rescaling_gains_little(mask(500), mask(600)).figure == 0


def test_too_few_queries_tell_nothing():
    found = checks.queries_gain_little(mask(5), mask(5), 299)
    assert found.passed is None
    assert "299" in found.reason
    assert "300" in found.reason


def test_the_loss_has_settled_where_it_rises_little_for_nearly_all():
    earlier = torch.zeros(100)
    rises = torch.full((100,), 0.04)
    rises[:5] = 1.0
    assert checks.loss_settled(earlier, rises).passed
    rises[5] = torch.nan
    found = checks.loss_settled(earlier, rises)
    assert found.passed is False
    assert found.figure == 0.94
    assert checks.loss_settled(earlier[:0], rises[:0]).passed is None


def test_the_ladder_never_rises_and_ends_at_nothing():
    rises, end = checks.never_rises({0.5: 0, 0.1: 40, 0.2: 30, 0.4: 30}, reaching=0.5)
    assert rises.passed
    assert end.passed
    rises, end = checks.never_rises({0.1: 40, 0.2: 30, 0.4: 33, 0.5: 2}, reaching=0.5)
    assert rises.passed is False
    assert rises.figure == 3
    assert end.passed is False
    assert end.figure == 2
    rises, end = checks.never_rises({0.1: 40}, reaching=0.5)
    assert rises.passed
    assert end.passed is None
    assert "0.1" in end.reason
    assert [check.passed for check in checks.never_rises({}, 0.5)] == [None, None]


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_the_reaching_radius_reaches_a_grey_image_and_is_the_least(norm):
    corner = torch.zeros(1, 3, 4, 4)
    reach = reaching_eps(threat_model(norm, 0.1), corner)
    assert reach == pytest.approx(float(threat_model(norm, 0.1).distance(corner + 0.5, corner)))


def test_criteria_state_their_limits():
    assert checks.losses_agree(mask(1), mask(1)).criterion.endswith("by at most 0.03")
    assert all("{" not in check.criterion for check in checked(network_of("vgg-robust")))
