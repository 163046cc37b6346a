"""Single features: ranges, receptive fields, closed forms, and networks of several libraries."""

import pytest
import torch
from torch import nn

from audit.adversary.threat import L2, Linf
from audit.attribution.receptive_field import field_size, receptive_field, unit_features
from audit.attribution.saliency import SaliencySettings, layer_saliency
from audit.attribution.single_features import FeatureRequest, FeatureSettings, audit_features, feature_ranges
from audit.calibration.closed_forms import gaussian
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from model_zoo import libraries


def images(count=40, channels=1, side=8):
    return torch.rand(count, channels, side, side, generator=keyed_generator(count, side))


def convolutional(side=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * (side // 2) ** 2, 5),
    ).eval()


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.03), 1), (L2(0.03), 2)])
def test_the_range_of_a_linear_feature_is_exact(threat, dual):
    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.3 + 0.4 * images()
    ranges = feature_ranges(Representation(network, "1"), x, torch.arange(3), threat, FeatureSettings(steps=2))
    half_width = threat.eps * network[1].weight.norm(p=dual, dim=1).detach()
    assert torch.allclose(ranges.high - ranges.clean, half_width.expand(40, 3), atol=1e-5)
    assert torch.allclose(ranges.clean - ranges.low, half_width.expand(40, 3), atol=1e-5)


def test_ranges_contain_values_inside_the_ball_and_passes_are_counted():
    network, x, counted = convolutional(), images(), []
    encode = Representation(network, "2")

    def counting(batch):
        counted.append(len(batch))
        return encode(batch)

    columns = unit_features(network, "2", x).columns
    ranges = feature_ranges(counting, x, columns, Linf(0.1), FeatureSettings(steps=3))
    assert (ranges.low <= ranges.clean).all()
    assert (ranges.clean <= ranges.high).all()
    drawn = encode((x + 0.1 * (2 * torch.rand(20, *x.shape) - 1)[0]).clamp(0, 1))[:, columns]
    assert ((ranges.low - 1e-5 <= drawn) & (drawn <= ranges.high + 1e-5)).all()
    pairs = 2 * len(x) * len(columns)
    assert sum(counted) == len(x) + pairs * (3 + 2)  # one shared pass, then one for each step and two evaluations
    assert ranges.passes == len(x) * (1 + len(columns)) / 2 + pairs * (3 + 1)


def test_results_do_not_depend_on_chunks_and_batches(monkeypatch):
    network, x = convolutional(), images()
    whole = audit_features(network, x, "2", Linf(0.1), FeatureSettings(steps=2))
    monkeypatch.setattr("audit.attribution.single_features._MAX_COPIED_PIXELS", 1)
    parts = audit_features(network, x, "2", Linf(0.1), FeatureSettings(steps=2, batch_size=7))
    assert [r.feature for r in parts.rows] == [r.feature for r in whole.rows]
    for one, other in zip(parts.rows, whole.rows, strict=True):
        assert one.rv == pytest.approx(other.rv, abs=1e-4)


def test_eps_0_has_no_vulnerability_and_rows_are_ranked_by_it():
    network, x = convolutional(), images()
    assert all(row.rv == 0 and row.reach == 0 for row in audit_features(network, x, "2", Linf(0.0)).rows)
    rows = audit_features(network, x, "2", Linf(0.05)).rows
    assert [row.rv for row in rows] == sorted((row.rv for row in rows), reverse=True)
    assert {row.feature for row in rows} == {0, 1, 2, 3}


def test_a_projection_matches_its_closed_form_at_any_scale():
    values = torch.special.ndtri((torch.arange(400) + 0.5).double() / 400).float()
    x = (0.5 + 0.05 * values).clamp(0, 1).view(-1, 1, 1, 1)
    truth = gaussian(0.5, 0.5)
    for gain in (1.0, 1000.0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1))
        nn.init.constant_(network[1].weight, gain)
        (row,) = audit_features(network, x, "1", Linf(0.025)).rows
        assert row.normal_nats == pytest.approx(truth.normal, abs=0.03)
        assert row.worst_nats == pytest.approx(truth.worst, abs=0.03)
        assert row.reach == pytest.approx(0.5, abs=0.02)


