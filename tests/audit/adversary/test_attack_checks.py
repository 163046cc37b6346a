"""Checks of attacks: correct networks pass, mutants with masked gradients fail, and limits are as stated."""

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
from audit.adversary import check_rules
from audit.adversary import comparison_checks as comparison
from audit.adversary.accuracy import measure_accuracy
from audit.adversary.attack_checks import trustworthy
from audit.adversary.check_rules import RULES
from audit.adversary.gradient_checks import grey_covering_eps, objective_checks, quick_checks, worst_case_checks
from audit.adversary.label_attack import TIERS, LabelAttack, margin, margin_objective
from audit.adversary.threat import THREATS, Linf, threat_model
from audit.errors import EnvironmentFault, UsageError
from audit.types import ObjectiveValue
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

ROOT = Path(__file__).parents[3]
THIRD_PARTY = Path(os.environ.get("RVAUDIT_THIRD_PARTY", ROOT.parent / "shared"))


def _file(name):
    """Load a module beside the tests: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTANTS, CAUGHT_BY = (getattr(_file("mutants"), table) for table in ("MUTANTS", "CAUGHT_BY"))
NORMS = pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 0.8), ("l1", 3.0)])
NOISE = LabelAttack(noise=100)
QUICK_CHECKS = [
    "gradient",
    "zero_margin_gradient",
    "zero_cross_entropy_gradient",
    "gradient_slope",
    "local_linearity",
    "unbounded_attack",
    "logit_outputs",
    "determinism",
]
TRUST = {
    "gradient",
    "zero_margin_gradient",
    "zero_cross_entropy_gradient",
    "gradient_slope",
    "unbounded_attack",
    "determinism",
    "gradient_free_attack",
    "transfer_attack",
}
OBJECTIVE_CHECKS = ["worst_case_gradient", "worst_case_zero_gradient", "worst_case_slope"]
WORST_CASE_CHECKS = [*OBJECTIVE_CHECKS, "worst_case_more_steps", "worst_case_wider_ball"]


@cache
def network_of(model):
    return load_model(f"bundled:digits-{model}").network


@cache
def digits():
    return load_images("digits", ImageRequest(count=110))


def checked(network, threat=None, seed=0):
    return quick_checks(network, digits().images, digits().labels, threat or Linf(0.2), seed)


def failed(found):
    return {check.id for check in found if check.passed is False}


def by_id(found):
    return {check.id: check for check in found}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- correct networks and mutants


@pytest.mark.parametrize("training", ["standard", "robust-quarter", "robust"])
@pytest.mark.parametrize("family", ["baseline-h", "vgg", "resnet", "densenet"])
def test_bundled_networks_pass_every_check(family, training):
    found = checked(network_of(f"{family}-{training}"))
    assert [check.id for check in found] == QUICK_CHECKS
    assert all(check.passed for check in found)
    assert 100 * 4 <= sum(check.passes for check in found) <= 100 * 52
    assert by_id(found)["determinism"].figure < 1e-6  # far from the limit of 1e-4


@NORMS
def test_bundled_networks_pass_in_every_norm(norm, eps):
    assert failed(checked(network_of("resnet-robust"), threat_model(norm, eps))) == set()


@pytest.mark.parametrize("model", ["vgg-robust", "baseline-h-standard"])
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails_the_checks_for_its_defect(name, model):
    found = checked(MUTANTS[name](network_of(model)))
    assert CAUGHT_BY[name] <= failed(found)
    # a softmax does not mask the margin; all other mutants are untrusted
    assert trustworthy(found) == (name == "softmax output")


@NORMS
@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails_in_every_norm(name, norm, eps):
    assert failed(checked(MUTANTS[name](network_of("baseline-h-robust")), threat_model(norm, eps))) >= CAUGHT_BY[name]


def test_the_sine_passes_the_slope_check_and_fails_linearity():
    found = by_id(checked(MUTANTS["sine"](network_of("vgg-robust"))))
    assert found["gradient_slope"].passed
    assert not found["local_linearity"].passed


def test_mutants_keep_their_clean_accuracy():
    """The checks run on correctly classified images, of which mutants must have enough."""
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
def test_third_party_networks_pass_and_their_mutants_fail(file, arch, data, eps):
    ref = f"file:{THIRD_PARTY}/checkpoints/{file}?arch={ROOT}/tests/third_party_nets.py:{arch}&num_classes=10"
    network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
    images = load_images(f"parquet:{THIRD_PARTY}/data/{data}.parquet", ImageRequest(count=80))
    assert failed(quick_checks(network, images.images, images.labels, Linf(eps), 0)) == set()
    for name, make in MUTANTS.items():
        found = quick_checks(make(network, eps), images.images, images.labels, Linf(eps), 0)
        assert failed(found) >= CAUGHT_BY[name]


# --- figures and limits of the quick checks, on networks with known results


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
def test_a_gradient_wrong_by_a_factor_fails_beyond_the_stated_limits(norm, eps, factor, slope, linear):
    network = Plane(factor=factor)
    found = by_id(quick_checks(network, *plane_data(network), threat_model(norm, eps / 4), 0))
    assert found["gradient_slope"].passed == slope
    assert found["gradient_slope"].figure == float(slope)
    assert found["local_linearity"].passed == linear
    assert found["local_linearity"].figure == pytest.approx(1 / factor, rel=1e-3)


@pytest.mark.parametrize(("zeros", "passes"), [(0, True), (1, True), (2, False)])
def test_zero_gradients_are_counted(zeros, passes):
    network = Plane(3)
    images, _ = plane_data(network, 100)
    # detach images marked by a corner pixel
    images[:zeros, 0, 0, 0] = 1.0

    class Cut(nn.Module):
        def forward(self, batch):
            held = (batch[:, 0, 0, 0] > 0.9)[:, None]
            logits = network(batch)
            return torch.where(held, logits.detach(), logits)

    found = quick_checks(Cut(), images, network(images).argmax(1), Linf(0.05), 0)
    of_margin, of_loss = found[1:3]
    assert (of_margin.id, of_loss.id) == ("zero_margin_gradient", "zero_cross_entropy_gradient")
    assert of_margin.figure == of_loss.figure == zeros / 100
    assert of_margin.passed == (zeros == 0)
    assert of_loss.passed == passes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("count", [1, 7])
@NORMS
def test_few_classes_and_few_images_suffice(classes, count, norm, eps):
    network = Plane(classes)
    found = quick_checks(network, *plane_data(network, count), threat_model(norm, eps), 0)
    assert all(check.passed for check in found)


def test_clipped_inputs_fail_the_unbounded_attack():
    """A layer without gradient at 0 and 1, the values of half of the digits' pixels."""

    class Clipped(nn.Module):
        def forward(self, images):
            return network_of("vgg-robust")(functional.hardtanh(images, 0.0, 1.0))

    smoke = replace(TIERS["smoke"], fast=False)
    few = digits().images[:60], digits().labels[:60]
    plain, clipped = (measure_accuracy(n, *few, Linf(0.3), smoke, 0) for n in (network_of("vgg-robust"), Clipped()))
    assert clipped.adversarial.value > plain.adversarial.value + 0.1
    assert failed(checked(Clipped())) == {"unbounded_attack"}


