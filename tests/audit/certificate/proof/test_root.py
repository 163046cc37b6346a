"""The tier `proved`: exact roots are proved, and near misses are refused."""

import copy

import pytest
import torch
from torch import nn

from audit.adversary.threat import Linf
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.collisions import Collisions
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EqualityCriterion
from audit.certificate.proof.arithmetic import Derivatives, Enclosure
from audit.certificate.proof.operations import Unprovable
from audit.certificate.proof.pieces import TracedLayer
from audit.certificate.proof.root import prove_collisions, reason_unprovable
from audit.certificate.results import NotApplicable
from audit.certificate.settings import CertificateSettings
from audit.certificate.validity import valid_rows
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from model_zoo.architectures.small_classifiers import VGG, BaselineH, DenseNet, ResNet


def built(make, key=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.data.uniform_(0.5, 1.5)
    return net.eval().requires_grad_(False)


def at(net, layer="logits"):
    return DualPrecisionLayer.of(Representation(net, layer))


def one(moved, target):
    """Return the collision of image 0, moved, at a target."""
    zero = torch.zeros(1, dtype=torch.int64)
    return Collisions(torch.as_tensor(target, dtype=torch.float64)[None], zero, zero, moved)


def linear(weight, bias=None):
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None)
    layer.weight.data = torch.tensor(weight)
    if bias is not None:
        layer.bias.data = torch.tensor(bias)
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


CLEAN = torch.full((1, 1, 1, 3), 0.5)
FIXED = [[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]]  # the second feature depends on no pixel


def test_a_root_without_a_float64_representation_is_proved():
    """No float64 image has these features, but a real image near the witness has."""
    net = linear([[0.1, 0.3, 0.7]])
    moved = CLEAN.double() + 0.01
    exact = at(net).precise(moved)[0]
    target = exact + 3e-17
    assert prove_collisions(at(net).precise, CLEAN, one(moved, target), Linf(0.1)).tolist() == [True]
    assert prove_collisions(at(net).precise, CLEAN, one(moved, exact + 1e-9), Linf(0.1)).tolist() == [True]


def test_a_near_miss_is_refused():
    """An immovable feature is 1e-12 from its target: equal in float32, but not provable."""
    net = linear(FIXED, [0.0, 0.3])
    moved, layer = CLEAN.double() + 0.01, at(net)
    exact = layer.precise(moved)[0]
    miss = exact + torch.tensor([0.0, 1e-12])
    near, true = one(moved, miss), one(moved, exact)
    assert valid_rows(layer, CLEAN, near, Linf(0.1), EqualityCriterion("bit-identical at float32", 0.0)).tolist() == [
        True
    ]
    assert valid_rows(layer, CLEAN, near, Linf(0.1), EqualityCriterion("proved", 0.0)).tolist() == [False]
    assert valid_rows(layer, CLEAN, true, Linf(0.1), EqualityCriterion("proved", 0.0)).tolist() == [True]


def test_dependent_features_collide_only_on_their_line():
    """Two proportional features: a target 1e-12 off their line has no root."""
    net = linear([[1.0, 0.5, 0.25], [2.0, 1.0, 0.5]])
    moved = CLEAN.double()
    exact = at(net).precise(moved)[0]
    off = one(moved, exact + torch.tensor([1e-12, 0.0]))
    assert valid_rows(at(net), CLEAN, off, Linf(0.1), EqualityCriterion("bit-identical at float32", 0.0)).tolist() == [
        True
    ]
    assert prove_collisions(at(net).precise, CLEAN, off, Linf(0.1)).tolist() == [False]


@pytest.mark.parametrize(("room", "wanted"), [(1e-3, True), (1e-6, False)])
def test_the_root_has_to_lie_inside_the_ball(room, wanted):
    net = linear([[1.0, 1.0, 1.0]])
    moved = CLEAN.double() + (0.1 - room)
    target = at(net).precise(moved)[0] + 3e-5  # each pixel has to move by 1e-5
    assert prove_collisions(at(net).precise, CLEAN, one(moved, target), Linf(0.1)).tolist() == [wanted]


def test_a_witness_outside_its_ball_is_refused():
    net = linear([[1.0, 1.0, 1.0]])
    for moved in (CLEAN.double() + 0.1001, CLEAN.double() + torch.tensor([0.6, 0.0, 0.0])):
        target = at(net).precise(moved)[0]
        assert prove_collisions(
            at(net).precise, CLEAN, one(moved, target), Linf(0.1 if moved.max() < 1 else 0.9)
        ).tolist() == [False]


