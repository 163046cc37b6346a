"""Least informative values in intervals, compared with closed forms, and interval piercing."""

from itertools import pairwise

import pytest
import torch

from audit.attribution.intervals import least_informative_values, pierce_intervals
from audit.calibration.closed_forms import gaussian, three_points, two_points, uniform
from audit.information.gaussian_mixture import plug_in_terms
from audit.random_keys import keyed_generator

N = 300


def nats(values):
    return float(plug_in_terms(values[:, None], keyed_generator(9), 8)[0].mean())


def quantiles(count=N):
    return torch.special.ndtri((torch.arange(count, dtype=torch.double) + 0.5) / count)


SOURCES = {
    "gaussian": (gaussian, quantiles()),
    "uniform": (uniform, 2 * (torch.arange(N, dtype=torch.double) + 0.5) / N - 1),
    "two": (two_points, torch.tensor([-1.0, 1.0]).double().repeat(N // 2)),
    "three": (three_points, torch.tensor([-1.0, 0.0, 1.0]).double().repeat(N // 3)),
}


@pytest.mark.parametrize(
    ("source", "sigma", "shift"),
    [
        ("gaussian", 0.5, 0.5),
        ("gaussian", 1.0, 0.25),
        ("uniform", 0.5, 0.25),
        ("two", 0.5, 0.5),
        ("two", 0.25, 0.75),
        ("three", 0.25, 0.4),
        ("three", 1.0, 0.5),
    ],
)
def test_the_worst_case_matches_the_closed_form(source, sigma, shift):
    closed_form, values = SOURCES[source]
    clean, reach = values / sigma, shift / sigma
    worst = least_informative_values(clean, clean - reach, clean + reach, 30, 4, 0)
    assert ((worst - clean).abs() <= reach + 1e-9).all()
    assert nats(worst) == pytest.approx(closed_form(sigma, shift).worst, abs=0.03)


def test_atoms_beat_soft_thresholding_where_the_noise_is_small():
    clean = quantiles() / 0.1
    worst = least_informative_values(clean, clean - 5, clean + 5, 30, 4, 0)
    assert nats(worst) < gaussian(0.1, 0.5).worst - 0.2


def test_overlapping_intervals_leave_no_information_and_points_stay():
    clean = quantiles()
    low, high = torch.full_like(clean, -9.0), torch.full_like(clean, 9.0)
    assert nats(least_informative_values(clean, low, high, 5, 4, 0)) == pytest.approx(0, abs=0.01)
    assert torch.equal(least_informative_values(clean, clean, clean, 5, 4, 0), clean)


def test_information_does_not_increase_with_the_radius():
    clean = quantiles(100)
    found = [nats(least_informative_values(clean, clean - r, clean + r, 20, 4, 0)) for r in (0.0, 0.2, 0.6, 1.5, 4.0)]
    assert all(later <= earlier + 0.01 for earlier, later in pairwise(found))


def test_piercing_uses_the_fewest_atoms_inside_the_intervals():
    low, high = torch.tensor([0.0, 1.0, 2.5, 4.0, -1.0]), torch.tensor([2.0, 3.0, 5.0, 6.0, 0.5])
    atoms = pierce_intervals(low, high)
    assert ((low <= atoms) & (atoms <= high)).all()
    assert len(atoms.unique()) == 3  # [-1, 0.5], [1, 2] and [4, 5] are disjoint
