"""External attacks: closed forms on linear networks, legal candidates, and an unchanged process."""

import logging
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from audit.adversary.external import (
    EXTERNAL_ATTACKS,
    AutoAttack,
    FiniteDifferenceAttack,
    HopSkipJump,
    external_attack,
    gradient_free_attack,
)
from audit.adversary.external_adapter import ExternalAttack, PassCounter
from audit.adversary.label_attack import margin
from audit.adversary.threat import Linf, threat_model
from audit.errors import EnvironmentFault, InvalidModelError, UnknownNameError, UsageError

DUAL = {"linf": 1, "l2": 2, "l1": torch.inf}
DISTANCE = {"linf": 0.02, "l2": 0.3, "l1": 0.1}
# all attacks, with fewer queries where these take most of the time
QUICK = {**EXTERNAL_ATTACKS, "autoattack-standard": AutoAttack(queries=50), "hopskipjump": HopSkipJump(steps=10)}
SQUARE = AutoAttack(("square",), 300)
OURS_HERE = [name for name in QUICK if name != "hopskipjump"]
EVERY = pytest.mark.parametrize("name", [*OURS_HERE, pytest.param("hopskipjump", marks=pytest.mark.slow)])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def attack_of(name):
    if name == "hopskipjump":
        pytest.importorskip("foolbox", reason="HopSkipJump needs Foolbox")
    return QUICK[name]


class Planes(nn.Module):
    """K linear logits, equal at the grey image: all distances to the boundary have a closed form."""

    def __init__(self, classes, shape=(1, 8, 8), smooth=False):
        super().__init__()
        weight = torch.randn(classes, *shape, generator=seeded())
        # Square changes whole squares and columns: within these, weights must not change sign
        self.weight = nn.Parameter(
            torch.linspace(-1, 1, classes).view(-1, 1, 1, 1).expand_as(weight) if smooth else weight
        )

    def forward(self, images):
        return torch.einsum("nchw,kchw->nk", images - 0.5, self.weight)

    def distance(self, images, labels, norm):
        weight, logits = self.weight.detach(), self(images).detach()
        gaps = logits.gather(1, labels[:, None]) - logits
        lengths = torch.linalg.vector_norm((weight[labels][:, None] - weight).flatten(2), DUAL[norm], dim=2)
        return torch.where(lengths > 0, gaps / lengths.clamp_min(1e-9), torch.inf).amin(1)

    def images_at(self, distance, norm, count):
        """Images of all classes at a given distance from the boundary, and their labels."""
        labels = torch.arange(count) % len(self.weight)
        weight = self.weight.detach()
        noise = 0.1 * torch.randn(count, *weight.shape[1:], generator=seeded(1))
        away = weight[labels] - weight.mean(0) + noise
        scale = distance / self.distance(0.5 + away, labels, norm)
        return 0.5 + scale.view(-1, 1, 1, 1) * away, labels


def correct_mask(network, images, labels):
    return margin(network(images).detach(), labels) > 0


GRADIENT_FREE = [("differences", norm, classes) for norm in DISTANCE for classes in (2, 3)]
AUTOATTACK = [("autoattack-standard", "linf", 2), ("autoattack-standard", "linf", 3), ("autoattack-standard", "l2", 4)]
PARTS = [(name, norm, classes) for name in ("apgd", "fab") for norm in DISTANCE for classes in (2, 3, 4)]


@pytest.mark.parametrize(("name", "norm", "classes"), AUTOATTACK + PARTS + GRADIENT_FREE)
def test_the_boundary_is_reached_within_a_quarter_and_never_undercut(name, norm, classes):
    network, distance = Planes(classes), DISTANCE[norm]
    images, labels = network.images_at(distance, norm, 4)
    for share, survive in ((1.25, False), (0.99, True)):
        threat = threat_model(norm, share * distance)
        found = QUICK[name](network, images, labels, threat, 0)
        assert (correct_mask(network, found.images, labels) == survive).all()
        assert (threat.distance(found.images, images) <= threat.eps + 1e-6).all()


def test_square_reaches_the_boundary_of_smooth_weights():
    network, distance = Planes(2, (1, 16, 16), smooth=True), DISTANCE["linf"]
    images, labels = network.images_at(distance, "linf", 6)
    # with some other seeds Square stalls at one or two images, whatever the number of queries
    found = SQUARE(network, images, labels, Linf(1.25 * distance), 2)
    assert not correct_mask(network, found.images, labels).any()
    held = SQUARE(network, images, labels, Linf(0.99 * distance), 2)
    assert correct_mask(network, held.images, labels).all()
    assert 0 < found.forwards < held.forwards
    assert found.backwards == held.backwards == 0


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("classes", [2, 4])
def test_hopskipjump_reaches_the_boundary(norm, classes):
    network, distance = Planes(classes), DISTANCE[norm]
    images, labels = network.images_at(distance, norm, 3)
    attack = replace(attack_of("hopskipjump"), steps=25)
    found = attack(network, images, labels, threat_model(norm, 1.25 * distance), 0)
    assert not correct_mask(network, found.images, labels).any()
    held = attack(network, images, labels, threat_model(norm, 0.99 * distance), 0)
    assert correct_mask(network, held.images, labels).all()
    assert found.backwards == 0
    alone = attack(network, images[1:2], labels[1:2], threat_model(norm, 1.25 * distance), 0)
    torch.testing.assert_close(alone.images, found.images[1:2])