def test_batch_statistics_fail_the_determinism_check():
    network = nn.Sequential(
        nn.BatchNorm2d(1, momentum=0.0), network_of.__wrapped__("vgg-robust")
    )  # not the cached network
    network.train()
    assert "determinism" in failed(checked(network))


def test_outputs_finite_in_some_batches_fail_the_determinism_check():
    class NanInOneBatch(nn.Module):
        def forward(self, images):
            return network_of("vgg-robust")(images) + (torch.nan if len(images) == 13 else 0)

    found = by_id(checked(NanInOneBatch()))
    assert found["determinism"].passed is False
    assert found["determinism"].figure == 2


def test_a_non_finite_gradient_far_from_the_images_fails_the_unbounded_attack():
    class SquareRoot(nn.Module):
        def forward(self, images):
            depth = (0.7 - images).sqrt().flatten(1).sum(1)
            return torch.stack([depth, -1 + 0 * depth], 1)

    images = torch.full((4, 1, 8, 8), 0.3)
    found = by_id(quick_checks(SquareRoot(), images, torch.zeros(4, dtype=torch.long), Linf(0.1), 0))
    assert found["gradient_slope"].passed
    assert found["unbounded_attack"].passed is False
    assert "not finite" in found["unbounded_attack"].reason


# --- checks that do not apply


