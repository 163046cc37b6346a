"""Bounds over balls: grids of two pixels in three norms, every operation, exact rounding, planted faults."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import nn

from audit.adversary.threat import L1, L2, THREATS, Linf
from audit.certificate.proof.numbers import Unprovable
from audit.certificate.robust_images import bounds, network
from audit.certificate.robust_images.bounds import Bounds
from audit.certificate.robust_images.lines import relu_lines
from audit.certificate.robust_images.margins import bound_margins, check_margins
from audit.certificate.robust_images.network import BoundedNetwork
from audit.certificate.robust_images.results import BoundEffort, Slopes
from audit.certificate.robust_images.tape import Relaxation, Tape
from audit.random_keys import keyed_generator

RADII = {"linf": 0.15, "l2": 0.2, "l1": 0.25}


def seeded(make, key=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return net.double().eval().requires_grad_(False)


def two_pixels(key, activation=nn.ReLU):
    """Return a network of two pixels, 1 x 1 x 2, with weights large enough to bend inside the ball."""

    def make():
        net = nn.Sequential(nn.Flatten(), nn.Linear(2, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3))
        for layer in (net[1], net[3]):
            layer.weight.data *= 3
            layer.bias.data -= layer.weight.data.sum(1) / 2 * (layer.in_features == 2)
        return net

    return seeded(make, key)


class Residual(nn.Module):
    """Two pixels, and a sum of two branches between activations."""

    def __init__(self, activation):
        super().__init__()
        self.inner, self.branch, self.last = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.inner.weight.data *= 3
        self.activation = activation()

    def forward(self, images):
        hidden = self.activation(self.inner(images.flatten(1) - 0.5))
        return self.last(self.activation(self.branch(hidden) + hidden))


def residual(key, activation=nn.ReLU):
    return seeded(lambda: Residual(activation), key)


def grid(clean, threat, steps=81):
    """Return the legal images (G, 1, 1, 2) of a fine grid around an image of two pixels, corners included."""
    ticks = torch.linspace(-threat.eps, threat.eps, steps, dtype=torch.float64)
    moves = torch.cartesian_prod(ticks, ticks)
    angle = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    moves = torch.cat([moves, threat.eps * torch.stack([angle.cos(), angle.sin()], 1)])
    images = clean + moves.view(-1, 1, 1, 2)
    inside = threat.distance(images, clean) <= threat.eps * (1 + 1e-12)
    return images[inside & ((images >= 0) & (images <= 1)).flatten(1).all(1)]


def least_on_grid(net, clean, label, threat):
    """Return the least margin of the label over all other classes on the grid of one image (1, 1, 1, 2)."""
    logits = net(grid(clean, threat))
    others = logits.clone()
    others[:, label] = -torch.inf
    return float((logits[:, label] - others.amax(1)).min())


def excess(norm, activation=nn.ReLU, effort=None, make=two_pixels):
    """Return by how much lower bounds exceed the least margin on the grid, and the images proved and kept."""
    worst, proved, kept = -torch.inf, 0, 0
    threat = THREATS[norm](RADII[norm])
    for key in range(6):
        net = make(key, activation)
        clean = torch.rand(6, 1, 1, 2, dtype=torch.float64, generator=keyed_generator(key))
        labels = net(clean).argmax(1)
        bounded = BoundedNetwork(net, clean[:1], effort or BoundEffort(passes=1e6))
        least = {name: bound_margins(bounded, clean, labels, threat, name).least for name in ("intervals", "lines")}
        for k in range(6):
            found = least_on_grid(net, clean[k : k + 1], int(labels[k]), threat)
            worst = max(worst, *(float(part[k]) - found for part in least.values()))
            proved, kept = proved + int(least["lines"][k] > 0), kept + int(found > 0)
    return worst, proved, kept


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Sigmoid, nn.Tanh])
@pytest.mark.parametrize("norm", RADII)
def test_bounds_agree_with_a_grid_of_two_pixels(norm, activation):
    for make in (two_pixels, residual):
        worst, proved, kept = excess(norm, activation, make=make)
        assert worst <= 1e-9
        assert kept / 2 < proved <= kept


def test_optimised_slopes_prove_more_than_the_slopes_of_least_area():
    plain = excess("l2", effort=BoundEffort(passes=1e6, slope_steps=0))
    better = excess("l2", effort=BoundEffort(passes=1e6, slope_steps=60))
    assert plain[1] <= better[1] <= better[2]
    assert better[0] <= 1e-9


class Everything(nn.Module):
    """Convolutions with strides and paddings, batch norm, residual sums, pooling, concatenation, every activation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 6, 3, 1, 1), nn.Conv2d(4, 6, 1)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.grouped = nn.Conv2d(6, 6, 3, 1, 1, groups=2, bias=False)
        self.last = nn.Linear(12 * 4, 3)

    def forward(self, images):
        hidden = torch.relu(self.norm(self.first((images - 0.4) / 0.3)))
        both = torch.relu(self.left(hidden) + self.right(hidden))
        joined = torch.cat([self.pool(both), torch.tanh(self.grouped(self.mean(both)))], 1)
        return self.last(torch.sigmoid(joined)[:, :, ::2, ::2].flatten(1))