class SmallNet(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, classes))

    def forward(self, images):
        return self.layers(images)


def small(classes=4, count=4):
    network = SmallNet(classes)
    images = torch.rand(count, 1, 8, 8, generator=seeded()).round(decimals=1)  # some pixels at 0 and 1
    return network, images, network(images).argmax(1)


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        pytest.param(name, norm, marks=pytest.mark.slow if name == "hopskipjump" else ())
        for name in QUICK
        for norm in ("linf", "l2")
        if (name, norm) != ("square", "l2")
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_candidates_are_legal_and_the_same_for_the_same_seed(name, norm, count):
    network, images, labels = small(count=count)
    threat, attack = threat_model(norm, 0.05 if norm == "linf" else 0.3), attack_of(name)
    found, again = (attack(network, images, labels, threat, 3) for _ in range(2))
    assert found.images.shape == images.shape
    assert (threat.distance(found.images, images) <= threat.eps + 1e-6).all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert torch.equal(found.images, again.images)
    assert found[1:] == again[1:]
    assert found.forwards > 0


def test_another_seed_gives_other_draws():
    network, images, labels = small()
    first, second = (SQUARE(network, images, labels, Linf(0.3), seed).images for seed in (0, 1))
    assert not torch.equal(first, second)


@EVERY
def test_the_process_is_left_unchanged(name, capsys, caplog):
    network, images, labels = small()
    network.layers[0].weight.grad = held = torch.ones_like(network.layers[0].weight)
    network.layers[3].bias.requires_grad_(False)
    attack, given = attack_of(name), images.clone()
    torch_state, numpy_state, python_state = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    calls = []
    tracer = lambda *event: calls.append(event)  # noqa: E731
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        found = attack(network, images, labels, Linf(0.1), 0)
        assert sys.gettrace() is tracer  # AutoAttack switches tracers off, and coverage with them
    finally:
        sys.settrace(before)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert str(np.random.get_state()) == str(numpy_state)
    assert [p.requires_grad for p in network.parameters()] == [True, True, True, False]
    assert network.layers[0].weight.grad is held
    assert torch.equal(held, torch.ones_like(held))
    assert all(p.grad is None for p in list(network.parameters())[1:])
    assert torch.equal(images, given)
    assert not found.images.requires_grad
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert not logging.getLogger("auto-attack").disabled


@pytest.mark.parametrize("name", OURS_HERE)
def test_parameters_require_gradients_again_after_a_failure(name):
    class Broken(SmallNet):
        def forward(self, images):
            raise RuntimeError("no forward pass")

    network, (_, images, labels) = Broken(), small()
    with pytest.raises(
        InvalidModelError, match=r"(pyautoattack|differences) fails .* shape \(1, 8, 8\): RuntimeError no forward"
    ):
        QUICK[name](network, images, labels, Linf(0.1), 0)
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("name", EXTERNAL_ATTACKS)
def test_without_images_or_radius_no_package_is_needed(name, monkeypatch):
    for package in ("pyautoattack", "foolbox"):
        monkeypatch.setitem(sys.modules, package, None)
    network, images, labels = small()
    assert EXTERNAL_ATTACKS[name](network, images[:0], labels[:0], Linf(0.1), 0).images.shape == (0, 1, 8, 8)
    still = EXTERNAL_ATTACKS[name](network, images, labels, Linf(0.0), 0)
    assert torch.equal(still.images, images)
    assert still[1:] == (0, 0)


