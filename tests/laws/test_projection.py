"""Laws of every threat model: projections are legal, idempotent and fix legal points; directions are steepest."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from audit.adversary.threat import L1, L2, THREATS, Linf, threat_model

SHAPE = (3, 1, 2, 3)
NORMS = pytest.mark.parametrize("norm", sorted(THREATS))
radii = st.sampled_from([0.0, 1e-6, 2 / 255, 8 / 255, 0.3, 1.0])
pixels = hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))
anything = hnp.arrays(np.float32, SHAPE, elements=st.floats(-3, 3, width=32))


def excess(threat, images, clean):
    """The largest distance of images from the ball or the pixel range, in float64."""
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    length = torch.linalg.vector_norm((images.double() - clean.double()).flatten(1), order, dim=1)
    return max(float((length - threat.eps).max()), float(-images.min()), float(images.max() - 1))


@NORMS
@given(clean=pixels, images=anything, eps=radii)
def test_projection_is_legal_and_idempotent(norm, clean, images, eps):
    threat, clean, images = threat_model(norm, eps), torch.from_numpy(clean), torch.from_numpy(images)
    once = threat.project(images, clean)
    assert excess(threat, once, clean) <= 1e-6
    assert torch.equal(threat.project(once, clean), once)


@NORMS
@given(clean=pixels, images=pixels, eps=radii)
def test_projection_fixes_legal_images_bit_for_bit(norm, clean, images, eps):
    threat, clean, images = threat_model(norm, eps), torch.from_numpy(clean), torch.from_numpy(images)
    legal = threat.distance(images, clean) <= eps
    projected = threat.project(images, clean)
    assert torch.equal(projected[legal], images[legal])
    assert torch.equal(threat.project(clean, clean), clean)


@NORMS
@pytest.mark.parametrize("size", [8, 32])
def test_projection_of_real_sizes_is_legal_and_idempotent(norm, size):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(16, 3, size, size, generator=generator)
    # uniform images shifted by a constant round equally in all pixels, the worst case for the length
    clean[8:] = torch.linspace(0.4, 0.6, 8).view(-1, 1, 1, 1)
    images = clean + torch.randn(16, 3, size, size, generator=generator)
    images[8:] = clean[8:] + 0.1
    for eps in (1e-3, 0.1, 0.9) if norm == "linf" else (1e-3, 0.5, 12.0):
        threat = threat_model(norm, eps)
        once = threat.project(images, clean)
        assert excess(threat, once, clean) <= 1e-6 * max(1, eps)
        assert torch.equal(threat.project(once, clean), once)


@NORMS
@given(clean=pixels, eps=radii, seed=st.integers(0, 2**32))
def test_random_start_is_legal(norm, clean, eps, seed):
    threat, clean = threat_model(norm, eps), torch.from_numpy(clean)
    assert excess(threat, threat.random_start(clean, torch.Generator().manual_seed(seed)), clean) <= 1e-6


@NORMS
def test_random_starts_depend_on_the_generator_only(norm):
    threat, clean = threat_model(norm, 0.3), torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = torch.random.get_rng_state()
    first, again, other = (threat.random_start(clean, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (threat.distance(first, clean) > 0).all()
    # numbers are drawn in float32 on the CPU: equal starts for images of another precision
    wide = threat.random_start(clean.double(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide.float(), first, atol=1e-6, rtol=0)


@NORMS
def test_random_starts_fill_the_ball(norm):
    threat, clean = threat_model(norm, 0.2), torch.full((2000, 1, 1, 2), 0.5)
    delta = threat.random_start(clean, torch.Generator().manual_seed(0)) - clean
    # uniform in a ball of two dimensions: the radius is the square root of a uniform number
    radius = threat.distance(clean + delta, clean) / 0.2
    assert abs(float((radius**2).mean()) - 0.5) < 0.03
    assert delta.mean((0, 1, 2)).abs().max() < 0.01


@NORMS
@given(gradient=hnp.arrays(np.float32, SHAPE, elements=st.floats(-10, 10, width=32)), scale=st.sampled_from([1e-30, 1]))
def test_steepest_has_unit_norm_and_attains_the_dual_norm(norm, gradient, scale):
    threat, gradient = threat_model(norm, 0.1), torch.from_numpy(gradient) * scale
    direction = threat.steepest(gradient, torch.full(SHAPE, 0.5)).double().flatten(1)
    rows = gradient.double().flatten(1)
    order, dual = {"linf": (torch.inf, 1), "l2": (2, 2), "l1": (1, torch.inf)}[norm]
    wanted = torch.linalg.vector_norm(rows, dual, dim=1)
    assert (torch.linalg.vector_norm(direction, order, dim=1) <= 1 + 1e-6).all()
    torch.testing.assert_close((rows * direction).sum(1), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e25])
def test_l2_direction_survives_underflow_and_overflow(scale):
    gradient = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * scale
    length = L2(0.1).steepest(gradient, gradient).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(4))


def simplex_threshold(delta, eps):
    """The l1 projection by bisection on the soft threshold, from the optimality condition."""
    low, high = 0.0, float(np.abs(delta).max())
    if np.abs(delta).sum() <= eps:
        return delta
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.maximum(np.abs(delta) - level, 0).sum() > eps else (low, level)
    return np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


@given(
    delta=hnp.arrays(np.float32, (1, 1, 2, 4), elements=st.floats(-0.5, 0.5, width=32)),
    eps=st.floats(0.01, 3),
)
def test_l1_projection_equals_the_soft_threshold_found_by_bisection(delta, eps):
    clean = torch.full((1, 1, 2, 4), 0.5)
    found = L1(eps).project(clean + torch.from_numpy(delta), clean) - clean
    np.testing.assert_allclose(found.numpy(), simplex_threshold(delta.astype(np.float64), eps), atol=1e-5)


@given(delta=hnp.arrays(np.float32, (1, 1, 2, 4), elements=st.floats(-0.5, 0.5, width=32)), eps=st.floats(0.01, 1))
def test_l2_and_linf_projections_equal_their_closed_forms(delta, eps):
    clean, moved = torch.full((1, 1, 2, 4), 0.5), torch.from_numpy(delta)
    wide = delta.astype(np.float64)
    scaled = wide * min(1.0, eps / max(float(np.linalg.norm(wide)), 1e-30))
    np.testing.assert_allclose((L2(eps).project(clean + moved, clean) - clean).numpy(), scaled, atol=2e-6)
    clipped = np.clip(wide, -eps, eps)
    np.testing.assert_allclose((Linf(eps).project(clean + moved, clean) - clean).numpy(), clipped, atol=2e-6)


def test_l1_projection_of_known_points():
    clean = torch.zeros(3, 1, 1, 3)
    images = torch.tensor([[1.0, 0, 0], [0.6, 0.6, 0], [0.2, 0.1, 0.1]]).view(3, 1, 1, 3)
    found = L1(0.5).project(images, clean).view(3, 3)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0, 0], [0.25, 0.25, 0], [0.2, 0.1, 0.1]]))
