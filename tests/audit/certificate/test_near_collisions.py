"""The bound as a function of feature distance, on layers with known distances."""

import pytest
import torch

from audit.adversary.threat import Linf
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.near_collisions import delta_curve
from audit.certificate.settings import CertificateSettings

IDENTITY = DualPrecisionLayer(lambda x: x.flatten(1), lambda x: x.flatten(1))
PAIRS_ONLY = CertificateSettings(effort=SearchEffort(hubs=0, neighbours=1000))


def line(*values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("delta", "kept"), [(0.05, 4), (0.15, 3), (0.25, 2)])
def test_a_pair_collides_at_delta_if_its_balls_come_within_delta(delta, kept):
    """Images at the distances 0.12 and 0.22, each moved by up to 0.01."""
    clean, labels = line(0.1, 0.22, 0.5, 0.72), torch.tensor([0, 1, 0, 1])
    found = certify(IDENTITY, clean, labels, Linf(0.01), PAIRS_ONLY)
    assert found.bound.kept == 4
    (point,) = delta_curve(found, labels, 10.0, [delta / found.scale])
    assert point.delta == pytest.approx(delta)
    assert point.bound == kept / 4


def test_a_hub_collects_images_within_half_of_delta():
    """A hub between two images at the distance 0.2: 0.1 from each."""
    clean, labels = line(*[0.4] * 5, *[0.6] * 5), torch.tensor([0] * 5 + [1] * 5)
    found = certify(IDENTITY, clean, labels, Linf(0.0), CertificateSettings(effort=SearchEffort(hubs=1, neighbours=0)))
    hub = 0.4 + float(found.attempts[0].distance[0])
    far = max(abs(hub - 0.4), abs(hub - 0.6))
    near, wide = delta_curve(found, labels, 10.0, [1.9 * far / found.scale, 2.1 * far / found.scale])
    assert near.bound == 1
    assert wide.bound == 0.5


def test_the_curve_starts_at_the_bound_and_never_increases():
    clean = torch.rand(24, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.arange(24) % 3, torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) - 0.5
    layer = DualPrecisionLayer(lambda x: x.flatten(1) @ weight.T, lambda x: x.flatten(1) @ weight.double().T)
    found = certify(layer, clean, labels, Linf(0.03), CertificateSettings())
    curve = delta_curve(found, labels, 10.0, [0, 0.3, 0.01, 0.1, 3.0])
    bounds = [point.bound for point in curve]
    assert bounds[0] == found.bound.certified
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]
    assert [point.relative for point in curve] == [0, 0.01, 0.1, 0.3, 3.0]
