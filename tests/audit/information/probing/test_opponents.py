"""Descent against probes: the hinge at the prior, legality, partial steps, memory, and independence of batches."""

import pytest
import torch

from audit.adversary.threat import L1, L2, Linf
from audit.information.probing.members import Readers
from audit.information.probing.opponents import KINDS, Field, ProbeDescent, fit_opponent
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.types import Encoded

READERS = Readers(PanelSettings(), ProbeTraining(steps=40))
THREATS = pytest.mark.parametrize("threat", [Linf(0.05), L2(0.2), L1(0.6)], ids=["linf", "l2", "l1"])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(images):
    values = images.flatten(1)
    return Encoded(values @ WEIGHTS, torch.stack([values[:, 0], values[:, 1]], 1).log_softmax(1))


WEIGHTS = torch.randn(9, 3, generator=seeded(1))


def field(threat, batch_size=256, count=60):
    images = torch.rand(count, 1, 3, 3, generator=seeded())
    return Field(encoder, images, (images.flatten(1)[:, 0] > images.flatten(1)[:, 1]).long(), threat, batch_size)


@pytest.mark.parametrize("kind", KINDS)
@THREATS
def test_descent_lowers_what_an_opponent_reads_and_stays_legal(kind, threat):
    target = field(threat)
    opponent = fit_opponent(kind, encoder(target.clean), target.labels, READERS)
    descent, index = ProbeDescent(target, [opponent]), torch.arange(60)
    moved = descent.run(target.clean, 5 * [0.2 * threat.eps], torch.rand(60, generator=seeded(2)))
    before, after = (float(descent.value(encoder(images), index).mean()) for images in (target.clean, moved))
    assert after < 0.9 * before
    assert float(threat.distance(moved, target.clean).max()) <= threat.eps * (1 + 1e-6)
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1


def test_images_stop_where_the_posterior_is_the_prior():
    images = torch.tensor([0.7, 0.3])[:, None, None, None].repeat(20, 1, 1, 1)
    labels = torch.tensor([1, 0]).repeat(20)
    scores = torch.tensor([-20.0, 20.0])

    def one_pixel(batch):
        return Encoded(batch.flatten(1), ((batch.flatten(1) - 0.5) * scores).log_softmax(1))

    target = Field(one_pixel, images, labels, Linf(0.4), 256)
    opponent = fit_opponent("own", one_pixel(images), labels, READERS)
    stopped, pushed = (
        ProbeDescent(target, [opponent], hinge).run(images, 40 * [0.01]).flatten() for hinge in (True, False)
    )
    assert float((stopped - 0.5).abs().max()) < 0.011
    assert float((pushed - 0.5).abs().min()) > 0.19


def test_value_is_the_mean_over_opponents_of_the_excess_over_the_prior():
    target = field(Linf(0.1))
    encoded, index = encoder(target.clean), torch.tensor([3, 11, 40])
    opponents = [fit_opponent(kind, encoded, target.labels, READERS) for kind in ("linear", "neighbours")]
    some = Encoded(encoded.features[index], encoded.log_probs[index])
    expected = []
    for number in range(3):
        label = int(target.labels[index[number]])
        share = float((target.labels == label).float().mean())
        told = [float(opponent(some)[number, label]) - torch.tensor(share).log().item() for opponent in opponents]
        expected.append(sum(max(0.0, each) for each in told) / 2)
    assert ProbeDescent(target, opponents).value(some, index).tolist() == pytest.approx(expected, abs=1e-5)


def test_batches_have_no_effect():
    moved = []
    for size in (256, 7):
        target = field(Linf(0.05), size)
        opponents = [fit_opponent(kind, encoder(target.clean), target.labels, READERS) for kind in KINDS]
        moved.append(ProbeDescent(target, opponents).run(target.clean, 4 * [0.01], torch.rand(60, generator=seeded(4))))
    assert torch.allclose(*moved, atol=1e-6)


def test_a_share_of_zero_leaves_an_image_and_of_one_takes_the_whole_step():
    target = field(Linf(0.05))
    opponents = [fit_opponent("linear", encoder(target.clean), target.labels, READERS)]
    descent, share = ProbeDescent(target, opponents), (torch.arange(60) % 2).float()
    moved, whole = descent.run(target.clean, [0.02], share), descent.run(target.clean, [0.02])
    assert moved[::2].equal(target.clean[::2])
    assert torch.allclose(moved[1::2], whole[1::2], atol=1e-7)
