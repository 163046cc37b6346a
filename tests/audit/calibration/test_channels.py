"""Channels of known information: legal images, closed forms, and samples that agree with them."""

from math import log

import numpy as np
import pytest
import torch

from audit.calibration.catalogue import all_channels
from audit.calibration.channels import SPAN, as_images, as_values
from audit.calibration.closed_forms import bits, gaussian, sign_of_gaussian, three_points, two_points, uniform
from audit.calibration.label_channels import label_channels
from audit.information.smoothing.scale import fitted_unit
from audit.theory import binary_entropy

# those of label_channels have tests of their own: their balls leave the pixel range, where classes do not meet
LABELLED = {channel.name for channel in label_channels()}
ALL = [channel for channel in all_channels() if channel.name not in LABELLED]
EVERY = pytest.mark.parametrize("channel", ALL, ids=[f"{c.name}, {c.parameters}" for c in ALL])


def numbers(channel):
    """Return the numbers of parameters such as `sigma 0.5, shift 0.1`."""
    return [float(part.split(" ")[1]) for part in channel.parameters.split(", ")]


def named(name, parameters):
    (found,) = [channel for channel in ALL if (channel.name, channel.parameters) == (name, parameters)]
    return found


@EVERY
@pytest.mark.parametrize("count", [200, 201])
def test_samples_are_legal_images_with_labels(channel, count):
    images, labels = channel.sample(count, 0)
    assert images.shape[0] == labels.shape[0] == count
    assert images.dim() == 4
    assert (images.dtype, labels.dtype) == (torch.float32, torch.long)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert 0 <= int(labels.min()) <= int(labels.max()) < max(2, channel.classes)
    encoded = channel.noiseless_encoder()(images)
    assert encoded.features.isfinite().all()
    assert encoded.log_probs.shape == (count, channel.classes)
    assert float(encoded.log_probs.exp().sum(1).sub(1).abs().max() if channel.classes else 0.0) < 1e-5


@EVERY
def test_balls_lie_inside_the_pixel_range(channel):
    # otherwise the worst case of the closed form would be out of reach
    images = channel.sample(2000, 0).images
    assert 0 <= channel.eps <= 0.125
    outside = (images < channel.eps) | (images > 1 - channel.eps)
    assert float(outside.float().mean()) < 1e-4


@EVERY
def test_samples_are_deterministic_given_the_seed(channel):
    before = torch.random.get_rng_state()
    first, again, other = channel.sample(100, 0), channel.sample(100, 0), channel.sample(100, 1)
    assert first.images.equal(again.images)
    assert first.labels.equal(again.labels)
    assert not first.images.equal(other.images)
    noisy, same, new = channel.noisy_encoder(0), channel.noisy_encoder(0), channel.noisy_encoder(1)
    values = noisy(first.images).features
    assert values.equal(same(first.images).features)
    if channel.sigma:
        assert not values.equal(noisy(first.images).features)  # fresh noise at every call
        assert not values.equal(new(first.images).features)
    assert torch.random.get_rng_state().equal(before)


CLOSED_FORMS = {
    "two points": two_points,
    "three points": three_points,
    "Gaussian": gaussian,
    "uniform": uniform,
    "projection of 8x8 images": gaussian,
    "projection of 16x16 images": gaussian,
    "labels of two Gaussians": two_points,
}


