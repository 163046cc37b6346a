"""Data-processing floors under the information of a layer, from predictions."""

from math import log

import pytest
import torch

from audit.information.floors import empirical_entropy, largest_share, prediction_floor
from audit.proportion import wilson
from audit.theory import information_floor


def test_empirical_entropy():
    assert empirical_entropy(torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])) == pytest.approx(1.75 * log(2))
    assert empirical_entropy(torch.arange(10).repeat(7)) == pytest.approx(log(10))
    assert empirical_entropy(torch.full((9,), 4)) == 0


def test_largest_share():
    assert largest_share(torch.tensor([3, 3, 3, 0])) == 0.75


def test_floor_is_the_larger_of_the_entropy_and_the_accuracy_bound():
    balanced = torch.arange(10).repeat(10)
    right = torch.arange(100) < 95
    mostly = torch.where(right, balanced, (balanced + 1) % 10)
    for labels in (balanced, (balanced + 1) % 10):  # all correct or all wrong: equal entropy
        assert prediction_floor(balanced, labels, 0.1, "predictions") == pytest.approx(log(10))
    assert prediction_floor(mostly, balanced, 0.1, "predictions") == pytest.approx(empirical_entropy(mostly))
    # constant predictions have no entropy
    constant = torch.zeros(100, dtype=torch.int64)
    assert prediction_floor(constant, balanced, 0.1, "predictions") == 0
    # two classes have at most ln 2 nats, but this accuracy requires more
    halves = torch.arange(100) % 2
    assert log(2) < prediction_floor(halves, halves, 0.1, "predictions") == information_floor(wilson(100, 100).low, 0.1)


def test_floor_of_labels_uses_the_accuracy_alone():
    balanced = torch.arange(10).repeat(100_000)
    right = torch.arange(1_000_000) < 863_300
    mostly = torch.where(right, balanced, (balanced + 1) % 10)
    # an accuracy of 86.33 % requires 1.603 nats
    assert prediction_floor(mostly, balanced, 0.1, "labels") == pytest.approx(1.603, abs=3e-3)
    assert prediction_floor(mostly, balanced, 0.1, "predictions") == pytest.approx(log(10), abs=1e-3)
    assert prediction_floor((balanced + 1) % 10, balanced, 0.1, "labels") == 0


def test_floor_uses_the_lower_end_of_the_accuracy_interval():
    labels = torch.zeros(100, dtype=torch.int64)
    predictions = (torch.arange(100) >= 90).long()
    assert prediction_floor(predictions, labels, 0.1, "labels") == information_floor(wilson(90, 100).low, 0.1)
    assert prediction_floor(predictions, labels, 0.1, "labels") < information_floor(0.9, 0.1) - 0.2
