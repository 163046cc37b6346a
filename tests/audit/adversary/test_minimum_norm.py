"""Minimum-norm attacks: closed forms on linear networks, legal and confirmed images, no side effects."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from audit.adversary.label_attack import margin
from audit.adversary.minimum_norm import DDN, CarliniWagner, carlini_wagner, ddn
from audit.errors import InvalidModelError, UsageError

QUICK = {"carlini-wagner": (carlini_wagner, CarliniWagner(steps=100, searches=4)), "ddn": (ddn, DDN())}
ATTACKS = pytest.mark.parametrize(("attack", "settings"), QUICK.values(), ids=QUICK)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Planes(nn.Module):
    """K linear logits, equal at the grey image: all distances to the boundary have a closed form."""

    def __init__(self, classes, shape=(1, 8, 8)):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, *shape, generator=seeded()))

    def forward(self, images):
        return torch.einsum("nchw,kchw->nk", images - 0.5, self.weight)

    def distance(self, images, labels):
        """The l2 distance to the nearest plane between the label and another class, (N,)."""
        weight, logits = self.weight.detach(), self(images).detach()
        gaps = logits.gather(1, labels[:, None]) - logits
        lengths = (weight[labels][:, None] - weight).flatten(2).norm(dim=2)
        return torch.where(lengths > 0, gaps / lengths.clamp_min(1e-9), torch.inf).amin(1)

    def images_at(self, distance, count):
        """Images of all classes at a given distance from the boundary, and their labels."""
        labels = torch.arange(count) % len(self.weight)
        weight = self.weight.detach()
        away = weight[labels] - weight.mean(0) + 0.3 * torch.randn(count, *weight.shape[1:], generator=seeded(1))
        scale = distance / self.distance(0.5 + away, labels)
        return 0.5 + scale.view(-1, 1, 1, 1) * away, labels


@ATTACKS
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_the_boundary_is_reached_within_a_quarter_and_never_undercut(attack, settings, classes):
    network = Planes(classes)
    images, labels = network.images_at(0.3, 12)
    torch.testing.assert_close(network.distance(images, labels), torch.full((12,), 0.3), rtol=1e-4, atol=0)
    found = attack(network, images, labels, settings)
    assert found.broken(1.25 * 0.3).all()
    assert not found.broken(0.99 * 0.3).any()


def test_carlini_wagner_comes_nearer_than_ddn_with_many_classes():
    network = Planes(4)
    images, labels = network.images_at(0.3, 12)
    exact = carlini_wagner(network, images, labels, QUICK["carlini-wagner"][1]).norms
    assert (exact < 1.1 * 0.3).all()
    assert exact.mean() < ddn(network, images, labels, DDN()).norms.mean()


@ATTACKS
def test_images_are_adversarial_and_legal_with_the_reported_norms(attack, settings):
    network = Planes(4)
    images, labels = network.images_at(0.2, 8)
    images[:4, :, :4] = (images[:4, :, :4] > 0.5).float()  # black and white pixels, at the ends of the range
    labels[:4] = network(images[:4]).argmax(1)
    found = attack(network, images, labels, settings)
    assert found.norms.isfinite().all()
    torch.testing.assert_close(found.norms, (found.images - images).flatten(1).norm(dim=1), rtol=1e-5, atol=1e-6)
    assert not (margin(network(found.images), labels) > 0).any()
    assert found.images.min() >= 0
    assert found.images.max() <= 1


@ATTACKS
def test_misclassified_images_take_no_passes(attack, settings):
    network = Planes(3)
    images, labels = network.images_at(0.3, 6)
    labels[:2] = (labels[:2] + 1) % 3
    found = attack(network, images, labels, settings)
    assert torch.equal(found.norms[:2], torch.zeros(2))
    assert torch.equal(found.images[:2], images[:2])
    each = settings.steps * getattr(settings, "searches", 1)
    assert found.passes == 4 * each
    nothing = attack(network, images[:2], labels[:2], settings)
    assert nothing.passes == 0


@ATTACKS
@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_are_independent_of_batch_size_and_other_images(attack, settings, batch_size):
    network = Planes(4)
    images, labels = network.images_at(0.3, 7)
    wanted = attack(network, images, labels, settings)
    found = attack(network, images, labels, replace(settings, batch_size=batch_size))
    alone = attack(network, images[2:3], labels[2:3], settings)
    torch.testing.assert_close(found.norms, wanted.norms, rtol=1e-3, atol=0)
    torch.testing.assert_close(alone.norms, wanted.norms[2:3], rtol=1e-3, atol=0)
    assert found.passes == wanted.passes == 7 * alone.passes


@ATTACKS
def test_without_images_there_are_no_passes(attack, settings):
    found = attack(Planes(2), torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long), settings)
    assert found.images.shape == (0, 1, 8, 8)
    assert found.norms.shape == (0,)
    assert found.passes == 0


class Constant(Planes):
    """Always the first class, with a tiny gradient."""

    def forward(self, images):
        return super().forward(images) * 1e-6 + torch.tensor([1.0, 0.0])


@ATTACKS
def test_robust_images_have_an_infinite_norm_and_stay_clean(attack, settings):
    images = torch.rand(3, 1, 8, 8, generator=seeded())
    found = attack(Constant(2), images, torch.zeros(3, dtype=torch.long), settings)
    assert torch.equal(found.norms, torch.full((3,), torch.inf))
    assert torch.equal(found.images, images)


class WrongWithGradients(Planes):
    """Misclassifies while gradients are enabled, and not in a plain forward pass."""

    def forward(self, images):
        logits = super().forward(images)
        return logits.flip(1) if torch.is_grad_enabled() else logits


@ATTACKS
def test_images_rejected_by_a_plain_forward_pass_are_discarded(attack, settings):
    network = WrongWithGradients(2)
    images, labels = Planes(2).images_at(0.3, 4)
    found = attack(network, images, labels, settings)
    assert torch.equal(found.norms, torch.full((4,), torch.inf))
    assert torch.equal(found.images, images)


@ATTACKS
def test_neither_gradients_nor_generators_change(attack, settings):
    network = Planes(3)
    images, labels = network.images_at(0.3, 3)
    before, given = torch.random.get_rng_state(), images.clone()
    found = attack(network, images, labels, settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert torch.equal(images, given)
    assert not images.requires_grad
    assert not found.images.requires_grad


class Detached(Planes):
    def forward(self, images):
        return super().forward(images.detach()).detach()


@ATTACKS
def test_a_network_without_a_gradient_is_refused(attack, settings):
    images, labels = Planes(2).images_at(0.3, 2)
    with pytest.raises(InvalidModelError, match="gives no gradient"):
        attack(Detached(2), images, labels, settings)


@pytest.mark.parametrize(
    ("settings", "wrong", "said"),
    [
        (CarliniWagner, {"steps": 0}, "steps 0 of CarliniWagner must be at least 1"),
        (CarliniWagner, {"searches": 0}, "searches 0 "),
        (CarliniWagner, {"learning_rate": 0.0}, "learning_rate 0.0 of CarliniWagner must be finite and above 0"),
        (CarliniWagner, {"initial_c": float("nan")}, "initial_c nan "),
        (DDN, {"steps": 0}, "steps 0 of DDN"),
        (DDN, {"batch_size": 0}, "batch_size 0 of DDN"),
        (DDN, {"initial_norm": float("inf")}, "initial_norm inf of DDN"),
        (DDN, {"gamma": 1.0}, r"gamma 1.0 of DDN is outside \(0, 1\)"),
    ],
)
def test_illegal_settings_are_refused(settings, wrong, said):
    with pytest.raises(UsageError, match=said):
        settings(**wrong)
