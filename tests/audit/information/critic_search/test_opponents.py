"""Mixing of merged images, classes that are held, and rounds against several critics."""

import torch

from audit.adversary.threat import Linf
from audit.information.critic_search.merging import Adversary, CountingEncoder
from audit.information.critic_search.opponents import HeldClass, Mixing, _alikeness
from audit.information.settings import WorstCaseSearch
from audit.types import Encoded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def encoder(images):
    """Features are two halves of the image; the class is that of the brighter half."""
    halves = torch.stack([images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))], 1)
    return Encoded(halves, (20 * halves).log_softmax(1))


def mixed(images, target=None, eps=0.2):
    network, adversary = CountingEncoder(encoder, 64), Adversary(Linf(eps), WorstCaseSearch())
    return Mixing(network, images, adversary).run(images, target, 20), network


def correlation(images, clean):
    one, other = encoder(images).features[:, 0], encoder(clean).features[:, 0]
    return abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))


def patterns(count=200):
    """Flat images of two halves of any brightness."""
    halves = 0.4 + 0.2 * torch.rand(count, 1, 1, 2, generator=seeded())
    return halves.repeat_interleave(4, 3).expand(-1, 1, 8, 8).contiguous()


def test_mixed_images_no_longer_follow_the_clean_ones():
    clean = patterns()
    images, network = mixed(clean)
    assert float((images - clean).abs().max()) <= 0.2 + 1e-6
    assert correlation(clean, clean) > 0.99
    assert correlation(images, clean) < 0.5
    assert network.passes == (20 + 0.5) * len(clean)


def test_images_whose_class_is_held_keep_it():
    clean = patterns()
    before = encoder(clean).log_probs.argmax(1)
    images, _ = mixed(clean, target=1)
    assert encoder(images).log_probs[before == 1].argmax(1).eq(1).all()
    free, _ = mixed(clean)
    assert not encoder(free).log_probs[before == 1].argmax(1).eq(1).all()


def test_penalty_counts_held_images_below_the_margin():
    log_probs = torch.tensor([[0.0, -3.0], [-0.5, -1.0], [-3.0, -0.1]])
    held = HeldClass(0, torch.tensor([True, True, False]))
    assert float(held.penalty(log_probs, torch.arange(3))) == 5.0  # margins 3 and .5, the third is not held
    assert float(held.penalty(log_probs[2:], torch.tensor([2]))) == 0
    assert float(HeldClass.of(Encoded(torch.zeros(3, 2), torch.zeros(3, 0)), None).penalty(log_probs, slice(3))) == 0


def test_alikeness_is_largest_for_the_nearest_and_zero_for_the_image_itself():
    views = torch.arange(32.0)[:, None]
    weights = _alikeness(views, torch.tensor([10, 20]), torch.arange(32))
    assert weights.mean(1).allclose(torch.ones(2))
    assert weights[0, 10] == 0
    assert set(weights[0].topk(2).indices.tolist()) == {9, 11}
