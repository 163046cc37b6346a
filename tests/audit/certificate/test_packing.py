"""The packing bound against enumeration and small cases solved by hand."""

from itertools import combinations

import numpy as np
import pytest

from audit.certificate.packing import packing_bound
from audit.errors import UsageError


def by_enumeration(labels, pairs, hubs):
    """Return the maximum of images kept over all 2^n choices with at most one of a pair and one class per hub."""
    count = len(labels)
    choices = (np.arange(2**count)[:, None] >> np.arange(count)) & 1 == 1
    legal = np.ones(len(choices), dtype=bool)
    for first, second in pairs:
        legal &= ~(choices[:, first] & choices[:, second])
    for hub in hubs:
        for one, other in combinations(sorted(set(hub)), 2):
            if labels[one] != labels[other]:
                legal &= ~(choices[:, one] & choices[:, other])
    return int(choices[legal].sum(1).max())


def random_graph(generator, classes):
    count = int(generator.integers(4, 10))
    labels = generator.integers(0, classes, count)
    possible = [pair for pair in combinations(range(count), 2) if labels[pair[0]] != labels[pair[1]]]
    pairs = [pair for pair in possible if generator.random() < generator.choice([0.1, 0.3, 0.6])]
    hubs = [
        generator.choice(count, int(generator.integers(1, count)), replace=False).tolist()
        for _ in range(int(generator.integers(0, 4)))
    ]
    return labels, pairs, hubs


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_the_bound_equals_enumeration(classes):
    generator, kinds, fractional = np.random.default_rng(classes), set(), 0
    for _ in range(50):
        labels, pairs, hubs = random_graph(generator, classes)
        bound = packing_bound(labels, pairs, hubs)
        assert bound.kept == by_enumeration(labels, pairs, hubs), (labels, pairs, hubs)
        assert bound.exact
        assert bound.kept <= bound.randomised <= bound.images == len(labels)
        kinds.add(bound.kind)
        fractional += bound.randomised > bound.kept + 0.1
    assert {"closed form", "matching" if classes == 2 else "milp"} <= kinds
    if classes != 3:
        assert (fractional > 0) == (classes > 2)  # between two classes randomised heads gain nothing


def test_small_cases():
    # three classes, all pairs collide: one is kept, or each with probability 1/2
    triangle = packing_bound([0, 1, 2], [(0, 1), (1, 2), (0, 2)], [])
    assert triangle.kept == 1
    assert triangle.randomised == pytest.approx(1.5)
    # all three at one hub: one label, one image
    assert packing_bound([0, 1, 2], [], [[0, 1, 2]])[:2] == (1, 1.0)
    # two hubs that share an image, and a separate pair
    assert packing_bound([0, 1, 2, 0, 1], [(3, 4)], [[0, 1], [1, 2]]).kept == 3
    # a cycle of five over three classes
    ring = packing_bound([0, 1, 0, 1, 2], [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)], [])
    assert ring.kept == 2
    assert ring.randomised == pytest.approx(2.5)


def test_one_hub_has_a_closed_form():
    labels = [0] * 5 + [1] * 3 + [2] * 2
    bound = packing_bound(labels, [], [[0, 1, 5, 6, 7, 8]])
    assert bound == (7, 7.0, 10, "closed form", True)  # 10 - (6 - 3)
    assert bound.certified == 0.7
    assert packing_bound(labels, [], [range(10)]).certified == 0.5
    assert packing_bound(labels, [], []).certified == 1
    assert packing_bound(labels, [], [[0, 1, 2], [3]]).kept == 10  # a hub of one class constrains nothing


@pytest.mark.parametrize("classes", [2, 4])
def test_more_collisions_never_raise_the_bound(classes):
    generator = np.random.default_rng(classes)
    for _ in range(15):
        labels, pairs, hubs = random_graph(generator, classes)
        before = packing_bound(labels, [], [])
        stages = [(pairs[:k], []) for k in range(0, len(pairs) + 1, 3)] + [(pairs, [])]
        stages += [(pairs, hubs[:k]) for k in range(1, len(hubs) + 1)]
        stages += [(pairs, [*hubs[:-1], range(len(labels))])]
        for stage in stages:
            bound = packing_bound(labels, *stage)
            assert bound.kept <= before.kept
            assert bound.randomised <= before.randomised + 1e-6
            before = bound


def test_a_stopped_branch_and_bound_gives_a_valid_bound():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 60)
    pairs = [(i, j) for i, j in combinations(range(60), 2) if labels[i] != labels[j] and generator.random() < 0.1]
    stopped, ended = packing_bound(labels, pairs, [], seconds=0.0), packing_bound(labels, pairs, [])
    assert ended.exact
    assert ended.kind == "milp"
    assert stopped.kind == "milp, stopped"
    assert ended.kept <= stopped.kept <= 60
    assert not stopped.exact or stopped.kept == ended.kept


@pytest.mark.parametrize("wrong", [-1, 3])
def test_indices_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=f"image index {wrong} is out of range for 3 images: legal are 0 to 2"):
        packing_bound([0, 1, 2], [], [[0, wrong]])
    with pytest.raises(UsageError, match=f"image index {wrong} is out of range"):
        packing_bound([0, 1, 2], [(0, wrong)], [])


def test_a_pair_of_one_class_is_refused():
    with pytest.raises(UsageError, match="images 0 and 2 are both of class 1"):
        packing_bound([1, 0, 1], [(0, 1), (0, 2)], [])


def test_no_images_are_refused():
    with pytest.raises(UsageError, match="at least one image"):
        packing_bound([], [], [])
