"""Batches are halved with a warning when memory runs out, and give the same results."""

import warnings

import pytest
import torch

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import two_losses
from audit.adversary.passes import Batches, MemoryWarning
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.errors import EnvironmentFault

MESSAGES = (
    "CUDA out of memory. Tried to allocate 2 GiB",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate",
)


def limited(most, message=MESSAGES[0]):
    def function(values):
        if len(values) > most:
            raise RuntimeError(message)
        return 2 * values

    return function


@pytest.mark.parametrize("message", MESSAGES)
def test_a_batch_that_does_not_fit_is_halved_permanently(message):
    batches, values = Batches(16), torch.arange(37.0)
    with pytest.warns(MemoryWarning) as caught:
        found = batches.run(limited(5, message), values)
    assert [str(warning.message) for warning in caught] == [
        "not enough memory for batches of 16: reducing the batch size to 8",
        "not enough memory for batches of 8: reducing the batch size to 4",
    ]
    assert torch.equal(found, 2 * values)
    assert batches.size == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches.run(limited(5, message), values)


def test_a_single_entry_that_does_not_fit_is_an_environment_fault():
    with pytest.raises(EnvironmentFault, match="not enough memory to pass a single image"), pytest.warns(MemoryWarning):
        Batches(4).run(limited(0), torch.arange(3.0))


def test_other_errors_are_raised_unchanged():
    def broken(_values):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        Batches(4).run(broken, torch.arange(3.0))


class Large(torch.nn.Module):
    """Two classes by the mean of the pixels; batches of more than three images do not fit into memory."""

    def forward(self, images):
        if len(images) > 3:
            raise RuntimeError(MESSAGES[0])
        score = images.flatten(1).mean(1)
        return torch.stack([score, 0.5 - 0 * score], 1)


def test_accuracy_is_measured_with_reduced_batches():
    images = torch.linspace(0.413, 0.597, 20)[:, None, None, None].expand(20, 1, 2, 2).clone()
    labels = (images[:, 0, 0, 0] <= 0.5).long()
    attack = two_losses(PGD(4, 0.5, batch_size=16))
    with pytest.warns(MemoryWarning):
        found = measure_accuracy(Large().eval(), images, labels, Linf(0.05), attack, 0)
    wanted = (images[:, 0, 0, 0] - 0.5).abs() > 0.05
    assert torch.equal(found.robust, wanted)
