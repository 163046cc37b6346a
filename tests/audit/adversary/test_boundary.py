"""Networks that change their input, modes and types of torch in the caller's process, and kinds of arguments."""

import copy
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.external import gradient_free_attack
from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.minimum_norm import DDN, CarliniWagner, carlini_wagner, ddn
from audit.adversary.passes import frozen_parameters, gradient_or_none, input_gradient, log_probabilities, row_lengths
from audit.adversary.pgd import PGD, minimise
from audit.adversary.robustness import TargetModel, compare_attacks, evaluate_robustness, measure_eps_curve
from audit.adversary.single_attacks import run_attack
from audit.adversary.threat import L1, L2, Linf
from audit.errors import InvalidModelError, MismatchError
from audit.information.estimator import ESTIMATORS, EstimatorInputs
from audit.representation.layers import Representation, features_of_layers
from audit.types import ObjectiveValue, as_images, as_labels, standard_torch_state

THREATS = {"linf": Linf(0.04), "l2": L2(0.25), "l1": L1(1.0)}
EASY = LabelAttack((Stage("ce", PGD(6)), Stage("margin", PGD(12, 0.1)), Stage("targeted", PGD(3), targets=2)), noise=3)
ATTACKS = {"linf": EASY, "l2": replace(EASY, queries=40), "l1": replace(EASY, queries=40)}


class Small(nn.Module):
    """A convolution and a linear layer on prepared pixels; weights are drawn from a seed, in float32."""

    def __init__(self, prepare=lambda images: images, scale=1.0, head=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), standard_torch_state():
            torch.manual_seed(0)
            self.conv, self.norm, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 3)
            self.linear.weight.requires_grad_(False).mul_(10)
            self.linear.weight.requires_grad_(True)
        self.prepare, self.scale, self.head = prepare, scale, head
        self.eval()

    def forward(self, images):
        maps = self.norm(self.conv(self.prepare(images))).relu()
        return self.linear(maps.flatten(1)) * self.scale


def data(count=40):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    with torch.no_grad():
        return images, Small()(images).argmax(1)


IMAGES, LABELS = data()


def normalised_in_place(images):
    return images.sub_(0.4).div_(0.3).mul_(0.3).add_(0.4)


def clipped_in_place(images):
    images[:, :, :2] = 0.5
    return images


def relu_in_place(images):
    return F.relu(images.sub_(0.3), inplace=True)


def as_copies(prepare):
    return lambda images: prepare(images.clone())


@pytest.mark.parametrize("prepare", [normalised_in_place, clipped_in_place, relu_in_place])
class TestNetworksThatChangeTheirInput:
    """Right values: those of the same network on copies that it makes itself."""

    @pytest.fixture
    def pair(self, prepare):
        images = IMAGES.clone()
        labels = Small(as_copies(prepare))(images).argmax(1)
        return [(TargetModel(Small(change), images, labels), images) for change in (prepare, as_copies(prepare))]

    @pytest.mark.parametrize("norm", THREATS)
    def test_attacks_and_checks(self, pair, norm):
        found = []
        for target, images in pair:
            robustness = evaluate_robustness(target, THREATS[norm], ATTACKS[norm], 0)
            curve = measure_eps_curve(target, THREATS[norm], 0, (0.5, 1.0))
            checks = compare_attacks(target.subset(torch.arange(9)), THREATS[norm], EASY, 0)
            outcome = robustness.accuracy.outcome
            found.append((outcome.margin, outcome.images, curve.smallest, robustness.checks, checks))
            assert torch.equal(images, IMAGES)
        for ours, wanted in zip(*(each[:3] for each in found), strict=True):
            assert torch.equal(ours, wanted)
        assert found[0][3:] == found[1][3:]
        assert 0 < int((found[0][0] > 0).sum()) < 40

    @pytest.mark.parametrize("name", ["ddn", "pgd"])
    def test_single_attacks(self, pair, name):
        ours, wanted = (run_attack(name, target, L2(0.25), 0) for target, _ in pair)
        assert torch.equal(ours.robust, wanted.robust)
        assert torch.equal(pair[0][1], IMAGES)

    @pytest.mark.parametrize("layer", ["input", "conv", "linear", "logits"])
    def test_layers(self, pair, layer):
        ours, wanted = (features_of_layers(target.network, [layer], images, 7)[layer] for target, images in pair)
        assert torch.equal(ours, wanted)
        assert torch.equal(pair[0][1], IMAGES)

    @pytest.mark.parametrize("name", ["sandwich", "label-level"])
    def test_worst_cases(self, pair, name):
        found = []
        for target, images in pair:
            inputs = EstimatorInputs(Representation(target.network, "logits").encode, images, target.labels)
            found.append(ESTIMATORS[name].vulnerability(inputs, Linf(0.04), 1))
            assert torch.equal(images, IMAGES)
        assert (found[0].normal, found[0].worst) == (found[1].normal, found[1].worst)
        assert torch.equal(found[0].adversarial, found[1].adversarial)


