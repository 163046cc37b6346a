"""Kernel dependence: nothing of independent features, the closed form of few, gradients, and what it leaves out."""

import pytest
import torch

from audit.information.dependence import KernelDependence


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def told(features, labels, sharpness=2.0):
    dependence = KernelDependence(features.clone(), sharpness)
    dependence.renew()
    shares = labels.bincount() / len(labels)
    weights = (labels[:, None] == labels[dependence.known]) / shares[labels][:, None]
    return dependence.told(features, torch.arange(len(features)), weights)


def test_independent_features_tell_nothing_and_separate_classes_nearly_all():
    labels = torch.arange(400) % 4
    assert abs(float(told(torch.randn(400, 3, generator=seeded()), labels).mean())) < 0.02
    apart = torch.nn.functional.one_hot(labels).float() + 0.01 * torch.randn(400, 4, generator=seeded())
    assert float(told(apart, labels, sharpness=20.0).mean()) == pytest.approx(torch.tensor(4.0).log().item(), abs=0.02)


def test_value_is_the_share_of_the_own_class_among_all_others():
    features, labels = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1])
    values = told(features, labels, sharpness=1.0)
    squares = (features - features.T).square()
    kernel = (-squares / squares.mean(1, keepdim=True)).exp().fill_diagonal_(0)
    own = (kernel * (labels[:, None] == labels)).sum(1) / kernel.sum(1)
    assert values.allclose((own / 0.5).log(), atol=1e-5)


@pytest.mark.parametrize(
    "change", [lambda x: 1e5 * x, lambda x: 1e-5 * x, lambda x: x @ torch.tensor([[0, 2.0], [1, 0]])]
)
def test_scale_and_order_of_features_do_not_matter(change):
    labels = torch.arange(100) % 2
    features = torch.randn(100, 2, generator=seeded()) + labels[:, None]
    assert told(change(features), labels).allclose(told(features, labels), atol=1e-3)


def test_constant_features_tell_nothing_and_have_a_finite_gradient():
    features = torch.ones(50, 3).requires_grad_()
    dependence = KernelDependence(torch.ones(50, 3), 1.0)
    dependence.renew()
    value = dependence.told(features, torch.arange(50), torch.ones(50, 50)).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-4)
    assert features.grad.isfinite().all()


def test_features_are_known_after_they_were_passed():
    dependence = KernelDependence(torch.zeros(6, 1), 1.0)
    dependence.renew()
    dependence.told(torch.ones(2, 1), torch.tensor([1, 4]), torch.ones(2, 6))
    assert dependence.features.flatten().tolist() == [0, 1, 0, 0, 1, 0]


def test_many_features_are_compared_with_some():
    dependence = KernelDependence(torch.randn(5000, 2, generator=seeded()), 1.0)
    assert len(dependence.known) <= 2000
    dependence.renew()
    values = dependence.told(dependence.features[:7].clone(), torch.arange(7), torch.ones(7, len(dependence.known)))
    assert values.abs().max() < 1e-4