class Faulty(nn.Module):
    """A linear network with one of several faults."""

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
            powers.add_(1)  # overwrites what the backward pass of exp needs
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
def test_without_a_gradient_the_first_check_fails_and_the_others_do_not_apply(how, reason):
    images = (torch.rand(4, 1, 8, 8, generator=seeded()) * 16).round() / 16
    labels = Faulty("")(images).argmax(1)
    found = quick_checks(Faulty(how), images, labels, Linf(0.1), 0)
    assert [check.id for check in found] == QUICK_CHECKS
    assert found[0].passed is False
    assert reason in found[0].reason
    assert not trustworthy(found)
    for check in found[1:6]:
        assert check.passed is None
        assert check.figure is None
        assert check.reason
    # output checks need no gradient
    assert [check.passed for check in found[6:]] == [None if how == "nan" else True] * 2


def test_no_check_applies_without_a_correct_image():
    network = Plane(2)
    images, labels = plane_data(network)
    found = quick_checks(network, images, 1 - labels, Linf(0.1), 0)
    assert [check.id for check in found] == QUICK_CHECKS
    assert all(check.passed is None and check.reason == "the network classifies no image correctly" for check in found)
    assert trustworthy(found)


def test_no_check_applies_without_images():
    found = quick_checks(Plane(), torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long), Linf(0.1), 0)
    assert all(check.passed is None for check in found)


def test_slope_and_linearity_do_not_apply_at_eps_zero():
    found = by_id(checked(network_of("vgg-robust"), Linf(0.0)))
    assert found["gradient_slope"].passed is found["local_linearity"].passed is None
    assert found["gradient_slope"].reason == "eps is 0"
    assert found["unbounded_attack"].passed


def test_running_out_of_memory_is_an_environment_fault():
    class OutOfMemory(Plane):
        def forward(self, images):
            if images.requires_grad:
                raise RuntimeError("out of memory")
            return super().forward(images)

    network = OutOfMemory()
    images, labels = plane_data(network, 1)
    with pytest.raises(EnvironmentFault, match="a single image"):
        quick_checks(network, images, labels, Linf(0.1), 0)


# --- side effects and cost