def test_layer_noise_distinguishes_features_of_different_scale():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    network[1].weight.data = torch.stack([torch.full((64,), 1.0), torch.full((64,), 0.01)])
    own = {r.feature: r for r in audit_features(network, images(100), "1", Linf(0.0)).rows}
    layer = {
        r.feature: r for r in audit_features(network, images(100), "1", Linf(0.0), FeatureSettings(scale="layer")).rows
    }
    assert own[0].normal_nats == pytest.approx(own[1].normal_nats, abs=0.01)
    assert layer[1].normal_nats < 0.05 < layer[0].normal_nats


def test_an_inactive_feature_has_no_information_and_no_gradient():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.ReLU())
    network[1].bias.data = torch.tensor([-100.0, 0.0])
    rows = {row.feature: row for row in audit_features(network, images(), "2", Linf(0.1)).rows}
    assert (rows[0].silent, rows[0].rv, rows[0].reach) == (1.0, 0.0, 0.0)


def test_a_unit_depends_on_its_receptive_field_only():
    network, x = convolutional(), images()
    encode, found = Representation(network, "2"), unit_features(network, "2", x)
    assert found.unit == (2, 2)
    field = receptive_field(encode, x, found.columns)
    assert field_size(field) == (5, 5)  # 3x3 with stride 2 over 3x3 with stride 1
    changed = torch.where(field, x, 1 - x)
    assert torch.equal(encode(changed)[:, found.columns], encode(x)[:, found.columns])
    corner = receptive_field(encode, x, unit_features(network, "2", x, (0, 0)).columns)
    assert field_size(corner) == (3, 3)
    assert field_size(receptive_field(Representation(network, "logits"), x, torch.arange(5))) == (8, 8)
    assert field_size(torch.zeros(8, 8, dtype=torch.bool)) == (0, 0)


@pytest.mark.parametrize(
    ("layer", "unit", "message"),
    [
        ("2", (4, 0), r"unit \(4, 0\) is outside the map of layer '2', which is 4x4"),
        ("5", (0,), r"layer '5' has no map, so no unit \(0,\)"),
    ],
)
def test_a_unit_outside_the_map_is_refused(layer, unit, message):
    with pytest.raises(UsageError, match=message):
        unit_features(convolutional(), layer, images(), unit)


def test_illegal_settings_are_refused():
    with pytest.raises(UsageError, match="feature 9 is out of range: the layer has features 0 to 3"):
        audit_features(convolutional(), images(), "2", Linf(0.1), request=FeatureRequest((9,)))
    with pytest.raises(UsageError, match="steps 0"):
        FeatureSettings(steps=0)
    with pytest.raises(UsageError, match="noise 0 must be above 0"):
        FeatureSettings(noise=0)
    with pytest.raises(UnknownNameError, match="noise scale 'layr'; did you mean 'layer'"):
        FeatureSettings(scale="layr")


@pytest.mark.parametrize(
    ("build", "layer", "side"),
    [
        (lambda: libraries.timm_build("resnet18", {"num_classes": 2}), "layer1.0.conv2", 32),
        (lambda: libraries.torchvision_build("resnet18", 2, None), "layer2.0.bn2", 32),
        (lambda: libraries.torchvision_build("vit_b_16", 2, 32), "encoder.layers.encoder_layer_0", 32),
    ],
)
def test_networks_of_libraries_at_a_named_layer(build, layer, side):
    network, x = build().eval(), torch.rand(4, 3, side, side, generator=keyed_generator(side))
    settings = FeatureSettings(steps=1, settle=1)
    found = audit_features(network, x, layer, Linf(0.02), settings, FeatureRequest((0, 1)))
    assert all(row.reach > 0 for row in found.rows)
    assert len(found.unit) == (1 if "encoder" in layer else 2)
    maps = layer_saliency(Representation(network, layer), x, SaliencySettings(draws=1)).maps
    assert maps.shape == x.shape
    assert maps.flatten(1).any(1).all()
