"""The released estimator: its formula including the masking error, and the order of searches and critic steps."""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import nn

from audit.adversary.threat import L1, L2, Linf
from audit.errors import InvalidModelError, UsageError
from audit.information.encoding import split_indices
from audit.information.estimator import EstimatorInputs, WarmStart
from audit.information.released.critic import ReferenceCritic, reference_ceiling, reference_influence, reference_value
from audit.information.released.estimator import Reference, _CriticDescent, _encoded_parts, _fit, _flags
from audit.representation.layers import Representation
from audit.types import Encoded

QUICK = Reference(width=8, steps=4, batch_size=16, every=2)
BOTH = pytest.mark.parametrize("per_position", [True, False])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, images):
        return 5 * self.layers(images)


@pytest.fixture(scope="module")
def inputs():
    images = torch.rand(60, 1, 8, 8, generator=seeded()).round(decimals=1)  # many pixels at 0 and 1
    encoder = Representation(SmallNet().eval().requires_grad_(False), "logits").encode
    return EstimatorInputs(encoder, images, torch.arange(60) % 3)


def slow_value(table):
    """The value of one table of scores (N, N) by the released formula, in a double loop."""
    count = len(table)
    joint = sum(float(table[i, i]) for i in range(count)) / count
    others = sum(exp(float(table[i, j])) for i in range(count) for j in range(count) if i != j)
    return joint - log(others + count) + log(count * (count - 1))


def test_value_equals_a_double_loop():
    scores = normal(3, 5, 5).double()
    by_position = sum(slow_value(table) for table in scores) / 3
    assert float(reference_value(scores, per_position=True)) == pytest.approx(by_position, abs=1e-12)
    averaged = [[sum(float(table[i, j]) for table in scores) / 3 for j in range(5)] for i in range(5)]
    assert float(reference_value(scores, per_position=False)) == pytest.approx(
        slow_value(torch.tensor(averaged)), abs=1e-6
    )
    assert float(reference_value(scores[:1], per_position=True)) == float(
        reference_value(scores[:1], per_position=False)
    )


@BOTH
def test_masking_error_is_reproduced(per_position):
    # equal scores have the Donsker-Varadhan value 0; the masked diagonal changes it
    for level in (0.0, 1.0, -30.0):
        value = float(reference_value(torch.full((2, 4, 4), level).double(), per_position=per_position))
        assert value == pytest.approx(level - log((12 * exp(level) + 4) / 12), abs=1e-9)
    # adding a constant to all scores does not change the Donsker-Varadhan value, but this one
    scores = normal(2, 6, 6).double()
    assert (
        float(reference_value(scores + 3, per_position=per_position))
        > float(reference_value(scores, per_position=per_position)) + 0.01
    )


@BOTH
def test_standard_error_agrees_with_the_jackknife(per_position):
    scores = normal(2, 80, 80).double() + 2 * torch.eye(80)
    without = []
    for left_out in range(80):
        kept = torch.arange(80) != left_out
        without.append(float(reference_value(scores[:, kept][:, :, kept], per_position=per_position)))
    jackknife = float(torch.tensor(without).std(correction=0)) * 79**0.5
    found = float(reference_influence(scores, per_position=per_position).std()) / 80**0.5
    assert found == pytest.approx(jackknife, rel=0.05)


@BOTH
def test_ceiling_is_reached_and_not_exceeded(per_position):
    for largest in (0.0, 0.5, 5.0, 60.0):
        best = torch.full((2, 6, 6), -largest).double()
        best.diagonal(dim1=1, dim2=2).fill_(largest)
        ceiling = reference_ceiling(largest, 6)
        assert float(reference_value(best, per_position=per_position)) == pytest.approx(ceiling, abs=1e-9)
        inside = (2 * torch.rand(50, 6, 6, generator=seeded()).double() - 1) * largest
        assert all(float(reference_value(each[None], per_position=per_position)) <= ceiling + 1e-9 for each in inside)
    # the number of images alone is no limit
    assert reference_ceiling(60.0, 6) > 60


@pytest.mark.parametrize(("channels", "side", "positions"), [(1, 8, 4), (3, 11, 4), (1, 28, 49), (3, 32, 64)])
def test_positions_and_the_largest_score(channels, side, positions):
    images, features = torch.rand(6, channels, side, side, generator=seeded()), normal(6, 5)
    critic = ReferenceCritic(images, features, 16, seeded())
    with torch.no_grad():
        critic.of_image.norm.bias.add_(normal(16, seed=1))
        critic.of_feature.norm.weight.mul_(normal(16, seed=2))
        scores = critic(images, features)
    assert scores.shape == (positions, 6, 6)
    assert float(scores.abs().max()) <= critic.largest_score() + 1e-4
    assert critic.largest_score() < 16**0.5 * (1 + 16**0.5) * 16**0.5 * 4


def test_scores_do_not_depend_on_the_rest_of_the_batch():
    images, features = torch.rand(5, 1, 8, 8, generator=seeded()), normal(5, 3)
    critic = ReferenceCritic(images, features, 8, seeded()).eval()
    with torch.no_grad():
        scores = critic(images, features)
        for i, j in ((0, 0), (1, 4), (4, 1)):
            alone = critic(images[i : i + 1], features[j : j + 1])
            assert torch.allclose(scores[:, i, j], alone[:, 0, 0], atol=1e-5)


