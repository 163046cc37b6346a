"""Objectives of hypothesis networks, information elimination, and training."""

from math import exp, log, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.errors import InvalidModelError, MismatchError, UnknownNameError, UsageError
from audit.information.bounds import donsker_varadhan_of, energy_of, jensen_shannon_of
from audit.random_keys import keyed_generator
from audit.training.label_hypothesis import (
    OBJECTIVES,
    HypothesisTraining,
    energy,
    label_pairs,
    train_hypothesis,
    training_loss,
)
from audit.training.mmd import information_elimination, mmd2
from model_zoo.architectures.hypothesis_baselines import VIB, PlainCNN
from model_zoo.architectures.hypothesis_net import HypothesisNet

SHAPE = (1, 8, 8)
JOINT = torch.tensor([[0.20, 0.05, 0.05], [0.02, 0.18, 0.10], [0.05, 0.05, 0.10], [0.08, 0.02, 0.10]]).double()


def drawn(count, classes=10, seed=1):
    generator = keyed_generator(seed)
    labels = torch.arange(count) % classes
    images = 0.3 * torch.rand(count, *SHAPE, generator=generator)
    images[torch.arange(count), 0, labels % 8, labels // 8] += 0.6  # one bright pixel encodes the label
    return images, labels


def fresh(kind=HypothesisNet, seed=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(SHAPE, 10)


@pytest.mark.parametrize("classes", [2, 10])
def test_the_energy_objective_is_negative_cross_entropy_plus_a_constant(classes):
    generator = keyed_generator(classes)
    scores = (5 * torch.randn(40, classes, generator=generator)).double().requires_grad_()
    labels = torch.randint(classes, (40,), generator=generator)
    value, entropy = energy(scores, labels), F.cross_entropy(scores, labels)
    torch.testing.assert_close(value, log(classes) - entropy)
    torch.testing.assert_close(*(torch.autograd.grad(each, scores)[0] for each in (value, -entropy)))


def test_joint_pairs_use_the_label_and_product_pairs_all_labels():
    scores, labels = torch.arange(6.0).view(2, 3), torch.tensor([2, 0])
    pairs = label_pairs(scores, labels)
    assert pairs.joint.tolist() == [2.0, 3.0]
    assert torch.equal(pairs.product, scores)
    expected = 2.5 - log(sum(exp(s) for s in range(6)) / 6)
    assert float(donsker_varadhan_of(pairs)) == pytest.approx(expected, abs=1e-6)
    sigmoid = [1 / (1 + exp(-s)) for s in range(6)]
    expected = (log(sigmoid[2]) + log(sigmoid[3])) / 2 + sum(log(1 - s) for s in sigmoid) / 6
    assert float(jensen_shannon_of(pairs)) == pytest.approx(2 * log(2) + expected, abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "invariance"), [("jensen-shannon", "none"), ("donsker-varadhan", "constant"), ("energy", "image")]
)
def test_the_optimum_of_an_objective_is_the_density_ratio(objective, invariance):
    """Optimise a table T(x, y) on a discrete joint distribution, with exact expectations."""
    product = JOINT.sum(1, keepdim=True) / 3  # p(x) times a uniform label
    table = torch.zeros_like(JOINT).requires_grad_()
    optimiser = torch.optim.LBFGS([table], max_iter=300, tolerance_grad=1e-10, tolerance_change=0)

    def loss():
        optimiser.zero_grad()
        value = -OBJECTIVES[objective](*cells(table))
        value.backward()
        return value

    def cells(table):
        """100 samples with exactly the frequencies of the joint distribution."""
        counts = (100 * JOINT).round().long()
        rows = torch.arange(4).repeat_interleave(counts.sum(1))
        return table[rows], torch.cat([torch.arange(3).repeat_interleave(each) for each in counts])

    optimiser.step(loss)
    ratio = (JOINT / product).log()
    found = table.detach() - ratio
    if invariance == "constant":
        found = found - found.mean()
    if invariance == "image":
        found = found - found.mean(1, keepdim=True)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-4, rtol=0)
    if invariance != "none":
        value = float(OBJECTIVES[objective](*cells(table.detach())))
        assert value == pytest.approx(float((JOINT * ratio).sum()), abs=1e-6)  # the divergence


