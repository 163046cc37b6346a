from math import e, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from audit.bounds import BOUNDS, donsker_varadhan, infonce, infonce_terms

scores = st.integers(2, 8).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-50, 50)).map(torch.from_numpy)
)
ALL = pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)


@given(scores=scores)
def test_infonce_never_exceeds_the_log_of_the_batch(scores):
    assert float(infonce(scores)) <= log(len(scores)) + 1e-9
    assert (infonce_terms(scores) <= log(len(scores)) + 1e-9).all()


@ALL
@given(scores=scores, seed=st.integers(0, 99))
def test_the_order_of_the_samples_does_not_matter(bound, scores, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(bound(scores[order][:, order]), bound(scores), atol=1e-9, rtol=1e-9)


@ALL
@given(scores=scores, shift=st.floats(-20, 20))
def test_a_constant_added_to_all_scores_does_not_matter(bound, scores, shift):
    torch.testing.assert_close(bound(scores + shift), bound(scores), atol=1e-9, rtol=1e-9)


@given(scores=scores, seed=st.integers(0, 99))
def test_an_offset_per_image_moves_only_donsker_varadhan(scores, seed):
    offset = torch.randn(len(scores), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(infonce(scores + offset), infonce(scores), atol=1e-9, rtol=1e-9)


@ALL
@pytest.mark.parametrize("value", [-7.0, 0.0, 300.0])
def test_constant_scores_carry_nothing(bound, value):
    assert float(bound(torch.full((6, 6), value))) == pytest.approx(0, abs=1e-4)


def test_a_perfect_diagonal():
    scores = torch.full((8, 8), -40.0)
    scores.fill_diagonal_(40.0)
    assert float(infonce(scores)) == pytest.approx(log(8))
    assert float(donsker_varadhan(scores)) == pytest.approx(80)  # joint 40, product -40: no ceiling on one batch


def test_donsker_varadhan_by_hand():
    scores = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert float(donsker_varadhan(scores)) == pytest.approx(2 - log((1 + e**2) / 2))
    wanted = [1 - log((e + 1) / 2), 3 - log((e**2 + e**3) / 2)]
    assert infonce_terms(scores).tolist() == pytest.approx(wanted)
    assert float(infonce(scores)) == pytest.approx(sum(wanted) / 2)


@ALL
def test_large_scores_do_not_overflow_and_have_gradients(bound):
    scores = (torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) * 1e4).requires_grad_()
    value = bound(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    assert value.isfinite()
    assert gradient.isfinite().all()


@ALL
def test_the_true_log_ratio_of_a_gaussian_channel_gives_its_information(bound):
    # x ~ N(0, 1), z = x + N: I = ln(2)/2; T = ln p(z|x)/p(z)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator, dtype=torch.float64)
    z = x + torch.randn(1000, generator=generator, dtype=torch.float64)
    scores = -0.5 * (z[None] - x[:, None]) ** 2 + 0.25 * z[None] ** 2 + 0.5 * log(2)
    assert float(bound(scores)) == pytest.approx(0.5 * log(2), abs=0.05)