def bit(distance, noise):
    """Information of a fair bit at -distance and distance through noise, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    odds = -2 * distance * (distance + noise * nodes) / noise**2
    return log(2) - float((weights / weights.sum()) @ np.logaddexp(0, odds))


def at_noise(channel, noise):
    """Normal and worst-case information of a channel with fitted noise, from the numbers of its name."""
    words = channel.name.split()
    if "Gaussian," in words:
        return [int(words[0].removesuffix("-d")) / 2 * log(1 + noise**-2)] * 2
    count, dimensions, (shift,) = int(words[0]), int(words[3]), numbers(channel)
    copies = [sum(feature % count == one for feature in range(dimensions)) for one in range(count)]
    return [sum(bit(distance, noise / each**0.5) for each in copies) for distance in (1, 1 - shift)]


@EVERY
def test_information_is_that_of_the_closed_forms(channel):
    if channel.name in CLOSED_FORMS:
        exact = CLOSED_FORMS[channel.name](*numbers(channel))
        assert (channel.normal_nats, channel.worst_nats) == pytest.approx(exact)
    elif channel.name == "sign of a Gaussian mixture":
        exact = sign_of_gaussian(*numbers(channel))
        assert (channel.normal_nats, channel.worst_nats) == (exact.normal, exact.worst)
    elif channel.target == "smoothed image":
        for noise in (0.3, 1.0, 4.0, 30.0):
            assert channel.at_noise(noise) == pytest.approx(at_noise(channel, noise), rel=1e-6, abs=1e-9)
    elif channel.name.endswith("-d Gaussian"):
        dimension = int(channel.name.removesuffix("-d Gaussian"))
        assert channel.normal_nats == pytest.approx(dimension / 2 * log(1 + channel.sigma**-2), abs=1e-5)
        assert channel.worst_nats is None
    else:
        assert channel.normal_nats == bits(0 if channel.name == "constant" else int(channel.name[0]))
        assert channel.worst_nats is None
    assert channel.worst_nats is None or 0 <= channel.worst_nats <= channel.normal_nats


def test_every_kind_of_channel_exists_and_channels_are_unique():
    assert {c.name for c in ALL} >= {*CLOSED_FORMS, "constant", "1 noiseless bits", "3 noiseless bits", "20-d Gaussian"}
    assert len({(c.name, c.parameters) for c in ALL}) == len(ALL)
    assert {c.name for c in ALL if not c.worst_is_exact} == {"Gaussian"}
    assert {c.sigma for c in ALL if not c.worst_is_exact} == {0.1}


@pytest.mark.parametrize("shape", [(5, 1), (7, 20)])
def test_reals_survive_the_encoding_as_images(shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    images = as_images(values)
    assert images.shape == (shape[0], 1, 1, shape[1])
    assert (as_values(images) - values).abs().max() < 2e-6  # pixels around .5 in float32
    assert as_values(torch.tensor([[[[0.0, 1.0]]]])).tolist() == [[-SPAN / 2, SPAN / 2]]


@pytest.mark.parametrize(
    ("name", "parameters", "points"),
    [("two points", "sigma 0.5, shift 0.5", (-1.0, 1.0)), ("three points", "sigma 0.25, shift 0.5", (-1.0, 0.0, 1.0))],
)
def test_noisy_samples_of_atoms_have_the_information_of_the_closed_form(name, parameters, points):
    channel = named(name, parameters)
    x = as_values(channel.sample(30_000, 0).images)
    z = channel.noisy_encoder(0)(channel.sample(30_000, 0).images).features
    own = -((z - x) ** 2) / (2 * channel.sigma**2)
    mixture = torch.stack([-((z - p) ** 2) / (2 * channel.sigma**2) for p in points]).logsumexp(0) - log(len(points))
    assert float((own - mixture).mean()) == pytest.approx(channel.normal_nats, abs=0.01)


@pytest.mark.parametrize("sigma", [1.0, 0.25])
def test_noisy_samples_of_reals_and_projections_have_the_expected_moments(sigma):
    for name in ("Gaussian", "projection of 8x8 images"):
        channel = named(name, f"sigma {sigma:g}, shift 0.25")
        images = channel.sample(5000, 0).images
        clean, noisy = channel.noiseless_encoder()(images).features, channel.noisy_encoder(0)(images).features
        assert float(clean.mean()) == pytest.approx(0, abs=2e-3)
        assert float(clean.std()) == pytest.approx(1, abs=5e-3)
        assert float((noisy - clean).std()) == pytest.approx(sigma, rel=0.03)
        correlation = float(torch.corrcoef(torch.stack([clean[:, 0], noisy[:, 0]]))[0, 1])
        assert -log(1 - correlation**2) / 2 == pytest.approx(channel.normal_nats, abs=0.03)


@pytest.mark.parametrize(("size", "shift"), [(8, 0.25), (16, 0.5)])
def test_the_radius_moves_the_projection_by_the_shift(size, shift):
    channel = named(f"projection of {size}x{size} images", f"sigma 1, shift {shift:g}")
    images = channel.sample(50, 0).images.requires_grad_()
    (slope,) = torch.autograd.grad(channel.noiseless_encoder()(images).features.sum(), images)
    moved = (
        channel.noiseless_encoder()(images + channel.eps * slope.sign()).features
        - channel.noiseless_encoder()(images).features
    )
    assert moved.flatten().tolist() == pytest.approx([shift] * 50, abs=1e-4)


def test_the_risks_of_the_sign_match_the_closed_form():
    channel = named("sign of a Gaussian mixture", "mean 0.6, spread 1, shift 0.7")
    images, labels = channel.sample(4000, 0)
    predictions = channel.noiseless_encoder()(images).log_probs.argmax(1)
    exact = sign_of_gaussian(0.6, 1.0, 0.7)
    assert float((predictions != labels).float().mean()) == pytest.approx(exact.risk, abs=2e-3)
    # in the worst case every image within reach has the same prediction, which minimises the entropy
    attacked = channel.noiseless_encoder()(images - channel.eps).log_probs.argmax(1)
    assert binary_entropy(float(attacked.float().mean())) == pytest.approx(exact.worst, abs=2e-3)


def test_noiseless_bits_are_uniform_and_recovered():
    for count in (1, 2, 3):
        channel = named(f"{count} noiseless bits", "eps 0")
        images, labels = channel.sample(800, 0)
        predictions = channel.noiseless_encoder()(images).log_probs.argmax(1)
        assert predictions.equal(labels)
        assert predictions.bincount().tolist() == [800 // 2**count] * 2**count


def test_labels_of_two_gaussians_have_the_information_of_the_closed_form():
    channel = named("labels of two Gaussians", "sigma 1, shift 0.5")
    images, labels = channel.sample(20_000, 0)
    z, side = as_values(images)[:, 0], 2.0 * labels - 1
    surprise = torch.nn.functional.softplus(-2 * side * z)  # -ln of the posterior 1 / (1 + exp(-2 y z))
    assert log(2) - float(surprise.mean()) == pytest.approx(channel.normal_nats, abs=0.01)


def test_the_gradient_of_the_sign_is_straight_through():
    channel = named("sign of a Gaussian mixture", "mean 1, spread 1, shift 0.5")
    images = channel.sample(20, 0).images.requires_grad_()
    features = channel.noiseless_encoder()(images).features
    assert set(features.flatten().round(decimals=4).tolist()) == {-1.0, 1.0}
    (slope,) = torch.autograd.grad(features[:, 1].sum(), images)
    assert slope.flatten().tolist() == pytest.approx([SPAN] * 20)


SMOOTHED = [channel for channel in ALL if channel.target == "smoothed image"]


@pytest.mark.parametrize("channel", SMOOTHED, ids=lambda channel: f"{channel.name}, {channel.parameters}")
def test_fitted_noise_holds_the_nominal_information_in_any_dimension(channel):
    sample = channel.sample(500, 0)
    features = channel.noiseless_encoder()(sample.images).features
    exact = channel.at_noise(fitted_unit(features, channel.normal_nats).noise)
    wanted = min(channel.normal_nats, 2 * log(2) if channel.name.startswith("2 bits") else channel.normal_nats)
    assert exact.normal == pytest.approx(wanted, abs=0.05)
    assert (channel.worst_nats is None) == (channel.eps == 0)


def test_smoothed_channels_have_2_to_2000_dimensions_of_which_bits_are_partly_dead():
    sizes = {channel.name: channel.features(channel.sample(8, 0).images) for channel in SMOOTHED}
    assert {int(name.split("-d ")[0]) for name in sizes if "-d " in name} == {2, 10, 100, 1000, 2000}
    bits = {int(name.split()[3]): features for name, features in sizes.items() if " bits " in name}
    assert set(bits) == {2, 10, 100, 1000, 2000}
    for dimensions, features in bits.items():
        dead = int((features == features[:1]).all(0).sum())
        assert dead / features.shape[1] == pytest.approx(0.3, abs=0.05)
        largest = features.abs().amax(0).sort().values
        assert float(largest[-1]) > 50 * float(largest[dimensions // 2])