@pytest.mark.parametrize("shift", ["constant", "image"])
def test_invariances_of_each_objective(shift):
    generator = keyed_generator(4)
    scores = torch.randn(20, 5, generator=generator).double()
    moved = scores + (2.0 if shift == "constant" else torch.randn(20, 1, generator=generator).double())
    labels = torch.randint(5, (20,), generator=generator)
    pairs, others = label_pairs(scores, labels), label_pairs(moved, labels)
    torch.testing.assert_close(energy_of(pairs), energy_of(others))
    same = torch.isclose(donsker_varadhan_of(pairs), donsker_varadhan_of(others), atol=1e-9)
    assert bool(same) is (shift == "constant")
    assert not torch.isclose(jensen_shannon_of(pairs), jensen_shannon_of(others), atol=1e-3)


def gaussian_mmd2(shift, first, second, width, dimension):
    """The squared MMD of N(0, first^2 I) and N(shift, second^2 I) in closed form."""

    def mean_kernel(gap, variance):
        spread = width**2 + variance
        return (width**2 / spread) ** (dimension / 2) * exp(-dimension * gap**2 / (2 * spread))

    own = mean_kernel(0, 2 * first**2) + mean_kernel(0, 2 * second**2)
    return own - 2 * mean_kernel(shift, first**2 + second**2)


@pytest.mark.parametrize(("shift", "second"), [(0.0, 1.0), (0.8, 1.0), (0.0, 2.0)], ids=["equal", "shifted", "wider"])
def test_mmd_is_unbiased_on_gaussians(shift, second):
    generator, values = keyed_generator(8), []
    for _ in range(1500):
        first = torch.randn(7, 3, generator=generator).double()
        other = shift + second * torch.randn(9, 3, generator=generator).double()
        values.append(mmd2(first, other, 1.3))
    found = torch.stack(values)
    truth = gaussian_mmd2(shift, 1.0, second, 1.3, 3)
    assert (truth == pytest.approx(0, abs=1e-12)) is (shift == 0 and second == 1)
    error = float(found.std()) / sqrt(len(found))
    assert abs(float(found.mean()) - truth) < 4 * error
    # the biased estimate, which compares samples with themselves, would fail by a wide margin
    assert 4 * error < (1 / 7 + 1 / 9) / 4


def test_elimination_is_unbiased_and_zero_without_label_information():
    """Label 0 is shifted; its discrepancy to the mixture of all is (1 - p)^2 times that to the others."""
    generator, chances = keyed_generator(9), torch.tensor([0.3, 0.25, 0.45]).double()
    plain, moved, weights = [], [], []
    for _ in range(1500):
        labels = torch.multinomial(chances, 20, replacement=True, generator=generator)
        noise = torch.randn(20, 3, generator=generator).double()
        plain.append(information_elimination(noise, labels, 1.3))
        moved.append(information_elimination(noise + 0.9 * (labels == 0)[:, None], labels, 1.3))
        counts = labels.bincount(minlength=3)
        # label 0 is a fraction q of the others of labels 1 and 2, whose discrepancy is q^2 times that of the shift
        fractions = torch.tensor([1.0, 0.3 / 0.75, 0.3 / 0.55])
        weights.append(((1 - counts / 20) * fractions).square()[(counts >= 2) & (counts <= 18)].sum())
    truth = float(torch.stack(weights).mean()) * gaussian_mmd2(0.9, 1.0, 1.0, 1.3, 3)
    for values, expected in ((torch.stack(plain), 0.0), (torch.stack(moved), truth)):
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / sqrt(len(values))
    assert truth > 10 * float(torch.stack(moved).std()) / sqrt(1500)


