"""Learning curves of the panel: extrapolation of known laws, balanced parts of the sample, and what is read of them."""

import pytest
import torch

from audit.information.probing.learning_curve import MEMBERS, extrapolated, growth, largest, learning_curves
from audit.information.probing.members import Readers
from audit.information.probing.panel import Panel, Reading
from audit.information.probing.settings import PanelSettings, ProbeTraining
from audit.proportion import wilson
from audit.types import Encoded

READERS = Readers(PanelSettings(trees=20), ProbeTraining(steps=40))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("limit", "missing"), [(2.0, 30.0), (1.0, 0.0), (0.5, 90.0)])
@pytest.mark.parametrize("counts", [(100, 200, 400), (75, 150, 300), (200, 400)])
def test_growth_finds_the_limit_of_values_whose_deficit_falls_as_one_over_images(limit, missing, counts):
    points = tuple((count, limit - missing / count) for count in counts)
    assert points[-1][1] + growth(points) == pytest.approx(limit)


def test_growth_is_never_negative_and_takes_the_larger_extrapolation():
    assert growth(((100, 1.5), (200, 1.4), (400, 1.3))) == 0
    assert growth(((400, 1.3),)) == 0
    assert growth(((100, 0.4), (200, 1.3), (400, 1.3))) == pytest.approx(0.3)


class Recorder:
    """A panel that records the labels of what it is asked to read, and reads their number."""

    def __init__(self, members=MEMBERS):
        self.members, self.asked = members, []

    def _replace(self, members, quick):
        assert quick
        self.members = members
        return self

    def read(self, encoded, labels, seed):
        self.asked.append((encoded.features[:, 0].tolist(), labels.tolist()))
        return Reading(0.0, 0.0, "linear", {name: float(len(labels)) for name in self.members}, wilson(1, 2))


@pytest.mark.parametrize("count", [80, 90, 203])
def test_parts_cover_the_sample_and_are_balanced(count):
    labels = torch.randint(0, 5, (count,), generator=seeded())
    encoded, panel = Encoded(torch.arange(count)[:, None].float(), torch.zeros(count, 0)), Recorder()
    found = learning_curves(panel, encoded, labels, 0)
    assert set(found) == set(MEMBERS)
    for points in found.values():
        assert [number for number, _ in points] == [round(count / 4), round(count / 2), count]
        assert [nats for _, nats in points] == pytest.approx([count / 4, count / 2, count])
    quarters, halves, (whole,) = panel.asked[:4], panel.asked[4:6], panel.asked[6:]
    for parts in (quarters, halves, [whole]):
        assert sorted(row for rows, _ in parts for row in rows) == list(range(count))
        shares = torch.stack([torch.tensor(told).bincount(minlength=5) for _, told in parts])
        assert int((shares.amax(0) - shares.amin(0)).max()) <= 1
        assert all(labels[torch.tensor(rows).long()].tolist() == told for rows, told in parts)


@pytest.mark.parametrize(("count", "sizes"), [(16, [4, 8, 16]), (15, [8, 15]), (7, [7])])
def test_parts_of_fewer_than_two_images_a_class_are_left_out(count, sizes):
    found = learning_curves(
        Recorder(), Encoded(torch.zeros(count, 1), torch.zeros(count, 0)), torch.arange(count) % 2, 0
    )
    assert [number for number, _ in found["linear"]] == sizes


def test_a_panel_without_members_to_fit_has_no_curve():
    assert (
        learning_curves(Recorder(("own",)), Encoded(torch.zeros(8, 1), torch.zeros(8, 0)), torch.arange(8) % 2, 0) == {}
    )
    assert largest({}) == ()
    assert extrapolated(Reading(0.4, 0.0, "own", {"own": 0.4}, wilson(1, 2)), {}) == 0.4


def test_what_few_images_hide_of_many_features_is_within_reach_of_the_curve():
    # classes that 20 features tell together: the fewer images, the less neighbours and trees read
    labels = torch.arange(800) % 2
    features = torch.randn(800, 20, generator=seeded()) + 0.3 * (2.0 * labels - 1)[:, None]
    panel = Panel(READERS, ("neighbours", "forest"))
    whole = panel.read(Encoded(features, torch.zeros(800, 0)), labels, 0)
    few = Encoded(features[:160], torch.zeros(160, 0))
    read, curves = panel.read(few, labels[:160], 0), learning_curves(panel, few, labels[:160], 0)
    assert set(curves) == {"neighbours", "forest"}
    points = largest(curves)
    assert points[0][1] < points[1][1] < points[2][1]
    assert read.nats < whole.nats < extrapolated(read, curves) + 2 * read.stderr