@contextmanager
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "float64": float64_by_default,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def numbers(network, images, labels):
    """Every kind of measurement, as one list of tensors and plain values."""
    target, found = TargetModel(network, images, labels), []
    for norm, threat in THREATS.items():
        accuracy = evaluate_robustness(target, threat, ATTACKS[norm], 0)
        found += [accuracy.accuracy.outcome.margin, accuracy.accuracy.outcome.images, accuracy.checks]
    found.append(compare_attacks(target.subset(torch.arange(9)), THREATS["linf"], EASY, 0))
    found.append(measure_eps_curve(target, THREATS["l1"], 0, (0.5, 1.0)).smallest)
    found.append(carlini_wagner(network, images, labels, CarliniWagner(10, 2)).norms)
    found.append(ddn(network, images, labels, DDN(10)).norms)
    found.append(gradient_free_attack(THREATS["l1"], 80)(network, images, labels, THREATS["l1"], 0).images)
    inputs = EstimatorInputs(Representation(network, "logits").encode, images, labels)
    for name in ("sandwich", "label-level"):
        worst = ESTIMATORS[name].vulnerability(inputs, THREATS["l2"], 1)
        found += [worst.normal, worst.worst, worst.adversarial, ESTIMATORS[name].normal(inputs, 1)]
    return found


@pytest.fixture(scope="module")
def usual():
    return numbers(Small(), IMAGES, LABELS)


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("state", STATES)
def test_numbers_do_not_depend_on_the_callers_state(state, usual):
    network = Small()
    with STATES[state]():
        found = numbers(network, IMAGES, LABELS)
    assert_equal(found, usual)
    assert torch.get_default_dtype() == torch.float32


def test_networks_and_images_made_under_inference_mode(usual):
    network = Small()
    with torch.inference_mode():
        network, images, labels = copy.deepcopy(network), IMAGES.clone(), LABELS.clone()
    assert all(each.is_inference() for each in (*network.parameters(), images, labels))
    robustness = evaluate_robustness(TargetModel(network, images, labels), THREATS["linf"], EASY, 0)
    assert_equal([robustness.accuracy.outcome.margin, robustness.accuracy.outcome.images, robustness.checks], usual[:3])


@pytest.mark.parametrize("kind", ["requires grad", "part of a graph", "numpy", "float64 numpy", "read-only", "lists"])
def test_kinds_of_arguments(kind, usual):
    read_only = IMAGES.numpy().copy()
    read_only.setflags(write=False)
    images, labels = {
        "requires grad": (IMAGES.clone().requires_grad_(), LABELS),
        "part of a graph": (IMAGES.clone().requires_grad_() * 1.0, LABELS),
        "numpy": (IMAGES.numpy(), LABELS.numpy()),
        "float64 numpy": (IMAGES.double().numpy(), LABELS.numpy().astype(np.uint8)),
        "read-only": (read_only, LABELS.int()),
        "lists": (IMAGES.tolist(), LABELS.tolist()),
    }[kind]
    found = evaluate_robustness(TargetModel(Small(), images, labels), THREATS["linf"], EASY, 0).accuracy.outcome
    assert_equal([found.margin, found.images], usual[:2])
    assert not found.images.requires_grad
    measured = measure_accuracy(Small(), images, labels, THREATS["linf"], EASY, 0)
    assert torch.equal(measured.outcome.margin, usual[0])


