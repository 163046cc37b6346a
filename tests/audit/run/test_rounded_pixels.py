"""Pixels outside [0, 1] by rounding are clipped; others are refused with the figure that is wrong."""

import numpy as np
import pytest
import torch
from torch import nn

from audit.adversary.label_attack import two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.errors import UsageError
from audit.information.label_entropy import LabelEntropy
from audit.run.network_audit import audit_network

SETTINGS = AuditSettings(LabelEntropy(), two_losses(PGD(steps=1)), seeds=(0,))


def _data(value: float) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    images[0, 0, 0, 0] = value
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    return network, images, torch.arange(60) % 3


@pytest.mark.parametrize("value", [1.0000001, 1.000005, -1e-7])
def test_rounding_is_clipped(value: float) -> None:
    network, images, labels = _data(value)
    found = audit_network(network, images, labels, "logits", Linf(0.01), SETTINGS)
    clipped = audit_network(network, images.clamp(0, 1), labels, "logits", Linf(0.01), SETTINGS)
    assert found.details["data_sha256"] == clipped.details["data_sha256"]
    assert found.natural_accuracy == clipped.natural_accuracy
    as_array = audit_network(network, np.asarray(images), labels, "logits", Linf(0.01), SETTINGS)  # type: ignore[arg-type]
    assert as_array.details["data_sha256"] == clipped.details["data_sha256"]


@pytest.mark.parametrize(
    ("value", "shown"), [(1.0001, r"to 1\.0001"), (1.00002, r"to 1\.00002"), (-0.25, r"from -0\.25")]
)
def test_the_figure_that_is_wrong_is_told(value: float, shown: str) -> None:
    with pytest.raises(
        UsageError, match=rf"images range {'from .* ' if 'to' in shown else ''}{shown}.*not within \[0, 1\]"
    ):
        audit_network(*_data(value), "logits", Linf(0.01), SETTINGS)
