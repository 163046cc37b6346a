"""Results shared by all estimators: origins of candidates, and vulnerability with its standard error."""

import pytest
import torch

from audit.information.estimator import CARRIED, CLEAN, MIEstimate, Origin, Vulnerability


@pytest.mark.parametrize(
    ("origin", "label"),
    [
        (CLEAN, "clean"),
        (CARRIED, "carried"),
        (CARRIED.refined("{}, annealed"), "carried, annealed"),
        (Origin("quantised", 32), "quantised 32"),
        (Origin("quantised", 32).refined("mean shift from {}"), "mean shift from quantised 32"),
        (Origin("hub").refined("mean shift from {}"), "mean shift from hub"),
        (Origin("annealed", 4.0), "annealed 4"),
        (Origin("annealed", 2.5), "annealed 2.5"),
        (Origin("merged into", 0).refined("{}, hidden"), "merged into 0, hidden"),
        (Origin("answer", 7), "answer 7"),
    ],
)
def test_labels_of_origins(origin, label):
    assert origin.label == label
    assert origin.unrefined.refined(origin.refinement) == origin


def test_rv_is_the_difference_and_errors_add_as_if_independent():
    normal, worst = MIEstimate(1.5, 0.3, 10, 2.3, 1.5), MIEstimate(0.25, 0.4, 10, 2.3, 0.25)
    found = Vulnerability(normal, worst, torch.zeros(1), torch.zeros(1), 0.0)
    assert (found.nats, found.stderr) == (1.25, pytest.approx(0.5))


def test_all_adversarial_images_are_in_the_order_of_the_data_set():
    images = torch.arange(6.0).view(6, 1, 1, 1)
    indices, estimate = torch.tensor([4, 1]), MIEstimate(0.0, 0.0, 2, 1.0, 0.0)
    found = Vulnerability(estimate, estimate, images[indices], indices, 0.0, others=images[[0, 2, 3, 5]])
    assert found.all_adversarial.equal(images)
    assert found._replace(others=None).all_adversarial.equal(images[indices])
