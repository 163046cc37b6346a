from math import e, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from audit.information.bounds import (
    BOUNDS,
    SMILE_CLIP,
    donsker_varadhan,
    infonce,
    infonce_terms,
    jensen_shannon,
    nwj,
    offsets,
    smile,
)

scores = st.integers(2, 8).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n), elements=st.floats(-50, 50)).map(torch.from_numpy)
)
ALL = pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
SHIFTLESS = pytest.mark.parametrize("bound", [donsker_varadhan, infonce])


@given(scores=scores)
def test_infonce_is_at_most_ln_n(scores):
    assert float(infonce(scores)) <= log(len(scores)) + 1e-9
    assert (infonce_terms(scores) <= log(len(scores)) + 1e-9).all()


@ALL
@given(scores=scores, seed=st.integers(0, 99))
def test_order_of_the_samples_has_no_effect(bound, scores, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(bound(scores[order][:, order]), bound(scores), atol=1e-9, rtol=1e-9)


@SHIFTLESS
@given(scores=scores, shift=st.floats(-20, 20))
def test_adding_a_constant_to_all_scores_has_no_effect(bound, scores, shift):
    torch.testing.assert_close(bound(scores + shift), bound(scores), atol=1e-9, rtol=1e-9)


@given(scores=scores, seed=st.integers(0, 99))
def test_offsets_of_images_affect_donsker_varadhan_only(scores, seed):
    offset = torch.randn(len(scores), 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(infonce(scores + offset), infonce(scores), atol=1e-9, rtol=1e-9)


@SHIFTLESS
@pytest.mark.parametrize("value", [-7.0, 0.0, 300.0])
def test_constant_scores_have_no_information(bound, value):
    assert float(bound(torch.full((6, 6), value))) == pytest.approx(0, abs=1e-4)


def test_a_perfect_diagonal():
    scores = torch.full((8, 8), -40.0)
    scores.fill_diagonal_(40.0)
    assert float(infonce(scores)) == pytest.approx(log(8))
    assert float(donsker_varadhan(scores)) == pytest.approx(80)  # joint 40, product -40: no upper limit on one batch


def test_donsker_varadhan_example():
    scores = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    assert float(donsker_varadhan(scores)) == pytest.approx(2 - log((1 + e**2) / 2))
    wanted = [1 - log((e + 1) / 2), 3 - log((e**2 + e**3) / 2)]
    assert infonce_terms(scores).tolist() == pytest.approx(wanted)
    assert float(infonce(scores)) == pytest.approx(sum(wanted) / 2)


@pytest.mark.parametrize("bound", [bound for bound in BOUNDS.values() if bound is not nwj])
def test_large_scores_do_not_overflow_and_have_gradients(bound):
    scores = (torch.randn(5, 5, generator=torch.Generator().manual_seed(0)) * 1e4).requires_grad_()
    value = bound(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    assert value.isfinite()
    assert gradient.isfinite().all()


def true_log_ratio(count=1000, seed=0):
    """x ~ N(0, 1), z = x + N: I = ln(2)/2; T = ln p(z|x)/p(z)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    z = x + torch.randn(count, generator=generator, dtype=torch.float64)
    return -0.5 * (z[None] - x[:, None]) ** 2 + 0.25 * z[None] ** 2 + 0.5 * log(2)


@pytest.mark.parametrize("bound", [donsker_varadhan, infonce, nwj, smile])
def test_true_log_ratio_of_a_gaussian_channel(bound):
    assert float(bound(true_log_ratio())) == pytest.approx(0.5 * log(2), abs=0.05)


@pytest.mark.parametrize("bound", [nwj, jensen_shannon])
def test_true_log_ratio_is_a_maximum(bound):
    scores = true_log_ratio()
    best = float(bound(scores))
    assert all(float(bound(changed)) < best for changed in (scores + 0.5, scores - 0.5, 1.5 * scores, 0.5 * scores))


@given(scores=scores)
def test_nwj_is_at_most_donsker_varadhan_with_equality_at_the_best_shift(scores):
    wanted = donsker_varadhan(scores)
    assert float(nwj(scores)) <= float(wanted) + 1e-9
    best = scores - (scores.diagonal().mean() - wanted)  # less ln E_product[exp T]
    torch.testing.assert_close(nwj(best), wanted, atol=1e-6, rtol=1e-6)


def test_smile_has_the_value_of_donsker_varadhan_and_the_gradient_of_jensen_shannon():
    within = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).clamp(-SMILE_CLIP, SMILE_CLIP)
    torch.testing.assert_close(smile(within), donsker_varadhan(within))
    beyond = (4 * within).requires_grad_()
    assert float(smile(beyond.detach())) != pytest.approx(float(donsker_varadhan(beyond.detach())), abs=1e-3)
    gradients = [torch.autograd.grad(bound(beyond), beyond)[0] for bound in (smile, jensen_shannon)]
    torch.testing.assert_close(*gradients)


def test_jensen_shannon_example_and_its_maximum():
    assert float(jensen_shannon(torch.zeros(4, 4))) == pytest.approx(0)
    scores = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    joint = (log(1 + e**-1) + log(1 + e**-3)) / 2
    assert float(jensen_shannon(scores)) == pytest.approx(2 * log(2) - joint - (log(2) + log(1 + e**2)) / 2)
    perfect = torch.full((8, 8), -40.0).fill_diagonal_(40.0)
    assert float(jensen_shannon(perfect)) == pytest.approx(2 * log(2))


def test_subtracting_offsets_restores_the_log_ratio():
    # offsets are computed from other features than the value, as for held-out values
    drift = 5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator, dtype=torch.float64)
    z, other = (base + torch.randn(1000, generator=generator, dtype=torch.float64) for base in (x, torch.flip(x, [0])))
    scores, aside = (-0.5 * (to[None] - x[:, None]) ** 2 + 0.25 * to[None] ** 2 + drift for to in (z, other))
    assert float(donsker_varadhan(scores)) < -5
    assert float(donsker_varadhan(scores - offsets(aside)[:, None])) == pytest.approx(0.5 * log(2), abs=0.05)