@pytest.mark.parametrize(("distance", "wanted"), [(1e-4, True), (1e-6, False)])
def test_the_root_has_to_lie_inside_the_affine_piece(distance, wanted):
    """A witness near a kink of a ReLU: the root of its affine piece may lie beyond the kink."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    net[1].weight.data = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    net[1].bias.data = torch.tensor([0.0, -1.5])
    net[3].weight.data = torch.tensor([[1.0, 1.0]])
    net.requires_grad_(False)
    moved = CLEAN.double() - distance  # the second unit is inactive, by three times the distance
    target = at(net).precise(moved)[0] + 3e-5
    assert prove_collisions(at(net).precise, CLEAN, one(moved, target), Linf(0.1)).tolist() == [wanted]


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 12, 3, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2, 1),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class _Normalised(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor([0.45]).view(1, 1, 1, 1))
        self.register_buffer("std", torch.tensor([0.22]).view(1, 1, 1, 1))

    def forward(self, images):
        return self.network((images - self.mean) / self.std)


MAKERS = {
    "convolutional": lambda: _Normalised(convolutional()),
    "vgg": lambda: VGG((1, 8, 8), 3, width=4),
    "resnet": lambda: ResNet((1, 8, 8), 3, width=4),
    "densenet": lambda: DenseNet((1, 8, 8), 3, width=4, growth=3),
    "baseline": lambda: BaselineH((1, 8, 8), 3, width=4, features=6),
}


@pytest.mark.parametrize("name", MAKERS)
def test_found_collisions_are_proved_and_changed_targets_are_not(name):
    net = built(MAKERS[name])
    clean = 0.2 + 0.6 * torch.rand(6, 1, 8, 8, generator=keyed_generator(1))
    settings = CertificateSettings("proved", SearchEffort(hubs=1, neighbours=0))
    found = certify(at(net), clean, torch.arange(6) % 3, Linf(0.15), settings)
    assert len(found.collisions.members) >= 3
    assert found.tier == "proved"
    off = found.collisions._replace(targets=found.collisions.targets + 0.05 * found.scale)
    assert not bool(prove_collisions(at(net).precise, clean, off, Linf(0.15)).any())
    # the proof fails for other weights
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    assert not bool(prove_collisions(at(other).precise, clean, found.collisions, Linf(0.15)).all())


@pytest.mark.parametrize("name", MAKERS)
def test_enclosures_agree_with_float64_and_derivatives_with_the_jacobian(name):
    net = built(MAKERS[name])
    precise, image = at(net).precise, torch.rand(1, 1, 8, 8, generator=keyed_generator(2)).double()
    traced = TracedLayer.of(precise, image)
    value, pattern = traced.forward(Enclosure.of(image))
    assert float((value.high - precise(image)).abs().max()) < 1e-13
    assert 0 < float(value.error.max()) < 1e-24
    jacobian = traced.jacobian(image)
    columns = torch.randn(5, 1, 8, 8, generator=keyed_generator(3)).double()
    derivatives, slopes = traced.derivatives(Derivatives(Enclosure.of(columns)), pattern)
    assert torch.allclose(derivatives.parts.high, columns.flatten(1) @ jacobian.T, atol=1e-10)
    assert slopes.keys() == pattern.decisions.keys() != set()


def test_penultimate_and_inner_layers_are_traced():
    net = built(MAKERS["convolutional"])
    image = torch.rand(1, 1, 8, 8, generator=keyed_generator(2)).double()
    for layer in ("penultimate", "4", "logits"):
        precise = at(net, layer).precise
        value, _ = TracedLayer.of(precise, image).forward(Enclosure.of(image))
        assert float((value.high - precise(image)).abs().max()) < 1e-13


class _Squared(nn.Module):
    def forward(self, images):
        return (images * images).flatten(1)


class _Shuffled(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.sum() > 0 else images.flatten(1) * 2


@pytest.mark.parametrize(
    ("net", "layer", "reason"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(9, 2), nn.GELU()),
            "logits",
            "GELU '2' is not a supported piecewise-linear operation",
        ),
        (_Squared(), "logits", "product or quotient of two features"),
        (_Shuffled(), "logits", "cannot be traced"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 2), nn.Softmax(1)), "logits", "Softmax '2'"),
        (nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), nn.ReLU()), "0", "output of one module"),
    ],
)
def test_unsupported_operations_are_named(net, layer, reason):
    clean = torch.rand(4, 1, 3, 3, generator=keyed_generator(0))
    subject = at(net.eval().requires_grad_(False), layer)
    assert reason in reason_unprovable(subject.precise, clean)
    result = certify(subject, clean, torch.arange(4) % 2, Linf(0.1), CertificateSettings("proved"))
    assert isinstance(result, NotApplicable)
    assert reason in result.reason
    nothing = one(clean[:1].double(), subject.precise(clean[:1].double())[0])
    assert prove_collisions(subject.precise, clean, nothing, Linf(0.1)).tolist() == [False]


def test_non_finite_images_are_not_proved():
    net = linear([[1.0, 1.0, 1.0]])
    moved = CLEAN.double() * float("nan")
    assert prove_collisions(at(net).precise, CLEAN, one(moved, torch.tensor([1.5])), Linf(0.1)).tolist() == [False]
    flat = linear([[0.0, 0.0, 0.0]], [0.25])
    exact = one(CLEAN.double(), torch.tensor([0.25]))
    assert prove_collisions(at(flat).precise, CLEAN, exact, Linf(0.1)).tolist() == [True]  # every image is a root


def test_functions_without_modules_cannot_be_proved():
    assert "has to be a Representation" in reason_unprovable(lambda x: x.flatten(1), CLEAN)
    with pytest.raises(Unprovable, match="are not supported; legal: flatten"):
        TracedLayer.of(
            Representation(built(MAKERS["vgg"]).double(), "stages.0", "mean"), torch.rand(1, 1, 8, 8).double()
        )