@pytest.mark.parametrize("name", ["noisy logits", "random gradient"])
def test_results_depend_on_the_seed_only_and_the_global_generator_is_unchanged(name):
    network = MUTANTS[name](network_of("vgg-robust"))
    before = torch.random.get_rng_state()
    first = checked(network, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert checked(network, seed=3) == first
    assert checked(network, seed=4) != first


def test_parameters_get_no_gradient():
    network = Plane(3)
    with torch.no_grad():
        found = quick_checks(network, *plane_data(network), Linf(0.1), 0)
    assert failed(found) == set()
    assert network.weight.grad is None
    assert network.weight.requires_grad


def test_passes_are_counted_and_limited_to_the_needed_images():
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
    images[300:] = 5.0  # outside any ball, so that an evaluation would be detected
    found = quick_checks(network, images, labels, Linf(0.02), 0)
    assert found == wanted
    assert sum(check.passes for check in found) == network.differentiated
    assert network.seen < 1100


# --- objectives


def critic(images, index):
    value = (images * (1 + index).view(-1, 1, 1, 1)).square().flatten(1).sum(1)
    return ObjectiveValue(value, torch.zeros(len(images), dtype=torch.bool))


@NORMS
def test_a_smooth_objective_passes(norm, eps):
    images = torch.rand(130, 1, 8, 8, generator=seeded())
    found = objective_checks(critic, images, threat_model(norm, eps), 0)
    assert [(check.id, check.passed) for check in found] == [(rule, True) for rule in OBJECTIVE_CHECKS]
    assert found[0].passes == 100
    assert found[2].figure == 1


def test_objectives_with_masked_gradients_fail_with_a_reason():
    images = torch.rand(10, 1, 8, 8, generator=seeded())

    def cut(batch, index):
        return critic(batch.detach(), index)

    def flat(batch, index):
        value = critic(batch, index).value
        return ObjectiveValue(torch.where(index < 3, value.detach(), value), index < 0)

    def noisy(batch, index):
        return ObjectiveValue(critic(batch, index).value + 1e3 * torch.randn(len(batch)), index < 0)

    none, *rest = objective_checks(cut, images, Linf(0.1), 0)
    assert none.passed is False
    assert "no gradient" in none.reason
    assert [(check.id, check.passed) for check in rest] == [(rule, None) for rule in OBJECTIVE_CHECKS[1:]]
    assert objective_checks(flat, images, Linf(0.1), 0)[1].figure == 0.3
    assert failed(objective_checks(flat, images, Linf(0.1), 0)) == {"worst_case_zero_gradient", "worst_case_slope"}
    before = torch.random.get_rng_state()
    assert failed(objective_checks(noisy, images, Linf(0.1), 0)) == {"worst_case_slope"}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [check.passed for check in objective_checks(critic, images[:0], Linf(0.1), 0)] == [None] * 3


def test_the_margin_as_an_objective_gives_the_same_slope():
    network = network_of("vgg-robust")
    right = margin(network(digits().images), digits().labels) > 0
    images, labels = digits().images[right], digits().labels[right]
    found = objective_checks(margin_objective(network, labels), images, Linf(0.2), 0)
    assert found[2].figure == by_id(checked(network))["gradient_slope"].figure


def test_the_worst_case_of_a_smooth_objective_falls_with_steps_and_eps():
    images = 0.2 + 0.8 * torch.rand(12, 1, 8, 8, generator=seeded())
    found = worst_case_checks(critic, images, Linf(0.05), 0)
    assert [(check.id, check.passed) for check in found] == [(rule, True) for rule in WORST_CASE_CHECKS]
    assert all(check.name.startswith("worst case: ") for check in found)
    assert [check.level for check in found] == ["trust", "trust", "trust", "note", "note"]
    assert sum(check.passes for check in found) <= 19 * len(images)
    assert found[4].figure > 1.5  # nearly twice as far


def test_a_worst_case_of_a_masked_objective_is_not_trusted():
    images = torch.rand(12, 1, 8, 8, generator=seeded())

    def rounded(batch, index):
        return ObjectiveValue(
            critic((batch * 20).round() / 20 + 0 * batch, index).value + 0 * batch.flatten(1).sum(1), index < 0
        )

    def uphill(batch, index):
        value = critic(batch, index).value
        return ObjectiveValue(2 * value.detach() - value, index < 0)

    def cut(batch, index):
        return critic(batch.detach(), index)

    for objective, wrong in (
        (rounded, set(WORST_CASE_CHECKS[1:])),
        (uphill, set(WORST_CASE_CHECKS[2:])),
        (cut, {"worst_case_gradient"}),
    ):
        found = worst_case_checks(objective, images, Linf(0.05), 0)
        assert failed(found) == wrong
        assert not trustworthy(found)
        assert [check.id for check in found] == WORST_CASE_CHECKS


# --- noise


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_noise_breaks_images_near_the_boundary_only(norm):
    network, threat = Plane(2), threat_model(norm, 0.1)
    images, labels = plane_data(network, 60)
    slope = network.weight.detach() @ torch.tensor([1.0, -1.0])
    reach = 0.1 * torch.linalg.vector_norm(slope, {"linf": 1, "l2": 2, "l1": torch.inf}[norm])
    # place every image at a known margin: half within easy reach, half out of reach
    margins = torch.where(torch.arange(60) % 2 == 0, 0.01 * reach, 1.01 * reach)
    sign = torch.where(labels == 0, 1.0, -1.0)
    now = (images.flatten(1) @ slope) * sign
    images = images + ((margins - now) * sign / slope.square().sum()).view(-1, 1, 1, 1) * slope.view(1, 1, 8, 8)
    robust, again = (measure_accuracy(network, images, labels, threat, NOISE, 0).robust for _ in range(2))
    assert torch.equal(robust, torch.arange(60) % 2 == 1)
    assert torch.equal(robust, again)


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_noise_is_legal_and_of_length_eps(norm):
    images, seen = 0.3 + 0.4 * torch.rand(3, 1, 8, 8, generator=seeded()), []

    class Recording(nn.Module):
        def forward(self, batch):
            seen.append(batch)
            return torch.tensor([1.0, 0.0]).expand(len(batch), 2)

    threat = threat_model(norm, 0.2)
    labels, vertices = torch.zeros(3, dtype=torch.long), LabelAttack(noise=9, fast=False)
    assert measure_accuracy(Recording(), images, labels, threat, vertices, 0).robust.all()
    seen = seen[1:]  # the clean images come first
    lengths = torch.cat([threat.distance(batch, images) for batch in seen])
    assert len(lengths) == 27
    torch.testing.assert_close(lengths, torch.full((27,), 0.2))
    # in l1 a vertex changes one pixel of 64, and two draws may agree
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) >= (24 if norm == "l1" else 27)


