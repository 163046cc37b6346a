"""Names on points: none overlaps another name, a point or the frame, and each stands near its own point."""

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from reports.figures.all_figures import by_setting, figure1, figure2, save_figures
from reports.figures.leaderboard_figures import read_leaderboard
from reports.figures.naming.names import Named, name_points, without_shared_start
from reports.figures.profile_figure import profile_figures
from reports.figures.style import Sheet, limits, paper_style
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame

ROOT = Path(__file__).parents[4]


def names_of(ax):
    return [text for text in ax.texts if text.get_gid() == "name"]


def leaders_of(ax):
    """The lines from points to names, in pixels (2, 2)."""
    found = []
    for text in ax.texts:
        if text.get_gid() == "leader":
            start = ax.transData.transform(text.xy)
            found.append(np.array([start, start + np.array(text.get_position()) * ax.figure.dpi / 72]))
    return found


def check_apart(figure):
    """Check that names lie inside their axes and apart from one another and from every marker; return how many.

    No line to a point runs through a name.
    """
    figure.canvas.draw()
    count, point = 0, figure.dpi / 72
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in names_of(ax)]
        for line in leaders_of(ax):
            along = line[0] + np.linspace(0, 1, 400)[1:-1, None] * (line[1] - line[0])
            assert not any(box.contains(*place) for box in boxes for place in along)
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
                    half = point * line.get_markersize() / 2
                    assert not box.overlaps(Bbox.from_extents(x - half, y - half, x + half, y + half))
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


@pytest.mark.parametrize("figure_of", [figure1, figure2])
@pytest.mark.parametrize("name", ["digits", "third-party", "figure1-small"])
def test_every_model_of_the_committed_rows_has_its_name(name, figure_of):
    frame = read_leaderboard(ROOT / "docs" / name / "leaderboard.csv")
    figure = figure_of(frame)
    said = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert not [text for text in said if "no room" in text]
    points = [line for ax in figure.axes for line in ax.lines if str(line.get_gid()).startswith("cell-")]
    assert check_apart(figure) == len(points) >= frame["model"].nunique()


@pytest.mark.parametrize(("spread", "seed"), [(0.0, 0), (0.0, 2), (0.01, 1), (0.06, 0)])
def test_twenty_four_points_in_a_crowd_are_all_named(zoo, spread, seed):
    random = np.random.default_rng(seed)
    middle = ((1.0, 0.8), (0.2, 0.5), (0.6, 0.1))[seed]
    records = [
        replace(zoo[0], cell_id=f"{i}", model=f"digits-network-{i:02d}-robust", rv=middle[0] + spread * x, rv_se=0.01,
                adversarial_gap=middle[1] + spread * y)
        for i, (x, y) in enumerate(random.normal(size=(24, 2)).clip(-1.5, 1.5))
    ]  # fmt: skip
    alone = replace(zoo[0], cell_id="far", model="digits-far", rv=0.4, adversarial_gap=0.4)
    figure = figure1(to_frame([*records, alone]))
    assert check_apart(figure) == 25
    crossing = [(a, b) for ax in figure.axes for a, b in combinations(leaders_of(ax), 2) if do_cross(*a, *b)]
    assert not crossing or spread  # the points of one place have one column


def do_cross(a, b, c, d):
    def side(p, q, r):
        return np.sign((q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0]))

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def test_models_of_equal_values_are_named_wherever_there_is_room(zoo):
    records = [replace(zoo[0], cell_id=str(i), model=f"digits-net-{i}", rv=0.3 + 0.1 * (i % 6)) for i in range(24)]
    figure = figure1(to_frame(records))
    assert check_apart(figure) == 24


def test_a_panel_grows_until_every_name_has_room(zoo):
    names = [f"{i:02d}-a-network-with-a-long-name" for i in range(40)]
    records = [
        replace(zoo[0], cell_id=name, model=name, rv=0.3 + 0.1 * (i % 6), rv_se=0.0, adversarial_gap=i / 40)
        for i, name in enumerate(names)
    ]
    few, many = figure1(to_frame(records[:6])), figure1(to_frame(records))
    assert many.get_figwidth() > few.get_figwidth()
    assert check_apart(many) == 40


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
