"""Single features: their ends, their receptive fields, and networks of every source at a named layer."""

import pytest
import torch
from torch import nn

from audit.adversary.threat import L2, Linf
from audit.attribution.receptive_field import field_size, receptive_field, units
from audit.attribution.saliency import SaliencySettings, layer_saliency
from audit.attribution.single_features import FeatureRequest, FeatureSettings, audit_features, reach
from audit.calibration.closed_forms import gaussian
from audit.errors import UnknownNameError, UsageError
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from model_zoo import libraries


def images(count=40, channels=1, side=8):
    return torch.rand(count, channels, side, side, generator=keyed_generator(count, side))


def convolutional(side=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(4 * (side // 2) ** 2, 5)).eval()  # fmt: skip


@pytest.mark.parametrize(("threat", "dual"), [(Linf(0.03), 1), (L2(0.03), 2)])
def test_the_ends_of_a_linear_feature_are_exact(threat, dual):
    torch.manual_seed(1)
    network, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), 0.3 + 0.4 * images()
    ends = reach(Representation(network, "1"), x, torch.arange(3), threat, FeatureSettings(steps=2))
    half = threat.eps * network[1].weight.norm(p=dual, dim=1).detach()
    assert torch.allclose(ends.high - ends.clean, half.expand(40, 3), atol=1e-5)
    assert torch.allclose(ends.clean - ends.low, half.expand(40, 3), atol=1e-5)


def test_the_ends_are_values_inside_the_ball_and_cost_what_is_counted():
    network, x, counted = convolutional(), images(), []
    read = Representation(network, "2")

    def counting(batch):
        counted.append(len(batch))
        return read(batch)

    columns = units(network, "2", x).columns
    ends = reach(counting, x, columns, Linf(0.1), FeatureSettings(steps=3))
    assert (ends.low <= ends.clean).all()
    assert (ends.clean <= ends.high).all()
    drawn = read((x + 0.1 * (2 * torch.rand(20, *x.shape) - 1)[0]).clamp(0, 1))[:, columns]
    assert ((ends.low - 1e-5 <= drawn) & (drawn <= ends.high + 1e-5)).all()
    pairs = 2 * len(x) * len(columns)
    assert sum(counted) == len(x) + pairs * (3 + 2)  # one shared pass; then a step each, and both ends judged
    assert ends.passes == len(x) * (1 + len(columns)) / 2 + pairs * (3 + 1)


def test_chunks_and_batches_decide_nothing(monkeypatch):
    network, x = convolutional(), images()
    whole = audit_features(network, x, "2", Linf(0.1), FeatureSettings(steps=2))
    monkeypatch.setattr("audit.attribution.single_features._HELD", 1)
    parts = audit_features(network, x, "2", Linf(0.1), FeatureSettings(steps=2, batch_size=7))
    assert [r.feature for r in parts.rows] == [r.feature for r in whole.rows]
    for one, other in zip(parts.rows, whole.rows, strict=True):
        assert one.rv == pytest.approx(other.rv, abs=1e-4)


def test_no_ball_no_vulnerability_and_ranked_most_vulnerable_first():
    network, x = convolutional(), images()
    assert all(row.rv == 0 and row.reach == 0 for row in audit_features(network, x, "2", Linf(0.0)).rows)
    rows = audit_features(network, x, "2", Linf(0.05)).rows
    assert [row.rv for row in rows] == sorted((row.rv for row in rows), reverse=True)
    assert {row.feature for row in rows} == {0, 1, 2, 3}


def test_a_projection_of_known_information_is_found_whatever_its_scale():
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


def test_noise_of_the_layer_tells_strong_features_from_weak_ones():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    network[1].weight.data = torch.stack([torch.full((64,), 1.0), torch.full((64,), 0.01)])
    own = {r.feature: r for r in audit_features(network, images(100), "1", Linf(0.0)).rows}
    layer = {
        r.feature: r for r in audit_features(network, images(100), "1", Linf(0.0), FeatureSettings(scale="layer")).rows
    }
    assert own[0].normal_nats == pytest.approx(own[1].normal_nats, abs=0.01)
    assert layer[1].normal_nats < 0.05 < layer[0].normal_nats


def test_a_dead_feature_tells_nothing_and_says_that_it_has_no_gradient():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.ReLU())
    network[1].bias.data = torch.tensor([-100.0, 0.0])
    rows = {row.feature: row for row in audit_features(network, images(), "2", Linf(0.1)).rows}
    assert (rows[0].silent, rows[0].rv, rows[0].reach) == (1.0, 0.0, 0.0)


def test_a_unit_sees_its_receptive_field_only():
    network, x = convolutional(), images()
    read, found = Representation(network, "2"), units(network, "2", x)
    assert found.unit == (2, 2)
    field = receptive_field(read, x, found.columns)
    assert field_size(field) == (5, 5)  # 3x3 with stride 2 over 3x3 with stride 1
    changed = torch.where(field, x, 1 - x)
    assert torch.equal(read(changed)[:, found.columns], read(x)[:, found.columns])
    corner = receptive_field(read, x, units(network, "2", x, (0, 0)).columns)
    assert field_size(corner) == (3, 3)
    assert field_size(receptive_field(Representation(network, "logits"), x, torch.arange(5))) == (8, 8)
    assert field_size(torch.zeros(8, 8, dtype=torch.bool)) == (0, 0)


@pytest.mark.parametrize(("layer", "unit", "message"), [
    ("2", (4, 0), r"unit \(4, 0\) is not on the map of layer '2', which is 4x4"),
    ("5", (0,), r"layer '5' has no map, so no unit \(0,\)"),
])  # fmt: skip
def test_a_unit_that_is_not_there_is_refused(layer, unit, message):
    with pytest.raises(UsageError, match=message):
        units(convolutional(), layer, images(), unit)


def test_wrong_settings_are_refused():
    with pytest.raises(UsageError, match="feature 9 is not there: the layer has features 0 to 3"):
        audit_features(convolutional(), images(), "2", Linf(0.1), request=FeatureRequest((9,)))
    with pytest.raises(UsageError, match="steps 0"):
        FeatureSettings(steps=0)
    with pytest.raises(UsageError, match="noise 0 must be above 0"):
        FeatureSettings(noise=0)
    with pytest.raises(UnknownNameError, match="noise scale 'layr'; did you mean 'layer'"):
        FeatureSettings(scale="layr")


@pytest.mark.parametrize(("build", "layer", "side"), [
    (lambda: libraries.timm_build("resnet18", {"num_classes": 2}), "layer1.0.conv2", 32),
    (lambda: libraries.torchvision_build("resnet18", 2, None), "layer2.0.bn2", 32),
    (lambda: libraries.torchvision_build("vit_b_16", 2, 32), "encoder.layers.encoder_layer_0", 32),
])  # fmt: skip
def test_networks_of_libraries_at_a_named_layer(build, layer, side):
    network, x = build().eval(), torch.rand(4, 3, side, side, generator=keyed_generator(side))
    settings = FeatureSettings(steps=1, settle=1)
    found = audit_features(network, x, layer, Linf(0.02), settings, FeatureRequest((0, 1)))
    assert all(row.reach > 0 for row in found.rows)
    assert len(found.unit) == (1 if "encoder" in layer else 2)
    maps = layer_saliency(Representation(network, layer), x, SaliencySettings(draws=1)).maps
    assert maps.shape == x.shape
    assert maps.flatten(1).any(1).all()
