"""Lines below and above activations, and the least linear function over a ball, against grids and solvers."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from audit.adversary.threat import L1, L2, Linf
from audit.certificate.robust_images.balls import box, least_change
from audit.certificate.robust_images.lines import relu_lines, sigmoid_lines, tanh_lines
from audit.random_keys import keyed_generator

CURVES = {
    "relu": (relu_lines, lambda u: u.clamp_min(0)),
    "tanh": (tanh_lines, torch.tanh),
    "sigmoid": (sigmoid_lines, torch.sigmoid),
}


def intervals():
    """Return 500 intervals: of any sign, wide, narrow, of one point, and far out where curves are flat."""
    centre = 8 * torch.rand(500, dtype=torch.float64, generator=keyed_generator(1)) - 4
    width = 10.0 ** (4 * torch.rand(500, dtype=torch.float64, generator=keyed_generator(2)) - 3)
    low, high = centre - width, centre + width
    low[:20] = high[:20] = centre[:20]
    low[20:30], high[20:30] = 30.0, 60.0
    low[30:40], high[30:40] = -60.0, 45.0
    return low, high


@pytest.mark.parametrize("name", CURVES)
def test_lines_enclose_the_curve_on_a_grid(name):
    lines_of, curve = CURVES[name]
    low, high = intervals()
    lines = lines_of(low, high)
    grid = low + (high - low) * torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None]
    assert bool((lines.lower_slope * grid + lines.lower_offset <= curve(grid) + 1e-12).all())
    assert bool((lines.upper_slope * grid + lines.upper_offset >= curve(grid) - 1e-12).all())


@pytest.mark.parametrize("name", CURVES)
def test_lines_are_not_looser_than_the_constants_at_the_ends(name):
    lines_of, curve = CURVES[name]
    low, high = intervals()
    lines, middle = lines_of(low, high), (low + high) / 2
    gap = (lines.upper_slope - lines.lower_slope) * middle + lines.upper_offset - lines.lower_offset
    assert bool((gap <= curve(high) - curve(low) + 1e-9).all())


def test_every_lower_slope_of_an_unstable_relu_is_legal():
    low, high = intervals()
    free = relu_lines(low, high).free
    assert bool((free == ((low < 0) & (high > 0))).all())
    grid = (low + (high - low) * torch.linspace(0, 1, 101, dtype=torch.float64)[:, None])[:, free]
    for slope in (0.0, 0.3, 1.0):
        assert bool((slope * grid <= grid.clamp_min(0)).all())


@pytest.mark.parametrize("eps", [0.05, 0.4, 1.5])
def test_the_least_change_in_l1_is_that_of_a_linear_program(eps):
    rows = torch.randn(6, 5, dtype=torch.float64, generator=keyed_generator(3))
    clean = torch.rand(6, 1, 1, 5, dtype=torch.float64, generator=keyed_generator(4))
    down, up = (part.flatten(1) for part in _changes(clean, L1(eps)))
    found = least_change(rows, down, up, L1(eps))
    for k in range(6):
        # d = p - q with p, q >= 0 and sum p + q <= eps
        bounds = [(0, u) for u in up[k]] + [(0, -d) for d in down[k]]
        cost = np.concatenate([rows[k].numpy(), -rows[k].numpy()])
        solved = linprog(cost, A_ub=np.ones((1, 10)), b_ub=[eps], bounds=bounds)
        assert float(found[k]) == pytest.approx(solved.fun, abs=1e-9)


@pytest.mark.parametrize("eps", [0.05, 0.4, 0.9])
def test_the_least_change_in_l2_is_a_lower_bound_and_nearly_exact(eps):
    rows = torch.randn(6, 5, dtype=torch.float64, generator=keyed_generator(5))
    clean = torch.rand(6, 1, 1, 5, dtype=torch.float64, generator=keyed_generator(6))
    down, up = (part.flatten(1) for part in _changes(clean, L2(eps)))
    found = least_change(rows, down, up, L2(eps))
    for k in range(6):
        inside = {"type": "ineq", "fun": lambda d: eps**2 - d @ d}
        bounds = list(zip(down[k].tolist(), up[k].tolist(), strict=True))
        given = rows[k].numpy()
        solved = minimize(lambda d, a=given: a @ d, np.zeros(5), bounds=bounds, constraints=[inside], tol=1e-12)
        assert solved.fun - 1e-3 * abs(solved.fun) <= float(found[k]) <= solved.fun + 1e-7


def test_the_least_change_in_linf_is_at_a_corner():
    rows = torch.randn(4, 3, dtype=torch.float64, generator=keyed_generator(7))
    clean = torch.rand(4, 1, 1, 3, dtype=torch.float64, generator=keyed_generator(8))
    down, up = (part.flatten(1) for part in _changes(clean, Linf(0.3)))
    corners = torch.stack([torch.where(rows > 0, down, up), torch.where(rows > 0, up, down)])
    expected = (rows * corners).sum(2).amin(0)
    assert torch.allclose(least_change(rows, down, up, Linf(0.3)), expected)


def _changes(clean, threat):
    low, high = box(clean, threat)
    return low - clean, high - clean
