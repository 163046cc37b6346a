"""Information of a Gaussian mixture in blocks: dense formulas, independence of the block size, and memory."""

from functools import partial
from math import log

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from audit.information import gaussian_mixture as mixture
from audit.information.gaussian_mixture import guaranteed_bounds, log_kernel, mean_shift, plug_in_terms

SAME = partial(pytest.approx, rel=1e-12, abs=1e-12)
SIZES = [(2, 1), (9, 4), (150, 10), (40, 300)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def cloud(count, width, typical=2.0):
    """Features (count, width) with distances of about `typical` deviations of the noise for any width."""
    return typical * torch.randn(count, width, generator=seeded()) / width**0.5


def distances(rows, features):
    """|r_i - f_j|^2 in float64, pair by pair and without an inner product."""
    return (rows.double()[:, None] - features.double()).square().sum(2)


def dense_pair(features):
    apart = distances(features, features)
    return [float(log(len(features)) - (-apart / (2 * v)).logsumexp(1).mean()) for v in (4.0, 1.0)]


def dense_terms(features, noise):
    """The plug-in pair (N,), (N,) of one draw."""
    count, entropy = len(features), noise.double().square().sum(1) / 2
    powers = -distances(features.double() + noise, features) / 2
    lower = log(count) - powers.logsumexp(1) - entropy
    return lower, log(count - 1) - powers.fill_diagonal_(-torch.inf).logsumexp(1) - entropy


def dense_shift(features, noise):
    features, away = features.double(), 0
    for sign in (1, -1):
        posterior = (-distances(features + sign * noise, features) / 2).softmax(1)
        away = away + (features - posterior @ features) / 2
    return away


@pytest.mark.parametrize("size", SIZES)
def test_guaranteed_bounds_equal_the_dense_formula(size):
    assert list(guaranteed_bounds(cloud(*size))) == SAME(dense_pair(cloud(*size)))


@pytest.mark.parametrize("size", SIZES)
def test_plug_in_terms_equal_the_dense_formula(size):
    for found, wanted in zip(
        plug_in_terms(cloud(*size), seeded(1), 1),
        dense_terms(cloud(*size), torch.randn(size, generator=seeded(1))),
        strict=True,
    ):
        assert found.tolist() == SAME(wanted.tolist())


@pytest.mark.parametrize(("kind", "within"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES)
def test_mean_shift_equals_the_dense_formula(size, kind, within):
    # adding |noise|^2 / 2 to the exponents would lose 1e-4 in 300 dimensions
    features = cloud(*size).to(kind)
    found = mean_shift(features, seeded(1), 1)
    assert found.dtype == kind
    assert (found - dense_shift(features, torch.randn(size, generator=seeded(1)))).abs().max() < within


def test_log_kernel_is_never_positive():
    rows, features = cloud(7, 5).double(), cloud(11, 5).double()
    assert log_kernel(rows, features, 3.0).flatten().tolist() == SAME(
        (-distances(rows, features) / 6).flatten().tolist()
    )
    far = 1e6 * features
    assert float(log_kernel(far, far, 1.0).max()) <= 0


def test_log_kernel_is_differentiable():
    rows, features = cloud(4, 3).double().requires_grad_(), cloud(6, 3).double()
    log_kernel(rows, features, 2.0).sum().backward()
    assert rows.grad.flatten().tolist() == SAME(((features.sum(0) - 6 * rows) / 2).flatten().tolist())


@pytest.mark.parametrize("held", [1, 7, 64, 99])
def test_block_size_has_no_effect(monkeypatch, held):
    features = cloud(100, 3)

    def everything():
        shift = mean_shift(features.double(), seeded(), 2).flatten().tolist()
        terms = torch.cat(plug_in_terms(features, seeded(), 2)).tolist()
        return [*guaranteed_bounds(features), *terms, *shift]

    whole = everything()
    monkeypatch.setattr(mixture, "_MAX_BYTES", held * 100 * 8)
    assert len(list(mixture._row_blocks(features.double()))) == -(-100 // held)
    assert everything() == SAME(whole)


@pytest.mark.parametrize("typical", [0.0, 0.3, 2.0, 20.0, 2e7])
def test_information_lies_between_zero_and_ln_n(typical):
    features = cloud(300, 6, typical)
    lower, upper = plug_in_terms(features, seeded(2), 4)
    pair, error = guaranteed_bounds(features), 4 * float(lower.std()) / (4 * 300) ** 0.5 + 1e-9
    assert -1e-12 <= pair.lower <= pair.upper <= log(300) + 1e-12
    assert pair.lower - error <= float(lower.mean()) <= pair.upper + error
    assert lower.max() <= log(300)  # for every image, not only on average
    assert (lower <= upper + log(300 / 299)).all()


@pytest.mark.parametrize("draws", [1, 3])
def test_one_image_has_no_information(draws):
    lower, upper = plug_in_terms(cloud(1, 3), seeded(), draws)
    assert lower.tolist() == [0.0]
    assert upper.tolist() == [torch.inf]  # there are no other rows
    assert guaranteed_bounds(cloud(1, 3)) == (0.0, 0.0)


def test_features_are_not_modified():
    features = cloud(20, 3).double()
    before = features.clone()
    guaranteed_bounds(features)
    plug_in_terms(features, seeded(), 1)
    mean_shift(features, seeded(), 1)
    assert features.equal(before)


class _EnoughProducts(Exception):
    """Enough tables have been computed; the others have the same size."""


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor, and stops after a number of matrix products."""

    def __init__(self, products):
        super().__init__()
        self.left, self.bytes = products, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
            self.left -= function is torch.ops.aten.addmm.default
        if self.left == 0:
            raise _EnoughProducts
        return made


@pytest.mark.parametrize("count", [20_000, 200_000])
@pytest.mark.parametrize(
    "measure", [guaranteed_bounds, lambda f: plug_in_terms(f, seeded(), 1), lambda f: mean_shift(f, seeded(), 1)]
)
def test_memory_of_many_images_is_limited(measure, count):
    features = cloud(count, 4)
    with pytest.raises(_EnoughProducts), Largest(3) as largest:
        measure(features)
    assert 8 * count * 4 < largest.bytes <= 32 * 2**20