def test_arguments_that_are_no_numbers_are_named():
    with pytest.raises(MismatchError, match=r"images are a str that is no array of numbers; legal: a tensor, a NumPy"):
        TargetModel(Small(), "photos", LABELS)
    with pytest.raises(MismatchError, match="images are a list that is no array of numbers"):
        as_images([[0.1, 0.2], [0.3]])
    with pytest.raises(MismatchError, match="labels are a list that is no array of numbers"):
        as_labels(["cat", "dog"])
    with pytest.raises(MismatchError, match="images are a NoneType that is no array of numbers"):
        as_images(None)


def test_types_of_arguments():
    assert as_images(np.array([[[[0.5]]]])).dtype == torch.float32
    assert as_images(np.array([[[[7]]]], dtype=np.uint8)).dtype == torch.uint8
    assert as_images(torch.zeros(1, 1, 1, 1, dtype=torch.float64)).dtype == torch.float64
    assert as_images(np.arange(4, dtype=">f4").reshape(1, 1, 2, 2)).tolist() == [[[[0, 1], [2, 3]]]]
    assert [as_labels(kind([2, 0])).tolist() for kind in (list, tuple, np.array, torch.tensor)] == [[2, 0]] * 4
    assert as_labels(np.array([1, 2], dtype=np.uint16)).dtype == torch.int64
    assert as_labels([0.5, 1.0]).dtype == torch.float64  # not cut to integers


class Autocast(nn.Module):
    """Small networks whose forward passes use lower precision for all, for the head, or for the features alone."""

    def __init__(self, where):
        super().__init__()
        self.inner, self.where = Small(), where
        self.eval()

    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.where != "features"):
            if self.where == "all":
                return self.inner(images)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.where == "features"):
            maps = self.inner.norm(self.inner.conv(images)).relu().flatten(1)
        maps = maps.to(self.inner.linear.weight)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.where == "head"):
            return self.inner.linear(maps)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("where", ["all", "features", "head"])
def test_networks_that_use_autocast(where, norm):
    network = Autocast(where)
    with torch.no_grad():
        logits = network(IMAGES).float()
    outcome = measure_accuracy(network, IMAGES, logits.argmax(1), THREATS[norm], EASY, 0).outcome
    assert outcome.margin.dtype == torch.float32
    with torch.no_grad():
        moved = network(outcome.images).float()
    others = moved.scatter(1, logits.argmax(1)[:, None], -torch.inf).amax(1)
    margins = moved.gather(1, logits.argmax(1)[:, None])[:, 0] - others
    torch.testing.assert_close(outcome.margin, margins)
    assert 0 < int((margins > 0).sum()) < 40
    for layer in ("inner.conv", "inner.linear", "logits"):
        features = Representation(network, layer)(IMAGES)
        assert features.dtype == torch.float32
    inputs = EstimatorInputs(Representation(network, "logits").encode, IMAGES, LABELS)
    worst = ESTIMATORS["sandwich"].vulnerability(inputs, THREATS[norm], 1)
    assert worst.worst.nats < worst.normal.nats


