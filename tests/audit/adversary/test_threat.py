import dataclasses

import pytest
import torch

from audit.adversary.threat import L1, L2, Linf, threat_model
from audit.errors import UnknownNameError, UsageError


def test_names_become_threat_models():
    assert threat_model("linf", 8 / 255) == Linf(8 / 255)
    assert threat_model("L2", 0.5) == L2(0.5)
    assert threat_model("l1", 12) == L1(12)


def test_an_unknown_norm_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match=r"unknown norm 'lnf'; did you mean 'linf'"):
        threat_model("lnf", 0.1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_an_impossible_radius_is_refused(norm, eps):
    with pytest.raises(UsageError, match="not a finite radius >= 0"):
        threat_model(norm, eps)


def test_a_radius_in_grey_levels_is_refused():
    with pytest.raises(UsageError, match="write 8/255"):
        Linf(8)
    assert Linf(1).eps == 1


def test_a_threat_model_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Linf(0.1).eps = 0.2


def test_distances_of_known_images():
    clean, images = torch.zeros(1, 1, 1, 2), torch.tensor([0.3, -0.4]).view(1, 1, 1, 2)
    lengths = [float(threat.distance(images, clean)) for threat in (Linf(0.1), L2(0.1), L1(0.1))]
    assert lengths == pytest.approx([0.4, 0.5, 0.7])


def test_other_pixel_ranges_are_supported():
    threat = Linf(0.5, pixel_range=(-1.0, 1.0))
    clean = torch.tensor([-0.9, 0.0, 0.9]).view(3, 1, 1, 1)
    assert threat.project(clean - 9, clean).flatten().tolist() == pytest.approx([-1, -0.5, 0.4])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.1), L1(0.1)])
def test_a_step_descends_by_its_length(threat):
    clean, gradient = torch.full((2, 1, 4, 4), 0.5), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = threat.step(clean, gradient, clean, 0.05)
    assert threat.distance(moved, clean).tolist() == pytest.approx([0.05, 0.05], abs=1e-6)
    assert ((moved - clean) * gradient).sum() < 0
    # a zero gradient leaves the images unchanged
    assert torch.equal(threat.step(clean, torch.zeros_like(clean), clean, 0.05), clean)


def test_an_l1_step_skips_pixels_that_cannot_move():
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).view(1, 1, 2, 2)
    gradient = torch.tensor([9.0, -9.0, -1.0, 2.0]).view(1, 1, 2, 2)
    # descent would lower pixel 0 and raise pixel 1, which are at the ends of their range; pixel 3 comes next
    assert L1(0.1).steepest(gradient, images).flatten().tolist() == [0, 0, 0, 1]
    black = torch.zeros(1, 1, 2, 2)
    assert not L1(0.1).steepest(torch.ones(1, 1, 2, 2), black).any()


@pytest.mark.parametrize(("eps", "moved"), [(0.1, 1), (0.5, 1), (2.0, 4), (100.0, 30)])
def test_an_l1_step_changes_as_many_pixels_as_eps_allows(eps, moved):
    gradient = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    direction = L1(eps).steepest(gradient, torch.full_like(gradient, 0.5))
    assert int((direction != 0).sum()) == moved
    assert float(direction.abs().sum()) == pytest.approx(1)


def l1_projection(moved, clean, eps):
    """Project onto the intersection of l1 ball and [0, 1] by bisection on the threshold."""
    delta = moved - clean
    room = torch.where(delta > 0, 1 - clean, clean)
    low, high = 0.0, float(delta.abs().max())
    for _ in range(80):
        level = (low + high) / 2
        total = (delta.abs() - level).clamp_min(0).minimum(room).sum()
        low, high = (level, high) if total > eps else (low, level)
    return clean + delta.sign() * (delta.abs() - high).clamp_min(0).minimum(room)


@pytest.mark.parametrize("eps", [0.05, 0.7, 2.0, 6.0])
def test_the_l1_projection_is_the_nearest_legal_point_at_distance_eps(eps):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(20, 1, 8, 8, generator=generator).round(decimals=1).double()
    images = clean + torch.randn(20, 1, 8, 8, generator=generator).double()
    found = L1(eps).project(images, clean)
    wanted = torch.stack([l1_projection(*pair, eps) for pair in zip(images, clean, strict=True)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(L1(eps).distance(found, clean), torch.full((20,), eps).double(), atol=1e-5, rtol=0)


def test_sparse_starts_are_legal_reproducible_and_change_few_pixels():
    clean, threat = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)), L1(1.0)
    first, again, other = (threat.sparse_start(clean, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (threat.distance(first, clean) <= 1 + 1e-6).all()
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    moved = (first != clean).flatten(1).sum(1)
    assert set(moved.tolist()) == {1, 2, 3}