def test_elimination_is_the_sum_over_labels_and_skips_labels_of_one_image():
    representation = torch.randn(9, 4, generator=keyed_generator(3)).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 5])
    expected = sum(
        (1 - count / 9) ** 2 * mmd2(representation[labels == label], representation[labels != label], 0.7)
        for label, count in ((0, 3), (1, 4))
    )
    torch.testing.assert_close(information_elimination(representation, labels, 0.7), expected)
    assert float(information_elimination(representation[:4], torch.tensor([0, 0, 0, 1]), 0.7)) == 0


def test_the_bandwidth_is_the_median_distance_without_a_gradient():
    representation = torch.tensor([[0.0], [1.0], [3.0], [7.0]]).double().requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    penalty = information_elimination(representation, labels)
    torch.testing.assert_close(penalty, information_elimination(representation, labels, 3.0))  # median of 1 2 3 4 6 7
    torch.testing.assert_close(
        torch.autograd.grad(penalty, representation)[0],
        torch.autograd.grad(information_elimination(representation, labels, 3.0), representation)[0],
    )
    same = torch.ones(6, 2).requires_grad_()
    collapsed = information_elimination(same, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert float(collapsed.detach()) == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(collapsed, same)[0]).all()


def test_mmd_needs_two_samples_a_side():
    with pytest.raises(UsageError, match="MMD of 1 and 5 samples: each side needs at least 2"):
        mmd2(torch.zeros(1, 2), torch.zeros(5, 2), 1.0)


def test_the_gradient_of_elimination_reaches_only_the_first_two_dense_layers():
    images, labels = drawn(40)
    network, noise = fresh().train(), keyed_generator(0)
    gradients = {}
    for weight in (0.0, 2.0):
        training = HypothesisTraining("jensen-shannon", elimination=weight)
        network.zero_grad()
        # with equal batch statistics, only the penalty differs
        training_loss(network, images, labels, training, noise).backward()
        gradients[weight] = {name: part.grad.clone() for name, part in network.named_parameters()}
    moved = {name for name, grad in gradients[2.0].items() if not torch.allclose(grad, gradients[0.0][name], atol=1e-9)}
    assert {name.partition(".")[0] for name in moved} == {"fc1", "fc2"}
    assert moved == {name for name, _ in network.named_parameters() if name.startswith(("fc1", "fc2"))}


@pytest.mark.parametrize("objective", ["jensen-shannon", "donsker-varadhan", "energy", "cross-entropy"])
def test_training_learns(objective):
    images, labels = drawn(300)
    network, received = fresh(), []
    training = HypothesisTraining(objective, epochs=8, batch_size=50)
    train_hypothesis(network, images, labels, training, lambda epoch, loss: received.append((epoch, loss)))
    assert [epoch for epoch, _ in received] == list(range(8))
    assert received[-1][1] < received[0][1]
    assert not network.training
    fresh_images, fresh_labels = drawn(200, seed=2)
    assert float((network(fresh_images).argmax(1) == fresh_labels).double().mean()) > 0.9


def test_elimination_removes_label_information_from_the_second_layer():
    images, labels = drawn(300)
    penalties = []
    for weight in (0.0, 3.0):
        network = fresh()
        train_hypothesis(network, images, labels, HypothesisTraining(epochs=8, batch_size=100, elimination=weight))
        second = network.representation(network.front(images), labels[:, None]).flatten(1)
        penalties.append(float(information_elimination(second, labels).detach()))
    assert penalties[1] < penalties[0] / 2


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        (HypothesisNet, HypothesisTraining("donsker-varadhan", elimination=1.0, epochs=4, batch_size=50)),
        (VIB, HypothesisTraining("cross-entropy", kl_weight=1e-3, epochs=4, batch_size=50)),
        (PlainCNN, HypothesisTraining("cross-entropy", epochs=4, batch_size=50)),
    ],
    ids=["hypothesis", "vib", "cnn"],
)
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(kind, training, tmp_path):
    images, labels = drawn(120)
    uninterrupted, stopped, resumed = fresh(kind), fresh(kind), fresh(kind)
    train_hypothesis(uninterrupted, images, labels, training)

    def kill(epoch, _loss):
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_hypothesis(stopped, images, labels, training, kill, tmp_path / "run.pt")
    epochs = []
    train_hypothesis(resumed, images, labels, training, lambda epoch, _: epochs.append(epoch), tmp_path / "run.pt")
    assert epochs == [2, 3]
    expected = uninterrupted.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(UsageError, match="another run"):
        train_hypothesis(fresh(kind), images.flip(0), labels, training, checkpoint_path=tmp_path / "run.pt")
    with pytest.raises(UsageError, match="another run"):
        train_hypothesis(fresh(kind, seed=6), images, labels, training, checkpoint_path=tmp_path / "run.pt")