def vertices(clean, threat, count=200):
    """Return legal images (count, N, ...) at the edge of the ball, far from the clean image in few or all pixels."""
    generator = keyed_generator(9)
    moves = []
    for k in range(count):
        noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        sparse = noise.flatten(1).abs().topk(1 + k % 20, dim=1).values[:, -1].view(-1, 1, 1, 1)
        kept = noise * (noise.abs() >= sparse) if k % 2 else noise
        moves.append(threat.step(clean, kept, clean, threat.eps))
    return torch.stack(moves)


@pytest.mark.parametrize("threat", [Linf(0.04), L2(0.4), L1(1.5)])
def test_no_value_of_any_operation_leaves_its_range(threat):
    net = seeded(Everything)
    clean = torch.rand(3, 2, 16, 16, dtype=torch.float64, generator=keyed_generator(2))
    logits = net(vertices(clean, threat).flatten(0, 1)).view(200, 3, 3)
    widths = []
    for refine in (False, True):
        bounded = BoundedNetwork(net, clean[:1], BoundEffort(passes=1e6))
        _, found = bounded.read(clean, threat, refine=refine)
        assert bool(((logits >= found.low) & (logits <= found.high)).all())
        widths.append(float((found.high - found.low).mean()))
    assert widths[1] < 0.9 * widths[0]  # lines tighten what intervals give


@pytest.mark.parametrize("threat", [Linf(0.04), L2(0.4), L1(1.5)])
def test_patches_give_the_bounds_of_full_maps(threat, monkeypatch):
    net = seeded(Everything)
    clean = torch.rand(2, 2, 16, 16, dtype=torch.float64, generator=keyed_generator(3))
    ranges = []
    for full in (False, True):
        if full:
            monkeypatch.setattr(Tape, "local_cost", lambda _self, _at: None)
        bounded = BoundedNetwork(net, clean[:1], BoundEffort(passes=1e6))
        ranges.append(bounded.read(clean, threat, refine=True)[1])
        costs = bounded.passes
    assert torch.allclose(ranges[0].low, ranges[1].low, atol=1e-10)
    assert torch.allclose(ranges[0].high, ranges[1].high, atol=1e-10)
    assert costs > 0


def test_bounds_do_not_depend_on_the_rest_of_the_batch():
    net = seeded(Everything)
    clean = torch.rand(4, 2, 16, 16, dtype=torch.float64, generator=keyed_generator(4))
    labels = net(clean).argmax(1)
    effort = BoundEffort(passes=3.0)  # too few for all
    bounded = BoundedNetwork(net, clean[:1], effort)
    together = bound_margins(bounded, clean, labels, Linf(0.02), "lines").least
    alone = [bound_margins(bounded, clean[k : k + 1], labels[k : k + 1], Linf(0.02), "lines").least for k in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-9)


def test_given_slopes_give_the_bound_that_they_were_found_with():
    net = two_pixels(3)
    clean = torch.rand(8, 1, 1, 2, dtype=torch.float64, generator=keyed_generator(3))
    labels = net(clean).argmax(1)
    bounded = BoundedNetwork(net, clean[:1], BoundEffort(passes=1e6, slope_steps=40))
    for threat in (Linf(0.3), L2(0.35)):
        found = bound_margins(bounded, clean, labels, threat, "lines")
        again = check_margins(bounded, (clean, labels), threat, "lines", found.slopes)
        proved = found.least > 0
        assert torch.allclose(found.least[proved], again[proved], atol=1e-9)
        none = check_margins(bounded, (clean, labels), threat, "lines", Slopes.none())
        assert bool((none <= again + 1e-12).all())


