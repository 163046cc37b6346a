"""Ranges before ReLUs, one side first; rows of one image and of several; the order in which a ledger tries images."""

import copy

import pytest
import torch
from torch import nn

from audit.adversary.threat import L1, L2, Linf
from audit.certificate.robust_images import ledger as ledgers
from audit.certificate.robust_images import network as networks
from audit.certificate.robust_images.ledger import LedgerInputs, keep_ledger, proved_rows
from audit.certificate.robust_images.network import BoundedNetwork
from audit.certificate.robust_images.results import BoundEffort
from audit.certificate.robust_images.tape import Rows
from audit.random_keys import keyed_generator

UNLIMITED = BoundEffort(passes=1e6, slope_steps=0)


def small():
    """Return a network of 2 x 6 x 6 images with two hidden layers, a maximum and a residual sum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip
    return net.double().eval().requires_grad_(False)


def images(count, key=0):
    return torch.rand(count, 2, 6, 6, dtype=torch.float64, generator=keyed_generator(key))


def inputs_of_relus(net, moved):
    """Return the inputs of every ReLU, flattened, for images (M, C, H, W)."""
    found, value = [], moved
    for layer in net:
        if isinstance(layer, nn.ReLU):
            found.append(value.flatten(1))
        value = layer(value)
    return found


def ranges_of(monkeypatch, net, clean, threat):
    """Return the ranges (low, high) that every ReLU is given, flattened."""
    seen = []

    def noting(low, high):
        seen.append((low.flatten(1), high.flatten(1)))
        return kept(low, high)

    kept = networks.relu_lines
    with monkeypatch.context() as patch:
        patch.setattr(networks, "relu_lines", noting)
        bounded = BoundedNetwork(net, clean[:1], UNLIMITED)
        seen.clear()  # the trial of the trace
        bounded.read(clean, threat, refine=True)
    return seen


def moved_inside(clean, threat, count=60):
    noise = torch.randn(count, *clean.shape, dtype=torch.float64, generator=keyed_generator(5))
    return torch.stack([threat.step(clean, one, clean, threat.eps) for one in noise])


def violations(monkeypatch, net, clean, threat):
    """Return by how much inputs of ReLUs on moved images leave their ranges at most."""
    worst, moved = -torch.inf, moved_inside(clean, threat)
    values = inputs_of_relus(net, moved.flatten(0, 1))
    for (low, high), value in zip(ranges_of(monkeypatch, net, clean, threat), values, strict=True):
        value = value.view(len(moved), *low.shape)
        worst = max(worst, float((low - value).max()), float((value - high).max()))
    return worst


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3), L1(0.8)])
def test_every_input_of_a_relu_stays_in_its_range(threat, monkeypatch):
    assert violations(monkeypatch, small(), images(3), threat) <= 0


def test_the_other_side_is_bounded_only_where_the_range_still_contains_zero(monkeypatch):
    """Both sides everywhere give the same stable ReLUs and the same ranges of the others, at a higher cost."""
    net, clean, threat = small(), images(4), Linf(0.05)
    first = ranges_of(monkeypatch, net, clean, threat)
    kept = networks._BoundInterpreter._tightened
    with monkeypatch.context() as patch:
        patch.setattr(
            networks._BoundInterpreter, "_tightened", lambda self, value, doubt, **_: kept(self, value, doubt)
        )
        both = ranges_of(monkeypatch, net, clean, threat)
    for (low, high), (lower, higher) in zip(first, both, strict=True):
        crossing = (lower < 0) & (higher > 0)
        assert torch.equal(crossing, (low < 0) & (high > 0))
        assert torch.allclose(low[crossing], lower[crossing], atol=1e-12)
        assert torch.allclose(high[crossing], higher[crossing], atol=1e-12)
        assert bool((low <= lower + 1e-12).all() & (high >= higher - 1e-12).all())
    assert any(bool((high > higher + 1e-9).any()) for (_, high), (_, higher) in zip(first, both, strict=True))


def test_fault_the_wrong_side_is_caught(monkeypatch):
    kept = networks._Sides._least
    monkeypatch.setattr(networks._Sides, "_least", lambda self, image, entry, side: kept(self, image, entry, -side))
    assert violations(monkeypatch, small(), images(3), Linf(0.05)) > 1e-3


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3), L1(0.8)])
def test_rows_of_several_images_have_the_bounds_of_each_image_alone(threat):
    """The lines of one image are broadcast over its rows, those of several are copied row by row."""
    net, clean = small(), images(3)
    bounded = BoundedNetwork(net, clean[:1], UNLIMITED)
    tape, logits = bounded.read(clean, threat, refine=True)
    coefficients = torch.randn(9, 3, dtype=torch.float64, generator=keyed_generator(3))
    image = torch.tensor([0, 0, 2, 1, 1, 1, 2, 0, 0])
    together = tape.least(logits.at, logits.value, Rows(coefficients, image))
    for k in range(3):
        own = image == k
        alone = tape.least(logits.at, logits.value, Rows(coefficients[own], image[own]))
        assert torch.allclose(together[own], alone, atol=1e-12)
    moved = moved_inside(clean, threat)
    values = net(moved.flatten(0, 1)).view(len(moved), 3, 3)
    assert bool(((values[:, image] * coefficients).sum(2) >= together - 1e-12).all())


def _ledger(net, clean, labels, threat):
    single = copy.deepcopy(net).float()
    inputs = LedgerInputs(single, net, clean.float(), labels)
    return keep_ledger(inputs, threat, clean.float(), UNLIMITED)


def test_images_of_the_largest_margins_are_tried_first_until_two_batches_fail(monkeypatch):
    net, clean, threat = small(), images(40, key=4), Linf(0.01)
    logits = net(clean.float().double())
    labels = logits.argmax(1)
    top = logits.topk(2).values
    order = (top[:, 0] - top[:, 1]).argsort(descending=True).tolist()
    tried, kept = [], ledgers.bound_margins

    def noting(network, batch, labels, threat, method):
        found = kept(network, batch, labels, threat, method)
        places = [int((clean.float() - one.float()).flatten(1).abs().sum(1).argmin()) for one in batch]
        tried.extend(places if method == "lines" else [])
        return found._replace(least=-found.least.abs()) if method == "lines" else found._replace(least=found.least * 0)

    monkeypatch.setattr(ledgers, "bound_margins", noting)
    assert _ledger(net, clean, labels, threat).proved == 0
    assert tried == order[: 2 * ledgers._BATCH]


def test_a_ledger_does_not_depend_on_the_order_of_its_images():
    net, clean, threat = small(), images(30, key=6), Linf(0.01)
    net[-1].bias -= net(clean).mean(0)  # margins from zero on
    labels = net(clean).argmax(1)
    order = torch.randperm(30, generator=keyed_generator(7))
    one, other = _ledger(net, clean, labels, threat), _ledger(net, clean[order], labels[order], threat)
    assert 0 < one.proved < 30
    assert (
        sorted(order[torch.cat([other.intervals, other.lines])].tolist())
        == torch.cat([one.intervals, one.lines]).sort().values.tolist()
    )
    assert int(proved_rows(one, net, (clean.float(), labels), threat).sum()) == one.proved