class Checkpointed(nn.Module):
    """A small network whose convolution, head, or both are computed again in the backward pass."""

    def __init__(self, where, *, reentrant):
        super().__init__()
        self.inner, self.where, self.reentrant = Small(), where, reentrant
        self.eval()

    def forward(self, images):
        maps = self.part("conv", lambda x: self.inner.norm(self.inner.conv(x)).relu().flatten(1), images)
        return self.part("head", self.inner.linear, maps)

    def part(self, name, function, values):
        if self.where in (name, "both"):
            return checkpoint(function, values, use_reentrant=self.reentrant)
        return function(values)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of passes without gradients
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["conv", "head", "both"])
def test_checkpoints_change_nothing(where, reentrant, usual):
    network = Checkpointed(where, reentrant=reentrant)
    target = TargetModel(network, IMAGES, LABELS)
    robustness = evaluate_robustness(target, THREATS["l2"], EASY, 0)
    plain = evaluate_robustness(TargetModel(Small(), IMAGES, LABELS), THREATS["l2"], EASY, 0)
    # a fused copy of the plain network rounds otherwise
    assert torch.equal(robustness.accuracy.robust, plain.accuracy.robust)
    assert [check.passed for check in robustness.checks] == [check.passed for check in plain.checks]
    inputs = EstimatorInputs(Representation(network, "logits").encode, IMAGES, LABELS)
    worst = ESTIMATORS["sandwich"].vulnerability(inputs, THREATS["l2"], 1)
    at = [index for index, each in enumerate(usual) if each == worst.normal]
    assert at
    assert worst.worst == usual[at[0] + 1]
    # backward passes through reentrant checkpoints reach parameters, which are frozen meanwhile
    assert all(each.grad is None and each.requires_grad for each in network.inner.conv.parameters())


def test_a_layer_inside_a_reentrant_checkpoint_is_refused_with_a_reason():
    representation = Representation(Checkpointed("conv", reentrant=True), "inner.conv")
    leaf = IMAGES.clone().requires_grad_()
    with pytest.raises(InvalidModelError, match=r"torch.utils.checkpoint with use_reentrant=True"):
        input_gradient(representation(leaf).sum(), leaf)


def test_gradients_through_checkpoints_keep_what_the_leaf_holds():
    network, leaf = Checkpointed("both", reentrant=True), IMAGES.clone().requires_grad_()
    leaf.grad = torch.ones_like(leaf)
    with frozen_parameters(network):
        features = network(leaf)
        weights = torch.ones_like(features)
        first = gradient_or_none(features, leaf, weights, keep=True)
        second = gradient_or_none(features, leaf, 2 * weights)
    plain = IMAGES.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(Small()(plain).sum(), plain)
    torch.testing.assert_close(first, wanted)
    torch.testing.assert_close(second, 2 * wanted)
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_parameters_are_thawed_when_the_last_measurement_ends():
    network = Small()
    network.norm.weight.requires_grad_(False)
    with ExitStack() as first:
        first.enter_context(frozen_parameters(network))
        second = ExitStack()
        second.enter_context(frozen_parameters(network))
        assert not any(each.requires_grad for each in network.parameters())
    assert not any(each.requires_grad for each in network.parameters())
    second.close()
    assert [name for name, each in network.named_parameters() if not each.requires_grad] == ["norm.weight"]


