"""The noise that fits a layer: it holds the target for any number, unit and kind of features, or says why not."""

from itertools import pairwise
from math import log, sqrt

import pytest
import torch
from torch import nn

from audit.adversary.threat import Linf
from audit.calibration.closed_forms import gaussian_vector
from audit.errors import InvalidModelError
from audit.information.estimator import EstimatorInputs
from audit.information.sandwich import Sandwich
from audit.information.smoothing.scale import fitted_unit, spread_of
from audit.representation.layers import Representation
from audit.types import Encoded

QUICK = Sandwich(steps=4, start_steps=3, quantisers=(4,), widths=(4.0,), annealing_steps=8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(count, dimensions, seed=0):
    return torch.randn(count, dimensions, generator=seeded(seed))


class Net(nn.Module):
    """Twelve ReLU features of 8x8 images, and six logits."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.hidden, self.head = nn.Linear(64, 12), nn.Linear(12, 6)

    def forward(self, images):
        return 3 * self.head(self.hidden(3 * images.flatten(1)).relu())


def inputs_of(change, layer="logits"):
    network, images = Net().requires_grad_(False), torch.rand(120, 1, 8, 8, generator=seeded())
    read = Representation(network, layer)
    return EstimatorInputs(
        lambda batch: Encoded(change(read(batch)), batch.new_empty(len(batch), 0)), images, torch.zeros(120).long()
    )


def rv(change, layer="logits", eps=0.03):
    found = QUICK.vulnerability(inputs_of(change, layer), Linf(eps), 0)
    return found.nats, found


@pytest.mark.parametrize("count", [150, 500])
@pytest.mark.parametrize("dimensions", [2, 10, 100, 1000, 2000])
def test_the_normal_case_is_at_the_target_in_any_dimension(dimensions, count):
    features = normal(count, dimensions)
    found = Sandwich().normal(EstimatorInputs(None, features, features[:, 0], Encoded(features, features[:, :0])), 0)
    assert found.nats == pytest.approx(1.5, abs=0.06)
    assert found.nats < found.ceiling / 2
    assert not found.flags


@pytest.mark.parametrize("dimensions", [2, 10, 100, 1000])
def test_the_fitted_noise_is_that_of_the_closed_form(dimensions):
    truth = gaussian_vector(dimensions, fitted_unit(normal(1000, dimensions), 1.5).noise)
    assert truth == pytest.approx(1.5, abs=0.08)  # of one sample: features of 2-d Gaussians differ by .04 nats


@pytest.mark.parametrize("target", [0.5, 1.0, 2.0])
def test_the_target_can_be_set(target):
    features = normal(600, 30)
    found = Sandwich(target_nats=target).normal(
        EstimatorInputs(None, features, features[:, 0], Encoded(features, features[:, :0])), 0
    )
    assert found.nats == pytest.approx(target, abs=0.06)


def test_a_target_above_half_the_ceiling_is_lowered():
    features = normal(10, 5)
    assert fitted_unit(features, 1.5).noise == pytest.approx(fitted_unit(features, log(10) / 2).noise)
    assert fitted_unit(features, 1.5).noise > 1.05 * fitted_unit(normal(60, 5), 1.5).noise


def test_the_scale_does_not_grow_with_the_number_of_images():
    noises = [fitted_unit(normal(count, 50, seed=count), 1.5).noise for count in (200, 400, 800, 1600)]
    assert all(one == pytest.approx(other, rel=0.04) for one, other in pairwise(noises))


def test_classes_apart_keep_a_tenth_of_a_deviation():
    # two classes hold ln 2, whatever little noise: jitter inside them must not be resolved to reach the target
    features = (2.0 * (torch.arange(200) % 2) - 1)[:, None] + 0.01 * normal(200, 1)
    found = fitted_unit(features, 1.5)
    assert found.noise == pytest.approx(0.1, rel=1e-3)
    assert Sandwich().normal(
        EstimatorInputs(None, features, features[:, 0], Encoded(features, features[:, :0])), 0
    ).nats == pytest.approx(log(2), abs=0.02)


ONE_LARGE = torch.tensor([1e4, 1, 1, 1, 1, 1])
UNCHANGED = {
    "times 1e6": lambda f: 1e6 * f,
    "times 1e-6": lambda f: 1e-6 * f,
    "one feature times 1e4": lambda f: f * ONE_LARGE,
    "features of 1e20": lambda f: 1e20 * f,
    "features of 1e-30": lambda f: 1e-30 * f,
    "30 % dead": lambda f: torch.cat([f, torch.full_like(f[:, :3], 7.0)], 1),
    "30 % dead, far larger": lambda f: torch.cat([torch.full_like(f[:, :3], -1e9), f], 1),
    "dead but for rounding": lambda f: torch.cat([f, 1e3 * (1 + 1e-7 * f[:, :2])], 1),
    "masked with -inf": lambda f: torch.cat([f, torch.full_like(f[:, :4], -torch.inf)], 1),
    "masked with the least float": lambda f: torch.cat([f, torch.full_like(f[:, :4], torch.finfo(f.dtype).min)], 1),
}


@pytest.mark.parametrize("change", UNCHANGED.values(), ids=UNCHANGED)
def test_units_and_dead_or_masked_features_change_no_rv(change):
    wanted, _ = rv(lambda f: f)
    found, both = rv(change)
    assert wanted > 0.1
    assert found == pytest.approx(wanted, abs=0.02)
    assert both.normal.nats == pytest.approx(1.5, abs=0.1)


def test_a_rotation_changes_rv_little():
    basis = torch.linalg.qr(normal(6, 6, seed=3)).Q
    assert rv(lambda f: f @ basis)[0] == pytest.approx(rv(lambda f: f)[0], abs=0.15)


@pytest.mark.parametrize("masked", [-1e9, -1e4, -torch.inf])
def test_logits_masked_for_unused_classes_keep_the_information_of_the_others(masked):
    # one unit for the layer is 1e9 / 2 here, under which the others vanish
    mask = torch.tensor([0, 0, 0, 0, masked, masked])
    found = Sandwich().normal(inputs_of(lambda f: f + mask), 0)
    alone = Sandwich().normal(inputs_of(lambda f: f[:, :4] if masked != -1e4 else f), 0)
    assert found.nats == pytest.approx(alone.nats, abs=0.1)
    assert found.nats > 1.2


def test_a_mask_that_differs_between_images_is_information():
    mask = -1e9 * (torch.arange(120) % 2 == 0).float()[:, None] * torch.tensor([1.0, 0, 0, 0, 0, 0])

    def change(features):
        return features + mask

    found = fitted_unit(change(inputs_of(lambda f: f).encoder(inputs_of(lambda f: f).images).features), 1.5)
    assert len(found.kept) == 6
    assert float(found.unit[0]) > 1e7
    assert float(found.unit[1:].max()) < 1e3


def test_a_feature_that_is_infinite_in_some_images_is_refused():
    given = inputs_of(lambda f: torch.cat([f, (f[:, :1] > 0) / 0.0], 1))
    with pytest.raises(InvalidModelError, match="the representation is not finite for "):
        QUICK.normal(given, 0)


def test_units_that_hardly_fire_do_not_decide():
    features = torch.cat([normal(300, 20), torch.zeros(300, 20)], 1)
    features[5, 20:] = 1e-6  # one image at a millionth of the others' size
    found = Sandwich().normal(EstimatorInputs(None, features, features[:, 0], Encoded(features, features[:, :0])), 0)
    few = features[:, :20]
    alone = Sandwich().normal(EstimatorInputs(None, few, few[:, 0], Encoded(few, few[:, :0])), 0)
    assert found.nats == pytest.approx(alone.nats, abs=0.05)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e9])
def test_a_constant_layer_has_a_unit_that_hides_rounding(value):
    features = torch.full((50, 4), value)
    found = fitted_unit(features, 1.5)
    assert found.of(features).abs().max() <= 1e-6
    assert found.noise >= 1


@pytest.mark.parametrize("scale", [1.0, 1e20, 1e-30])
def test_the_spread_equals_a_loop_over_features(scale):
    features = scale * normal(40, 7)
    spread = spread_of(features)
    for k in range(7):
        column = [float(value) for value in features[:, k]]
        mean = sum(column) / 40
        assert float(spread.mean[k]) == pytest.approx(mean, rel=1e-6)
        assert float(spread.deviation[k]) == pytest.approx(sqrt(sum((x - mean) ** 2 for x in column) / 40), rel=1e-6)
    # squares of deviations near 1e20 leave float32
    assert spread.layer_deviation == pytest.approx(scale * float(normal(40, 7).var(0, correction=0).mean().sqrt()))


def test_noise_is_added_to_the_features_that_are_seen_alone():
    features = torch.cat([normal(400, 3) * torch.tensor([1.0, 10.0, 1e4]), torch.full((400, 1), 5.0)], 1)
    smoothing = fitted_unit(features, 1.0)
    moved = features + torch.tensor([0.0, 0, 0, 2])
    noise = smoothing.noisy(moved, seeded()) - features
    assert noise[:, 3].tolist() == pytest.approx([0] * 400)
    assert noise.std(0)[:3].tolist() == pytest.approx(smoothing.unit[:3].tolist(), rel=0.1)


@pytest.mark.parametrize(
    ("deviations", "flagged"),
    [([1.0] * 10, False), ([1.0] * 9 + [1e4], True), ([1.0] * 3 + [8.0] * 2, False), ([1e-9] * 9 + [1.0], True)],
)
def test_one_unit_for_features_of_uneven_scale_is_flagged(deviations, flagged):
    features = normal(100, len(deviations)) * torch.tensor(deviations)
    (*flags,) = Sandwich(noise=0.5).smoothing(features).flags
    assert [each.startswith("uneven: half of the features deviate by at most ") for each in flags] == [True] * flagged
    assert Sandwich().smoothing(features).flags == ()
    assert Sandwich(noise=0.5, absolute=True).smoothing(features).flags == ()