def test_shortcut_is_initialised_to_the_identity():
    images = torch.rand(4, 1, 8, 8, generator=seeded())
    narrow = ReferenceCritic(images, normal(4, 5), 8, seeded()).of_feature.shortcut.weight.detach()
    assert torch.equal(narrow.diagonal(), torch.ones(5))
    assert 0.005 < float((narrow - torch.eye(8, 5)).abs().max()) <= 0.01
    wide = ReferenceCritic(images, normal(4, 20), 8, seeded()).of_feature.shortcut.weight.detach()
    assert float(wide.abs().max()) <= 20**-0.5
    assert float(wide.abs().max()) > 0.02


class RecordingEncoder:
    """An encoder that records every batch, and whether it requires a gradient."""

    def __init__(self, encoder):
        self.encoder, self.seen = encoder, []

    def __call__(self, images):
        self.seen.append((images.detach().clone(), images.requires_grad))
        return self.encoder(images)


def test_every_search_starts_from_the_clean_images(inputs):
    """Max-min: before each critic step, seven steps and a last evaluation, from the clean batch."""
    recording, threat = RecordingEncoder(inputs.encoder), Linf(0.1)
    normal_case = QUICK.normal(inputs, 0)
    found = QUICK.vulnerability(inputs._replace(encoder=recording), threat, 0, WarmStart(normal_case))
    clean = inputs.images.flatten(1)
    searches = [batch for batch in recording.seen if batch[1]]
    # 4 critic steps, and validation (12 images) and held-out images (18, in two batches) evaluated 2 + 1 times
    assert len(searches) == 7 * (4 + 2 + 2)
    for number, (batch, _) in enumerate(searches):
        nearest = torch.cdist(batch.flatten(1), clean, p=torch.inf).amin(1)
        # the n-th iterate is at most n - 1 steps of 0.01 away
        assert float(nearest.max()) <= 0.01 * (number % 7) + 1e-6
        assert (float(nearest.max()) == 0) == (number % 7 == 0)
    assert found.passes == 60 * 0.5 + 7.5 * (4 * 16 + 2 * 12 + 18)


@pytest.mark.parametrize(
    ("threat", "size"), [(Linf(0.03), 0.01), (Linf(2 / 255), 0.01), (L2(0.6), 0.2), (L1(3.0), 1.0)]
)
@BOTH
def test_every_iterate_is_legal(inputs, threat, size, per_position):
    recording = RecordingEncoder(inputs.encoder)
    settings = replace(QUICK, per_position=per_position, step_size=size, steps=2)
    found = settings.vulnerability(inputs._replace(encoder=recording), threat, 0)
    everything = torch.cat([images for images, _ in recording.seen])
    assert 0 <= float(everything.min()) <= float(everything.max()) <= 1
    nearest = torch.stack([threat.distance(everything, x.expand_as(everything)) for x in inputs.images]).amin(0)
    assert threat.eps * 0.9 < float(nearest.max()) <= threat.eps + 1e-6
    assert torch.equal(found.indices, split_indices(60, 0).test)
    moved = threat.distance(found.adversarial, inputs.images[found.indices])
    assert float(moved.max()) <= threat.eps + 1e-6
    assert found.adversarial.shape == (18, 1, 8, 8)


@BOTH
def test_best_iterate_of_the_batch_is_kept(inputs, per_position):
    """Its value is at most that of the clean batch, and is the value reported."""
    settings = replace(QUICK, per_position=per_position)
    values = []

    class Recording:
        def __init__(self, search):
            self.search = search

        def __call__(self, critic, clean):
            moved = self.search(critic, clean)
            with torch.no_grad():
                before_and_after = [
                    float(reference_value(critic.eval()(*batch), per_position=per_position)) for batch in (clean, moved)
                ]
            values.append(before_and_after)
            return moved

    search = Recording(_CriticDescent(settings, inputs.encoder, Linf(0.1)))
    estimate, _ = _fit(settings, _encoded_parts(settings, inputs, 0), search, 0)
    assert all(after <= before + 1e-6 for before, after in values)
    assert sum(after < before - 1e-4 for before, after in values) >= 6  # of 8 batches
    assert estimate.nats == pytest.approx((values[-2][1] + values[-1][1]) / 2, abs=1e-5)


def test_gradient_passes_through_the_representation_alone(inputs):
    """A constant representation has a zero gradient, although the critic also depends on the image."""

    def encoder(images):
        return Encoded(0 * images.flatten(1)[:, :2] + 3, images.new_empty(len(images), 0))

    found = QUICK.vulnerability(inputs._replace(encoder=encoder), Linf(0.1), 0)
    assert torch.equal(found.adversarial, inputs.images[found.indices])
    assert found.worst.nats == pytest.approx(found.normal.nats, abs=1e-6)