@pytest.mark.parametrize(("name", "package"), [("square", "pyautoattack"), ("hopskipjump", "foolbox")])
def test_a_missing_package_is_an_error_with_the_extra_to_install(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    network, images, labels = small()
    with pytest.raises(EnvironmentFault, match=rf"{package} cannot be imported .* `pip install 'rvaudit\[attacks\]'`"):
        EXTERNAL_ATTACKS[name](network, images, labels, Linf(0.1), 0)
    assert all(p.requires_grad for p in network.parameters())


def test_passes_are_counted_by_single_images():
    network, images, _ = small()
    counted = PassCounter(network)
    leaf = images.clone().requires_grad_()
    torch.autograd.grad(counted(leaf).sum(), leaf)
    counted(images[:1])
    assert (counted.forwards, counted.backwards) == (5, 4)
    assert list(counted.parameters()) == []
    network.train()
    counted.eval()
    assert network.training


def test_reported_passes_equal_those_of_the_network():
    seen = []
    network, images, labels = small()
    network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for name in ("square", "fab", "apgd"):
        seen.clear()
        assert QUICK[name](network, images, labels, Linf(0.01), 0).forwards == sum(seen)


class CopiedFlatten(nn.Flatten):
    def forward(self, images):
        return super().forward(images) + 0.0


def test_logits_that_are_a_view_of_the_images_are_not_overwritten():
    images = torch.rand(6, 1, 3, 3, generator=seeded())
    labels = images.flatten(1).argmax(1)
    wanted = SQUARE(CopiedFlatten(), images, labels, Linf(0.2), 0)
    found = SQUARE(nn.Flatten(), images, labels, Linf(0.2), 0)
    assert torch.equal(found.images, wanted.images)
    assert not correct_mask(nn.Flatten(), wanted.images, labels).all()


class IllegalCandidates(ExternalAttack):
    """An attack that returns one image outside the ball, one outside the pixel range, and one with a NaN."""

    library, norms = "illegal", dict.fromkeys(DISTANCE, "")

    def _search(self, network, images, labels, threat, seed):
        found = images.clone()
        found[0] += 10 * threat.eps
        found[1] -= 2
        found[2, 0, 0, 0] = torch.nan
        return found


@pytest.mark.parametrize("norm", DISTANCE)
def test_illegal_candidates_are_projected(norm):
    network, images, labels = small()
    threat = threat_model(norm, 0.05)
    found = IllegalCandidates()(network, images, labels, threat, 0).images
    assert (threat.distance(found, images) <= threat.eps + 1e-6).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not torch.equal(found[:2], images[:2])
    assert torch.equal(found[2:], images[2:])


def test_warnings_of_packages_are_silenced(caplog):
    network, images, labels = small()
    SQUARE(nn.Sequential(network, nn.Softmax(1)), images, labels, Linf(0.1), 0)
    assert not caplog.records


class NanNet(SmallNet):
    """Outputs and gradients are NaN."""

    def forward(self, images):
        return super().forward(images) + (images.flatten(1).sum(1, keepdim=True) - 1e9).sqrt()


@pytest.mark.parametrize("name", ["apgd", "square", "fab"])
def test_candidates_of_a_network_with_nan_outputs_are_legal(name):
    _, images, labels = small()
    found = QUICK[name](NanNet(), images, labels, Linf(0.1), 0)
    assert found.images.isfinite().all()
    assert (Linf(0.1).distance(found.images, images) <= 0.1 + 1e-6).all()


@pytest.mark.parametrize(
    ("classes", "stages"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_losses_undefined_for_few_classes_are_replaced(classes, stages):
    assert AutoAttack().stages_for(classes) == stages


def test_a_network_of_one_output_is_refused():
    network, images, labels = small(1)
    with pytest.raises(InvalidModelError, match="has 1 output"):
        EXTERNAL_ATTACKS["apgd"](network, images, labels, Linf(0.1), 0)


def test_illegal_settings_are_refused():
    network, images, labels = small()
    with pytest.raises(UsageError, match="foolbox does not attack in 'l1'; legal: l2, linf"):
        EXTERNAL_ATTACKS["hopskipjump"](network, images, labels, threat_model("l1", 0.1), 0)
    with pytest.raises(UsageError, match=r"within \(0.0, 1.0\), not within \(-1.0, 1.0\)"):
        EXTERNAL_ATTACKS["square"](network, images, labels, Linf(0.1, (-1.0, 1.0)), 0)
    for norm in ("l2", "l1"):
        with pytest.raises(UsageError, match=f"not in '{norm}'.*use `differences`"):
            EXTERNAL_ATTACKS["square"](network, images, labels, threat_model(norm, 0.1), 0)
        assert gradient_free_attack(threat_model(norm, 0.1), 7) == FiniteDifferenceAttack(7)
    assert gradient_free_attack(Linf(0.1), 7) == AutoAttack(("square",), 7)
    with pytest.raises(UnknownNameError, match="did you mean 'square'"):
        external_attack("sqare")
    assert external_attack("square") == AutoAttack(("square",), 300)
    with pytest.raises(UnknownNameError, match="did you mean 'fab-t'"):
        AutoAttack(("fab",))
    with pytest.raises(UsageError, match="no stages"):
        AutoAttack(())
    with pytest.raises(UsageError, match="queries 0 "):
        AutoAttack(queries=0)
    with pytest.raises(UsageError, match="steps 0 "):
        HopSkipJump(0)
