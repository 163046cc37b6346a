"""Saliency maps: gradients by finite differences, invariances, alignment and illegal settings."""

import pytest
import torch
from torch import nn

from audit.attribution.saliency import SaliencySettings, alignment, feature_saliency, layer_saliency
from audit.errors import UsageError
from audit.information.gaussian_mixture import plug_in_terms
from audit.random_keys import keyed_generator


def images(count=30):
    return torch.rand(count, 1, 4, 4, generator=keyed_generator(count))


def linear(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, outputs, bias=False))


def test_the_map_is_the_gradient_of_the_plug_in_estimate():
    encode, x = linear().double(), images().double()
    found = layer_saliency(encode, x, SaliencySettings(draws=300)).maps
    with torch.no_grad():
        scale = 0.5 * float(encode(x).var(0, correction=0).mean().sqrt())

        def value(at):
            return float(plug_in_terms(encode(at) / scale, keyed_generator(3), 300)[0].mean())

        for seed in range(6):
            direction = found / found.norm() + 0.3 * torch.randn(x.shape, generator=keyed_generator(seed)) / len(x)
            slope = (value(x + 1e-3 * direction) - value(x - 1e-3 * direction)) / 2e-3
            assert slope == pytest.approx(float((found * direction).sum()) / len(x), rel=0.06)


def test_maps_are_invariant_to_the_scale_of_the_layer_and_the_batch_size():
    encode, x = linear(), images()
    plain = layer_saliency(encode, x, SaliencySettings()).maps
    assert torch.allclose(layer_saliency(lambda b: 50 * encode(b), x, SaliencySettings()).maps, plain, atol=1e-4)
    assert torch.allclose(layer_saliency(encode, x, SaliencySettings(batch_size=7)).maps, plain, atol=1e-5)


def test_the_map_of_a_linear_feature_is_supported_on_its_weights():
    encode, x = linear(), images()
    encode[1].weight.data[1, 8:] = 0
    maps = feature_saliency(encode, x, 1, SaliencySettings()).maps.flatten(1)
    assert (maps[:, 8:] == 0).all()
    assert (maps[:, :8] != 0).any(1).all()
    cosine = torch.nn.functional.cosine_similarity(maps, encode[1].weight[1].detach()[None]).abs()
    assert torch.allclose(cosine, torch.ones(len(x)), atol=1e-4)


def test_a_constant_layer_has_zero_maps_without_alignment():
    x = images()
    maps = layer_saliency(lambda b: 0 * b.flatten(1)[:, :2] + 1, x, SaliencySettings()).maps
    assert (maps == 0).all()
    assert alignment(x, maps).alignment.isnan().all()


def test_noise_grows_until_images_are_not_separated():
    torch.manual_seed(0)
    encode, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3000)), images()
    found = layer_saliency(encode, x, SaliencySettings())
    assert found.noise > 0.5
    assert found.maps.flatten(1).any(1).all()
    assert layer_saliency(linear(), x, SaliencySettings()).noise == 0.5


def test_alignment_of_known_maps():
    x = images()
    aligned = alignment(x, -3 * x)
    assert torch.allclose(aligned.alignment, x.flatten(1).double().norm(dim=1))
    assert torch.allclose(aligned.cosine, torch.ones(30).double())
    assert torch.allclose(aligned.correlation, torch.ones(30).double())
    flat = alignment(x, torch.ones_like(x) + 0.001 * torch.randn(x.shape, generator=keyed_generator(1)))
    assert flat.cosine.min() > 0.7  # a constant map has a high cosine with any image
    assert flat.correlation.mean() < 0.5  # and a low correlation


def test_illegal_settings_are_refused():
    with pytest.raises(UsageError, match="coordinate 2 is out of range: the layer has 0 to 1"):
        feature_saliency(linear(), images(), 2, SaliencySettings())
    with pytest.raises(UsageError, match="noise 0 must be"):
        SaliencySettings(noise=0)
    with pytest.raises(UsageError, match="draws 0"):
        SaliencySettings(draws=0)