def test_elimination_starts_after_the_warm_up():
    images, labels = drawn(40)
    seen: dict[str, list[torch.Tensor]] = {}
    for name, weight in (("none", 0.0), ("warm", 1.0)):
        network, states = fresh(), []
        training = HypothesisTraining(elimination=weight, warm_up=0.5, epochs=4, batch_size=20)
        keep = lambda *_, n=network, s=states: s.append(n.fc1.linear.of_image.weight.detach().clone())  # noqa: E731
        train_hypothesis(network, images, labels, training, keep)
        seen[name] = states
    same = [torch.equal(*pair) for pair in zip(seen["none"], seen["warm"], strict=True)]
    assert same == [True, True, False, False]


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    images, labels = drawn(120)
    torch.manual_seed(3)
    before, ends = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        network = fresh()
        train_hypothesis(network, images, labels, HypothesisTraining(epochs=1, batch_size=40, seed=seed))
        ends.append(network.out.weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kl_weight_reduces_the_divergence():
    images, labels = drawn(200)
    divergences = []
    for weight in (1e-4, 1.0):
        network = fresh(VIB)
        training = HypothesisTraining("cross-entropy", kl_weight=weight, epochs=8, batch_size=50)
        train_hypothesis(network, images, labels, training)
        divergences.append(float(network.sample(images, keyed_generator(0)).kl_nats.detach()))
    assert divergences[1] < divergences[0] / 2


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"objective": "jensen-shanon"}, UnknownNameError, "unknown objective 'jensen-shanon'; did you mean 'jensen-"),
        ({"epochs": 201}, UsageError, "epochs 201 must be between 1 and 200"),
        ({"warm_up": 1.0}, UsageError, "warm_up 1.0 must be a fraction of the epochs, at least 0 and below 1"),
        ({"epochs": 0}, UsageError, "epochs 0 must be between 1 and 200"),
        ({"batch_size": 1}, UsageError, "batch size 1 must be at least 2"),
        ({"elimination": -1.0}, UsageError, "elimination -1.0 must be finite and at least 0"),
        ({"kl_weight": float("nan")}, UsageError, "kl_weight nan must be finite and at least 0"),
        ({"learning_rate": 0.0}, UsageError, "learning rate 0.0 must be"),
    ],
)
def test_illegal_settings_are_refused(settings, kind, message):
    with pytest.raises(kind, match=message):
        HypothesisTraining(**settings)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        (PlainCNN, {"elimination": 1.0}, "PlainCNN takes no label hypothesis"),
        (HypothesisNet, {"kl_weight": 1.0}, "HypothesisNet has no stochastic encoder"),
    ],
)
def test_settings_that_the_network_does_not_support_are_refused(kind, weights, message):
    images, labels = drawn(20)
    with pytest.raises(MismatchError, match=message):
        train_hypothesis(fresh(kind), images, labels, HypothesisTraining(**weights))


def test_a_loss_that_is_not_finite_is_an_error():
    images, labels = drawn(40)
    images[3] = float("nan")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    training = HypothesisTraining("cross-entropy", epochs=3, batch_size=20)
    with pytest.raises(InvalidModelError, match="the loss of epoch 1 is nan"):
        train_hypothesis(network, images, labels, training)