def test_a_randomised_network_has_its_own_verdict_and_is_not_trusted():
    sound = checked(network_of("baseline-h-robust"))
    assert checks.verdict(sound) == "measured"
    assert not checks.randomised(sound)
    drawing = [check._replace(passed=False) if check.id == "determinism" else check for check in sound]
    assert checks.randomised(drawing)
    assert not trustworthy(drawing)
    assert checks.verdict(drawing) == "randomised: majority verdict of 20 draws, no point estimate"
    masked = [check._replace(passed=False) if check.id == "gradient_slope" else check for check in sound]
    assert checks.verdict(masked) == checks.UPPER_BOUND


# --- comparisons of attacks


def mask(robust, count=1000):
    return torch.arange(count) < robust


@pytest.mark.parametrize(
    ("check", "rule", "most"),
    [
        (comparison.check_losses, "loss_agreement", 30),
        (comparison.check_rescaled_logits, "rescaled_logits", 10),
        (comparison.check_more_steps, "more_steps", 5),
        (comparison.check_more_restarts, "more_restarts", 5),
        (lambda robust, single: comparison.check_single_step(single, robust), "single_step_attack", 0),
        (comparison.check_noise, "random_noise", 0),
        (lambda robust, square: comparison.check_gradient_free(robust, square, 300), "gradient_free_attack", 2),
        (comparison.check_transfer, "transfer_attack", 0),
    ],
)
def test_two_attacks_may_differ_by_the_limit_at_most(check, rule, most):
    within, beyond = (check(mask(500), mask(500 - fewer)) for fewer in (most, most + 1))
    assert within.passed
    assert within.figure == most / 1000
    assert beyond.passed is False
    assert beyond.figure == (most + 1) / 1000
    assert within.id == beyond.id == rule
    assert beyond.level == ("trust" if rule in TRUST else "note")
    assert trustworthy([within])
    assert trustworthy([beyond]) == (rule not in TRUST)
    assert check(mask(0, 0), mask(0, 0)).passed is None
    with pytest.raises(UsageError, match=r"cannot be compared"):
        check(mask(1), mask(1, 3))


