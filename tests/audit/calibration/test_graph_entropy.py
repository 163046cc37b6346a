"""Least label information of overlapping classes: closed forms, brute force, and monotony in the radius."""

from itertools import pairwise, product
from math import cos, log, pi, sin

import numpy as np
import pytest

from audit.calibration.graph_entropy import least_label_information


def line(classes, gap=1.0):
    return [[gap * number] for number in range(classes)]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_distinct_classes_tell_their_entropy_and_merged_ones_nothing(classes):
    assert least_label_information(line(classes), 0.4) == pytest.approx(log(classes))
    assert least_label_information(line(classes), classes) == pytest.approx(0.0, abs=1e-6)


def test_four_on_a_line_meet_in_pairs():
    # neighbours meet, others do not: two pairs tell one bit, and no assignment tells less
    assert least_label_information(line(4), 0.6) == pytest.approx(log(2), abs=1e-5)


def test_three_on_a_line_match_a_grid_search():
    # cliques {0, 1} and {1, 2}; only the middle class has a choice q
    def information(q):
        joint = np.array([[1.0, 0.0], [q, 1 - q], [0.0, 1.0]]) / 3
        ratio = joint / (joint.sum(1, keepdims=True) * joint.sum(0))
        return float(np.sum(joint[joint > 0] * np.log(ratio[joint > 0])))

    least = min(information(q) for q in np.linspace(0, 1, 1001))
    assert least_label_information(line(3), 0.6) == pytest.approx(least, abs=1e-5)


def test_boxes_that_meet_at_a_corner_only_in_both_axes():
    square = [[x, y] for x, y in product((0.0, 1.0), repeat=2)]
    assert least_label_information(square, 0.51) == pytest.approx(0.0, abs=1e-6)
    assert least_label_information(square, 0.49) == pytest.approx(log(4))


def test_never_rises_with_the_radius():
    points = [[0.0, 0.0], [1.0, 0.3], [1.4, 1.2], [0.2, 1.1], [2.0, 2.0]]
    found = [least_label_information(points, radius) for radius in np.linspace(0.1, 1.1, 11)]
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(found))
    assert found[0] == pytest.approx(log(5))
    assert found[-1] == pytest.approx(0.0, abs=1e-6)


def test_images_of_one_class_may_part_by_their_label():
    # six classes in a ring, neighbours meet: images with a neighbour's label join that neighbour, others part evenly
    ring = [[cos(pi * (number + 0.5) / 3), sin(pi * (number + 0.5) / 3)] for number in range(6)]
    two, four = 5 / 12, 1 / 24
    expected = log(6) + 2 * two * log(two) + 4 * four * log(four)
    assert least_label_information(ring, 0.6, 0.2) == pytest.approx(expected, abs=1e-4)
    assert least_label_information(ring, 0.6) == pytest.approx(log(3), abs=1e-5)


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_label_noise_of_distinct_classes_matches_its_closed_form(noise):
    classes = 4
    right, wrong = 1 - noise + noise / classes, noise / classes
    entropy = -right * log(right) - (classes - 1) * wrong * log(wrong)
    assert least_label_information(line(classes), 0.1, noise) == pytest.approx(log(classes) - entropy)
