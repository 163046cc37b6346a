"""Contradictions of a layer's estimates: only what was measured of heads on that layer refutes them."""

from dataclasses import dataclass, replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.certificate.results import LayerCertificate
from audit.config.settings import AuditSettings
from audit.information.estimator import COLD_START, Estimator, MIEstimate, Vulnerability
from audit.run.assembly import _head_flags
from audit.run.network_audit import audit_network
from audit.run.upkeep.verification import check_record


@dataclass(frozen=True)
class Nothing(Estimator):
    """Estimates zero nats of any layer: exact Fano then leaves no more than the share of the largest class."""

    quantity = "I(Y; g(X))"
    ranks = False
    name = "nothing"
    floor_kind = "labels"

    def normal(self, inputs, seed):
        return MIEstimate(0.0, 0.01, 20, 3.0, 0.0)

    def vulnerability(self, inputs, threat, seed, warm_start=COLD_START):
        worst = MIEstimate(0.0, 0.01, 20, 3.0, 0.0)
        return Vulnerability(warm_start.normal, worst, inputs.images[:20], torch.arange(20), 20.0)


SETTINGS = AuditSettings(estimator=Nothing(), attack=two_losses(PGD(2, 0.5)), seeds=(0,))


@pytest.fixture(scope="module")
def held_out():
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[-200:] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels[-200:])


@pytest.fixture(scope="module")
def classifier():
    """A linear classifier fitted by least squares."""
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels[:-200] / 16, dtype=torch.float64)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    targets = nn.functional.one_hot(torch.tensor(labels[:-200]), 10).double()
    weights = torch.linalg.lstsq(inputs.T @ inputs + torch.eye(65).double(), inputs.T @ targets).solution.float()
    linear = nn.Linear(64, 10)
    linear.weight, linear.bias = nn.Parameter(weights[:-1].T.contiguous()), nn.Parameter(weights[-1].clone())
    return nn.Sequential(nn.Flatten(), linear)


class Beside(nn.Module):
    """A classifier with a small branch beside it, joined in one of several ways."""

    def __init__(self, classifier, join):
        super().__init__()
        self.classifier, self.join = classifier, join
        self.branch, self.norm = nn.Linear(64, 10), nn.BatchNorm1d(10)
        nn.init.normal_(self.branch.weight, std=0.01, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return self.norm(self.join(self.classifier(images), self.branch(images.flatten(1))))


JOINS = {
    "gate": lambda logits, branch: logits * (1 + branch.sigmoid()),
    "residual": lambda logits, branch: logits + 0.1 * branch.relu(),
    "rounded": lambda logits, branch: (logits * 64).round() / 64 + 0.1 * branch,
    "attention": lambda logits, branch: logits + 0.1 * branch.softmax(1) * branch,
}


@pytest.mark.parametrize("join", JOINS)
def test_the_networks_accuracy_contradicts_no_layer_that_it_goes_round(join, classifier, held_out):
    network = Beside(classifier, JOINS[join]).eval()
    inside = audit_network(network, *held_out, "branch", Linf(0.01), SETTINGS)
    assert inside.adversarial_accuracy_low > 0.5 > inside.fano_accuracy_bound
    assert inside.floor_nats is None
    assert not inside.contradicted
    assert inside.details["determines_logits"] is False
    for layer in ("norm", "logits"):
        whole = audit_network(network, *held_out, layer, Linf(0.01), SETTINGS)
        assert whole.contradicted
        assert any("below the measured adversarial accuracy's" in flag for flag in whole.flags)
        assert whole.details["determines_logits"] is True


@pytest.mark.parametrize("join", JOINS)
def test_verification_accepts_the_record_of_such_a_layer(join, classifier, held_out):
    network = Beside(classifier, JOINS[join]).eval()
    record = audit_network(network, *held_out, "branch", Linf(0.01), SETTINGS)
    assert not [fault for fault in check_record(record) if "bound" in str(fault)]
    claimed = replace(record, details={**record.details, "determines_logits": True})
    assert [fault for fault in check_record(claimed) if "without a flag" in str(fault)]


def certificate(images=200, **heads):
    place = {"layer": "branch", "norm": "linf", "eps": 0.1, "dimension": 3}
    return LayerCertificate(**place, images=images, certified_tier="", confidence=0.95, heads=heads)


@pytest.mark.parametrize(
    ("found", "bound", "flagged"),
    [
        (None, 0.1, None),
        (certificate(), 0.1, None),
        (certificate(slf=0.5, mlp=0.4), 0.3, "slf"),
        (certificate(slf=0.2, alf=0.9), 0.5, "alf"),
        (certificate(slf=0.5), 0.48, None),  # within the interval of 100 of 200 images, from .431
        (certificate(images=20_000, slf=0.5), 0.48, "slf"),  # of 10,000 of 20,000, from .493
        (certificate(own=0.9, slf=0.5), 0.6, None),
        (certificate(slf=0.5), None, None),
    ],
)
def test_a_head_trained_on_the_layer_contradicts_its_bound(found, bound, flagged):
    flags = _head_flags(found, {} if bound is None else {"fano_accuracy_bound": bound})
    assert len(flags) == (flagged is not None)
    for flag in flags:
        start = f"contradicted: the bound {bound:.3f} is below the {flagged} head's adversarial accuracy"
        assert flag.startswith(start)
