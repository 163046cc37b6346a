"""Names on points: none overlaps another name, a point or the frame, and each stands near its own point."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Annotation

from reports.figures.all_figures import by_setting, figure1, figure2, save_figures
from reports.figures.names import Named, name_points, without_shared_start
from reports.figures.profile_figure import profile_figures
from reports.figures.style import Sheet, limits, paper_style
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame


def names_of(ax):
    return [text for text in ax.texts if text.get_gid() == "name"]


def check_apart(figure):
    """Check that names lie inside their axes and apart from one another and from every marker; return how many."""
    figure.canvas.draw()
    count = 0
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in names_of(ax)]
        inside = ax.get_window_extent()
        for i, box in enumerate(boxes):
            assert inside.x0 <= box.x0
            assert box.x1 <= inside.x1
            assert inside.y0 <= box.y0
            assert box.y1 <= inside.y1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
            for line in ax.lines:
                if str(line.get_gid()).startswith("cell-"):
                    x, y = ax.transData.transform(line.get_xydata()[0])
                    assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)
        count += len(boxes)
    return count


def drawn(points):
    """An axes with points and their names, and how many found no room."""
    with paper_style():
        figure, (ax,) = Sheet(1, width=4.8, plot_height=3.4).draw()
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        for x, y, _ in points:
            ax.plot([x], [y], "o", gid=f"cell-{x}")
        left = name_points(ax, [Named(*point) for point in points])
    return figure, ax, left


def test_names_of_a_crowd_do_not_collide(zoo):
    for figure in (figure1(to_frame(zoo)), figure2(to_frame(zoo))):
        assert check_apart(figure) >= 11


@pytest.mark.parametrize("seed", range(3))
def test_eight_points_almost_on_one_another_are_all_named_nearby(seed):
    random = np.random.default_rng(seed)
    near = [(0.7 + 0.02 * x, 0.93 + 0.02 * y) for x, y in random.normal(size=(8, 2))]
    figure, ax, left = drawn([(x, min(y, 0.98), f"resnet-robust-{i}") for i, (x, y) in enumerate(near)])
    assert left == 0
    assert check_apart(figure) == 8
    for text in names_of(ax):
        assert isinstance(text, Annotation)
        assert math.dist(text.get_position(), (0, 0)) < 150  # points; the axes is 290 wide


def test_a_point_alone_has_its_name_beside_it_without_a_line():
    _, ax, _ = drawn([(0.5, 0.5, "alone")])
    assert [text.get_text() for text in ax.texts] == ["alone"]
    (x, y), box = ax.transData.transform((0.5, 0.5)), ax.texts[0].get_window_extent()
    assert math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0)) < 12  # pixels, 100 an inch


def test_names_without_room_are_counted():
    points = [(0.05 + 0.09 * (i % 10), 0.05 + 0.09 * (i // 10), "name-of-thirty-characters-xxxx") for i in range(100)]
    figure, _, left = drawn(points)
    assert 0 < left < 100
    assert check_apart(figure) == 100 - left


def test_what_all_names_share_is_left_out_and_never_a_whole_name():
    assert without_shared_start(["digits-a-b", "digits-a-c"]) == ["b", "c"]
    assert without_shared_start(["a", "a-b"]) == ["a", "a-b"]
    assert without_shared_start(["x-a", "x-a"]) == ["x-a", "x-a"]
    assert without_shared_start([]) == []


def test_a_figure_for_every_setting(suite, tmp_path):
    frame = leaderboard(to_frame(suite(models=3, estimators=["label-information"], radii=(0.1, 8 / 255))))
    names = {f"figure{i}-digits-penultimate-linf-{eps}" for i in (1, 2) for eps in ("0.1", "8-255")}
    assert {path.stem for path in save_figures(frame, tmp_path)} == names
    one = frame[frame["eps"] == 0.1]
    assert {path.stem for path in save_figures(one, tmp_path)} == {"figure1", "figure2"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "figure1.png", "figure1.svg", "figure2.png", "figure2.svg",
    }  # fmt: skip


def test_settings_that_are_spelt_alike_have_files_of_their_own(zoo):
    frame = to_frame([replace(zoo[0], layer="a b"), replace(zoo[1], layer="a/b")])
    names = [name for name, _ in by_setting(frame)]
    assert len(set(names)) == 2


def test_profiles_of_one_model_have_their_values_in_the_order_of_layers(zoo):
    layers = ["logits", "features.10", "features.2", "input"]
    records = [replace(zoo[2], cell_id=name, layer=name, rv=0.5 + i, rv_se=0.1) for i, name in enumerate(layers)]
    nats, shares = profile_figures(to_frame(records))
    assert nats.title == "Information against layer: digits, ℓ∞ 0.2, mine"
    assert shares.title == "Accuracy against layer: digits, ℓ∞ 0.2"
    (ax,) = nats.figure.axes
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["input", "features.2", "features.10", "logits"]
    lines = [list(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 4]
    assert lines[-1] == [3.5, 2.5, 1.5, 0.5]
    for profile in (nats, shares):
        profile.figure.canvas.draw()
        page, box = profile.figure.bbox, profile.figure.axes[0].get_tightbbox()
        assert (box.x0 >= page.x0, box.x1 <= page.x1) == (True, True)
        assert not any(box.overlaps(key.get_window_extent()) for key in profile.figure.legends)
    assert profile_figures(to_frame(records[:1])) == []


def test_no_axis_is_in_steps_of_rounding(zoo):
    frame = to_frame(zoo)
    low, high = limits([frame["rv"] * 0 + 1.0 + 1e-16 * np.arange(12)])
    assert high - low == pytest.approx(0.2)
