import pytest
import torch
import torch.nn.functional as F
from torch import nn

from audit.attacks import cross_entropy_objective, margin, margin_objective


def test_margins_of_known_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert margin(logits, torch.tensor([0, 1, 0])).tolist() == [1, -2, 0]


def test_the_margin_is_positive_exactly_where_the_class_is_the_single_largest():
    logits = torch.randint(0, 4, (500, 4), generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(500) % 4
    largest = logits == logits.amax(1, keepdim=True)
    alone = largest[torch.arange(500), labels] & (largest.sum(1) == 1)
    assert torch.equal(margin(logits, labels) > 0, alone)


@pytest.mark.parametrize("make", [cross_entropy_objective, margin_objective])
@pytest.mark.parametrize(
    ("logits", "done"),
    [([2.0, 1.0], False), ([1.0, 2.0], True), ([1.0, 1.0], True), ([torch.nan, 1.0], True), ([1.0, torch.inf], True)],
)
def test_done_is_where_the_label_is_lost(make, logits, done):
    network = nn.Flatten()
    judged = make(network, torch.tensor([0]))(torch.tensor(logits).view(1, 1, 1, 2), torch.tensor([0]))
    assert judged.done.tolist() == [done]


def test_objectives_look_labels_up_by_the_index_in_the_whole_set():
    images = torch.rand(4, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    index = torch.tensor([3, 1])
    logits = images[index].flatten(1)
    found = margin_objective(nn.Flatten(), labels)(images[index], index)
    torch.testing.assert_close(found.value, margin(logits, labels[index]))
    found = cross_entropy_objective(nn.Flatten(), labels)(images[index], index)
    torch.testing.assert_close(found.value, -F.cross_entropy(logits, labels[index], reduction="none"))


def test_the_margin_keeps_a_gradient_where_cross_entropy_saturates():
    images = torch.tensor([[300.0, 0.0]]).view(1, 1, 1, 2)
    gradients = []
    for make in (cross_entropy_objective, margin_objective):
        leaf = images.clone().requires_grad_()
        value = make(nn.Flatten(), torch.tensor([0]))(leaf, torch.tensor([0])).value
        gradients.append(float(torch.autograd.grad(value.sum(), leaf)[0].abs().max()))
    assert gradients == [0, 1]