def test_two_threads_measure_one_network():
    """Hooks, traces and the default type are shared by threads; results must not be."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    layers = ["0", "1", "2", "4"]

    def work(layer):
        representation = Representation(network, layer)
        inputs = EstimatorInputs(representation.encode, IMAGES, LABELS)
        worst = ESTIMATORS["sandwich"].vulnerability(inputs, THREATS["linf"], 1)
        accuracy = measure_accuracy(network, IMAGES, LABELS, THREATS["linf"], EASY, 0)
        return worst.normal.nats, worst.worst.nats, accuracy.outcome.margin

    wanted, found, errors = [work(layer) for layer in layers], {}, []

    def run(layer):
        try:
            found[layer] = work(layer)
        except BaseException as error:  # shown below
            errors.append(error)

    for _ in range(2):
        threads = [threading.Thread(target=run, args=(layer,)) for layer in layers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        for layer, values in zip(layers, wanted, strict=True):
            assert found[layer][:2] == values[:2]
            assert torch.equal(found[layer][2], values[2])


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.bfloat16])
def test_the_default_type_is_restored_when_the_last_thread_ends(default):
    inside, release, seen = threading.Barrier(2), threading.Event(), []

    def longer():
        with standard_torch_state():
            inside.wait()
            release.wait()
            seen.append(torch.get_default_dtype())

    torch.set_default_dtype(default)
    try:
        thread = threading.Thread(target=longer)
        thread.start()
        with standard_torch_state():
            inside.wait()
        release.set()
        thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", [1e20, 1e-30, 1e-12])
def test_outputs_of_extreme_scale(scale):
    """The scale is a power of two: right values are those at scale one, but for what enters rounding."""
    scale = 2.0 ** round(np.log2(scale))
    target, margins = TargetModel(Small(scale=scale), IMAGES, LABELS), LabelAttack((Stage("margin", PGD(20)),))
    plain, scaled = (
        measure_accuracy(each, IMAGES, LABELS, THREATS["l2"], margins, 0) for each in (Small(), target.network)
    )
    assert torch.equal(scaled.robust, plain.robust)
    torch.testing.assert_close(scaled.outcome.margin / scale, plain.outcome.margin, rtol=1e-5, atol=1e-5)
    for name, relative in (("sandwich", 1e-3), ("label-level", 0.0)):
        found = []
        for network in (Small(), target.network):
            inputs = EstimatorInputs(Representation(network, "logits").encode, IMAGES, LABELS)
            found.append(ESTIMATORS[name].vulnerability(inputs, THREATS["linf"], 1))
        assert found[1].normal.nats == pytest.approx(found[0].normal.nats, rel=relative)
        assert found[0].normal.nats > 0.1
        if name == "sandwich":
            assert found[1].worst.nats == pytest.approx(found[0].worst.nats, rel=0.02)
        else:
            assert found[1].worst.nats < found[1].normal.nats


def test_small_and_large_rows():
    rows = torch.tensor([[3e20, 4e20], [3e-30, 4e-30], [3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(row_lengths(rows)[:, 0], torch.tensor([5e20, 5e-30, 5.0, 0.0]))
    logits = torch.tensor([[1e-30, 3e-30, 2e-30], [1.0, 3.0, 2.0], [7.0, 7.0, 7.0], [1e20, 3e20, 2e20]])
    found = log_probabilities(logits)
    assert found.argmax(1).tolist() == [1, 1, 0, 1]
    assert torch.equal(found[1], logits[1].log_softmax(0))
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4))


@pytest.mark.parametrize(("norm", "kind"), [("l2", L2), ("l1", L1)])
@pytest.mark.parametrize("times", [1.5, 1e4])
def test_radii_beyond_the_diameter_are_all_the_same(norm, kind, times):
    """Every image is then legal: any image breaks that the network classifies otherwise than some other image."""
    diameter = {"l2": 8.0, "l1": 64.0}[norm]
    threat, target = kind(times * diameter), TargetModel(Small(), IMAGES, LABELS)
    found = evaluate_robustness(target, threat, EASY, 0)
    wanted = evaluate_robustness(target, kind(diameter), EASY, 0)
    assert torch.equal(found.accuracy.outcome.images, wanted.accuracy.outcome.images)
    assert found.checks == wanted.checks
    assert int(found.accuracy.robust.sum()) == 0
    inputs = EstimatorInputs(Representation(target.network, "logits").encode, IMAGES, LABELS)
    ours, theirs = (ESTIMATORS["sandwich"].vulnerability(inputs, each, 1) for each in (threat, kind(diameter)))
    assert ours.worst == theirs.worst
    assert ours.worst.nats < 0.5 * ours.normal.nats


def test_a_search_of_ones_own_sees_all_states_at_their_standard():
    seen = []

    def objective(images, index):
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
        return ObjectiveValue(images.flatten(1).sum(1), torch.zeros(len(index), dtype=torch.bool))

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = minimise(objective, IMAGES.clone(), Linf(0.1), PGD(4), torch.Generator().manual_seed(0))
    assert [grad for grad, _, _ in seen] == [False, True, True, True, True, False]  # the clean and the last images
    assert {state[1:] for state in seen} == {(False, torch.float32)}
    assert bool((found.images < IMAGES).any())