@BOTH
def test_worst_case_equals_normal_case_at_eps_0(inputs, per_position):
    settings = replace(QUICK, per_position=per_position)
    found = settings.vulnerability(inputs, Linf(0.0), 3)
    assert found.worst == found.normal == settings.normal(inputs, 3)
    assert found.nats == 0
    assert torch.equal(found.adversarial, inputs.images[found.indices])


def test_results_depend_on_the_seed_alone(inputs):
    before = torch.random.get_rng_state()
    first, again = (QUICK.vulnerability(inputs, Linf(0.05), 1) for _ in range(2))
    torch.manual_seed(5)
    after_other_draws = QUICK.vulnerability(inputs, Linf(0.05), 1)
    torch.random.set_rng_state(before)
    other = QUICK.vulnerability(inputs, Linf(0.05), 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.normal == again.normal == after_other_draws.normal == QUICK.normal(inputs, 1)
    assert first.worst == again.worst == after_other_draws.worst
    assert other.normal.nats != first.normal.nats


def test_dependent_and_independent_features():
    """Eight levels of brightness, encoded by the representation (ln 8 = 2.08 nats) or permuted at random (0)."""
    level = torch.arange(240) % 8
    pixels = 0.5 + (level[:, None, None, None] - 3.5) / 16 + 0.05 * normal(240, 1, 8, 8)
    shuffled = level[torch.randperm(240, generator=seeded(1))]
    settings = Reference(width=32, steps=100, batch_size=64, learning_rate=1e-3, every=50)

    def estimate(names):
        vectors = torch.eye(8)[names]

        def encoder(images):
            nearest = torch.cdist(images.flatten(1), pixels.flatten(1)).argmin(1)
            return Encoded(vectors[nearest], images.new_empty(len(images), 0))

        return settings.normal(EstimatorInputs(encoder, pixels, level), 0)

    dependent, independent = estimate(level), estimate(shuffled)
    assert 1.2 < dependent.nats < log(8)
    assert dependent.flags == ("not_converged: the critic was still improving at its last step",)
    # overfitting of 120 images without early stopping lowers the held-out value to -2.4 nats
    assert independent.nats < 0
    assert independent.training_history[-1][1] > 1
    assert independent.flags == ("not_converged: the critic was better on validation images at an earlier step",)


def test_class_attributes():
    assert (Reference().name, Reference(per_position=False).name) == ("ref-local", "ref-mean")
    assert not Reference.ranks
    assert (Reference.quantity, Reference.floor_kind) == ("I(X; g(X))", "predictions")


def test_attributes_of_an_estimate(inputs):
    found = QUICK.normal(inputs, 0)
    assert [step for step, _ in found.history] == [2, 4]
    assert [step for step, _ in found.training_history] == [0, 2]
    assert found.validated == found.history[-1][1]
    assert found.images == 18
    assert found.stderr > 0
    assert found.nats < found.ceiling


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ((0.1, 0.2, 0.3), "the critic was still improving at its last step"),
        ((0.3,), "the critic was still improving at its last step"),
        ((0.1, 0.5, 0.2), "the critic was better on validation images at an earlier step"),
        ((0.1, 0.3, 0.2), None),  # less than two standard errors below its best
        ((0.1, float("nan"), 0.2), "the critic's value diverged during training"),
    ],
)
def test_flags_of_the_last_step(values, flag):
    history = tuple(enumerate(values))
    assert _flags(history, stderr=0.1) == ((f"not_converged: {flag}",) if flag else ())


def test_rejects_a_layer_without_gradient(inputs):
    def encoder(images):
        return Encoded(images.detach().flatten(1)[:, :2], images.new_empty(len(images), 0))

    with pytest.raises(InvalidModelError, match="gives no gradient to its input"):
        QUICK.vulnerability(inputs._replace(encoder=encoder), Linf(0.1), 0)


def test_rejects_a_gradient_that_is_not_finite(inputs):
    def encoder(images):
        features = (images.flatten(1) - images.flatten(1)).square().sum(1, keepdim=True).sqrt()  # 0, slope NaN
        return Encoded(features, images.new_empty(len(images), 0))

    with pytest.raises(InvalidModelError, match="the gradient to the input is not finite for 16 of 16 images"):
        QUICK.vulnerability(inputs._replace(encoder=encoder), Linf(0.1), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "reference width 0 must be at least 1"),
        ({"steps": 0}, "reference steps 0 must be at least 1"),
        ({"search_steps": 0}, "reference search_steps 0 must be at least 1"),
        ({"every": 0}, "reference every 0 must be at least 1"),
        ({"batch_size": 1}, "reference batch_size 1 must be at least 2"),
        ({"learning_rate": 0.0}, "reference learning_rate 0.0 must be above 0 and finite"),
        ({"step_size": float("nan")}, "reference step_size nan must be above 0 and finite"),
    ],
)
def test_rejects_illegal_settings(change, message):
    with pytest.raises(UsageError, match=message):
        Reference(**change)


def test_rejects_images_that_are_too_small(inputs):
    with pytest.raises(UsageError, match="images of 8 x 7 pixels are too small for this critic: it needs 8 x 8"):
        ReferenceCritic(torch.rand(4, 1, 8, 7), normal(4, 3), 8, seeded())