def test_intervals_contain_the_exact_result_of_sums_that_cancel():
    """Products of 1e16 and -1e16 lose their small terms in float64; rational arithmetic keeps them."""
    assert _exact_violations() == 0


def _exact_violations():
    generator, outside = keyed_generator(5), 0
    for _ in range(40):
        weight = torch.randn(1, 9, dtype=torch.float64, generator=generator)
        weight[0, :4] *= 1e8
        weight[0, 4] = -float(sum(weight[0, :4]))
        value = torch.rand(1, 9, dtype=torch.float64, generator=generator)
        value[0, :5] = value[0, 0]
        tape = Tape(value.view(1, 9, 1, 1), Linf(0.0))
        found = Bounds(tape, 0, value, value, value, None).linear(nn.functional.linear, weight, 9)
        exact = sum(Fraction(w) * Fraction(v) for w, v in zip(weight[0].tolist(), value[0].tolist(), strict=True))
        outside += not Fraction(float(found.low)) <= exact <= Fraction(float(found.high))
    return outside


def test_fault_an_interval_not_rounded_outwards_is_caught(monkeypatch):
    monkeypatch.setattr(bounds, "_UNIT", dict.fromkeys(bounds._UNIT, 0.0))
    monkeypatch.setattr(bounds, "outwards", lambda low, high: (low, high))
    assert _exact_violations() > 0


@pytest.mark.parametrize("norm", RADII)
def test_fault_a_slope_off_by_one_percent_is_caught(norm, monkeypatch):
    def wrong(low, high):
        lines = relu_lines(low, high)
        return lines._replace(upper_slope=0.99 * lines.upper_slope, upper_offset=0.99 * lines.upper_offset)

    monkeypatch.setattr(network, "relu_lines", wrong)
    assert excess(norm)[0] > 1e-6


def test_fault_lines_that_cost_nothing_are_caught(monkeypatch):
    pull = Relaxation.pull
    monkeypatch.setattr(Relaxation, "pull", lambda *given: (pull(*given)[0], torch.zeros(len(given[1].coefficients))))
    assert excess("linf")[0] > 1e-6


def test_fault_a_dropped_residual_branch_is_caught(monkeypatch):
    net = seeded(Everything)
    clean = torch.rand(2, 2, 16, 16, dtype=torch.float64, generator=keyed_generator(6))
    monkeypatch.setattr(Bounds, "add", lambda self, _other: self)
    with pytest.raises(Unprovable, match="other logits than the network"):
        BoundedNetwork(net, clean[:1])


def test_fault_a_residual_branch_dropped_in_the_backward_pass_is_caught(monkeypatch):
    """The forward pass is right, so only the ranges can show it."""
    add = Bounds.add

    def dropping(self, other):
        found = add(self, other)
        step = self.tape.steps[found.at]
        self.tape.steps[found.at] = step._replace(arguments=step.arguments[:1], pulls=step.pulls[:1])
        return found

    monkeypatch.setattr(Bounds, "add", dropping)
    assert excess("linf", make=residual)[0] > 1e-6


@pytest.mark.parametrize("layer", ["first", "last"])
def test_fault_a_bias_forgotten_in_the_trace_is_caught(layer, monkeypatch):
    net = seeded(Everything)
    clean = torch.rand(2, 2, 16, 16, dtype=torch.float64, generator=keyed_generator(6))
    bounded = BoundedNetwork(net, clean[:1])
    getattr(bounded.graph(), layer).bias = None
    bounded.constants().clear()
    # the traced network shares its layers with the original, which keeps its own here
    bounded.network = net
    with pytest.raises(Unprovable, match="other logits than the network"):
        bounded.read(clean, Linf(0.01), refine=False)


def test_a_network_that_cannot_be_read_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)).double()
    with pytest.raises(Unprovable, match="GELU '2' is not a supported operation for bounds"):
        BoundedNetwork(net, torch.rand(1, 1, 2, 2).double())


def test_every_corner_of_a_small_cube_respects_linf_bounds_of_a_convolution():
    net = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)))
    clean = 0.2 + 0.6 * torch.rand(1, 1, 3, 3, dtype=torch.float64, generator=keyed_generator(7))
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=9)), dtype=torch.float64).view(-1, 1, 3, 3)
    logits = net(clean + 0.1 * corners)
    _, found = BoundedNetwork(net, clean).read(clean, Linf(0.1), refine=True)
    assert bool(((logits >= found.low) & (logits <= found.high)).all())