def test_newly_broken_images_count_even_at_equal_accuracy():
    """Two attacks of equal accuracy may break different images."""
    ours, theirs = torch.tensor([True, False, True]), torch.tensor([False, True, True])
    assert comparison.check_transfer(ours, theirs).figure == pytest.approx(1 / 3)
    assert comparison.check_single_step(theirs, ours).figure == pytest.approx(1 / 3)
    assert comparison.check_more_restarts(ours, theirs).figure == 0  # accuracies are compared there


def test_the_loss_comparison_is_two_sided():
    assert (
        comparison.check_losses(mask(500), mask(600)).figure
        == comparison.check_losses(mask(600), mask(500)).figure
        == 0.1
    )
    assert comparison.check_rescaled_logits(mask(500), mask(600)).figure == 0


def test_the_gradient_free_check_needs_300_queries():
    found = comparison.check_gradient_free(mask(5), mask(5), 299)
    assert found.passed is None
    assert "299" in found.reason
    assert "300" in found.reason


def test_the_loss_has_converged_if_it_rises_little_for_95_per_cent():
    earlier = torch.zeros(100)
    rises = torch.full((100,), 0.04)
    rises[:5] = 1.0
    assert comparison.check_loss_convergence(earlier, rises).passed
    rises[5] = torch.nan
    found = comparison.check_loss_convergence(earlier, rises)
    assert found.passed is False
    assert found.figure == 0.94
    assert comparison.check_loss_convergence(earlier[:0], rises[:0]).passed is None


def test_robust_counts_must_fall_with_eps_and_end_at_zero():
    rises, end = comparison.check_eps_curve({0.5: 0, 0.1: 40, 0.2: 30, 0.4: 30}, covering_eps=0.5)
    assert rises.passed
    assert end.passed
    rises, end = comparison.check_eps_curve({0.1: 40, 0.2: 30, 0.4: 33, 0.5: 2}, covering_eps=0.5)
    assert rises.passed is False
    assert rises.figure == 3
    assert end.passed is False
    assert end.figure == 2
    rises, end = comparison.check_eps_curve({0.1: 40}, covering_eps=0.5)
    assert rises.passed
    assert end.passed is None
    assert "0.1" in end.reason
    assert [check.passed for check in comparison.check_eps_curve({}, 0.5)] == [None, None]


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_the_grey_covering_radius_is_the_distance_of_a_corner_to_grey(norm):
    corner = torch.zeros(1, 3, 4, 4)
    radius = grey_covering_eps(threat_model(norm, 0.1), corner)
    assert radius == pytest.approx(float(threat_model(norm, 0.1).distance(corner + 0.5, corner)))


def test_criteria_state_their_limits():
    assert comparison.check_losses(mask(1), mask(1)).criterion.endswith("by at most 0.03")
    assert all("{" not in check.criterion for check in checked(network_of("vgg-robust")))


# --- the table of rules


def test_identifiers_are_unique_snake_case_names():
    rules = (*check_rules._NETWORK_RULES, *check_rules._COMPARISON_RULES, *check_rules._WORST_CASE_RULES)
    rules += check_rules._GATE_RULES
    assert len({rule.id for rule in rules}) == len(rules) == len(RULES)
    assert all(rule.id.isidentifier() and rule.id == rule.id.lower() for rule in rules)
    assert all(RULES[rule.id] is rule for rule in rules)
    assert {rule.id for rule in rules if rule.level == "trust"} == TRUST | set(OBJECTIVE_CHECKS)


def test_the_manual_documents_every_rule():
    rows = [line for line in (ROOT / "docs/attacks.md").read_text().splitlines() if line.startswith("| `")]
    criteria = {rule: rule.criterion.format(limit=rule.limit) for rule in RULES.values()}
    assert rows == [
        f"| `{rule.id}` | {rule.name} | {rule.level} | {criterion} | {rule.failure} |"
        for rule, criterion in criteria.items()
    ]


def test_every_rule_is_used_by_the_code():
    code = "".join(path.read_text() for path in (ROOT / "audit").rglob("*.py") if path.name != "check_rules.py")
    assert [rule for rule in RULES if f'"{rule}"' not in code] == []
