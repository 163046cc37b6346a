from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from PIL import Image

from reports.figures import figure1, figure2, figure_bytes, save_figures
from reports.style import Sheet, fill_of, label, looks
from reports.table import to_frame


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def test_files_exist_are_valid_and_deterministic(mixed_zoo, tmp_path):
    paths = save_figures(to_frame(mixed_zoo), tmp_path)
    assert [path.name for path in paths] == ["figure1.png", "figure1.svg", "figure2.png", "figure2.svg"]
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == 1050
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert b"<dc:date>" not in path.read_bytes()
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in save_figures(to_frame(mixed_zoo[::-1]), tmp_path)] == before


def test_labels_carry_the_kinds(zoo):
    assert {"RV (nats, estimate)", "adversarial gap (measured)"} <= set(texts(figure1(to_frame(zoo))))
    assert "Theorem 3.4 (estimated bound)" in texts(figure2(to_frame(zoo)))


def test_a_contradicted_model_is_crossed_and_named(mixed_zoo):
    figure = figure1(to_frame(mixed_zoo))
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert len(crosses) == 1
    assert "contradicted: baseline-h-robust" in texts(figure)


def test_many_contradicted_models_are_counted(zoo):
    figure = figure1(to_frame([replace(record, flags=("contradicted",)) for record in zoo]))
    assert "and 6 more contradicted" in texts(figure)


def test_one_panel_a_group(zoo):
    frame = to_frame([replace(record, eps=0.1 if i < 5 else 0.2) for i, record in enumerate(zoo[:10])])
    assert len(figure1(frame).axes) == len(figure2(frame).axes) == 2


def test_one_model_and_none(zoo):
    assert "Too few models (1) for a correlation." in texts(figure1(to_frame(zoo[:1])))
    assert texts(figure2(to_frame([]))) == ["no model has these values"]


def test_the_theorem_line_is_clipped_to_chance_and_one(zoo):
    (line,) = [line for line in figure2(to_frame(zoo)).axes[0].lines if line.is_dashed()]
    x, y = line.get_xdata(), line.get_ydata()
    assert min(y) >= 0.1
    assert max(y) == 1
    assert y[0] == pytest.approx(0.30103, abs=1e-4)
    assert x[0] == 0


def test_hostile_names_are_drawn_as_text(hostile):
    figure = figure1(to_frame([replace(record, layer="fc") for record in hostile]))
    figure_bytes(figure, "png")
    svg = figure_bytes(figure, "svg")
    assert {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(svg).iter()}.isdisjoint({"script", "img"})


def test_the_readers_own_settings_change_nothing(zoo):
    before = figure_bytes(figure1(to_frame(zoo)), "svg")
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "text.color": "red"}):
        assert figure_bytes(figure1(to_frame(zoo)), "svg") == before


def test_nothing_in_a_figure_overlaps(mixed_zoo):
    for figure in (figure1(to_frame(mixed_zoo)), figure2(to_frame(mixed_zoo))):
        figure_bytes(figure, "png")
        (axes,) = figure.axes
        boxes = [legend.get_window_extent() for legend in figure.legends] + [axes.get_tightbbox()]
        page = figure.bbox
        for i, one in enumerate(boxes):
            assert page.x0 <= one.x0 + 1
            assert one.x1 <= page.x1 + 1
            assert page.y0 <= one.y0 + 1
            assert one.y1 <= page.y1 + 1
            assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_looks_are_distinct_and_do_not_depend_on_order():
    names = [f"family{i}" for i in range(10)]
    assert looks(names) == looks(names[::-1])
    assert len(set(looks(names).values())) == 10


@pytest.mark.parametrize(
    ("training", "trained", "fill"),
    [
        ("standard", 0.0, "none"),
        ("certified", 0.0, "bottom"),
        ("unknown", 0.0, "bottom"),
        ("robust", 0.1, "left"),
        ("robust", 8 / 255, "left"),
        ("robust", 0.2, "full"),
        ("certified", 1, "full"),
    ],
)
def test_fill(training, trained, fill):
    assert fill_of(training, trained, 0.2) == fill


def test_labels_are_drawable():
    assert label("_hidden") == " _hidden"
    assert label("模型") == "??"
    assert label("\x1b") == "(no name)"


def test_a_sheet_is_at_most_three_panels_wide():
    assert [Sheet(n).columns for n in (1, 2, 3, 7)] == [1, 2, 3, 3]
