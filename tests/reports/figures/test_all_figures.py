from dataclasses import replace
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from audit.theory import fano_accuracy_bound
from reports.figures.all_figures import (
    agreement_figure,
    calibration_figure,
    figure1,
    figure2,
    figure_bytes,
    save_figures,
)
from reports.figures.information_figure import limit
from reports.figures.style import Sheet, fill_of, label, looks
from reports.tables.table import to_frame


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def test_files_exist_are_valid_and_deterministic(mixed_zoo, tmp_path):
    paths = save_figures(to_frame(mixed_zoo), tmp_path)
    assert [path.name for path in paths] == ["figure1.png", "figure1.svg", "figure2.png", "figure2.svg"]
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width == 1260
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


def test_figure_two_shows_what_is_proved_with_its_limits_on_the_population(zoo):
    """Proved .25, not broken .5 of the images; between .125 and .625 on their population."""
    kept = {"proved_share": 0.25, "not_broken_share": 0.5, "kept_population_low": 0.125, "kept_population_high": 0.625}
    figure = figure2(to_frame([replace(zoo[0], **kept), *zoo[1:]]))
    lines = [tuple(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata()) == 2]
    assert {(0.25, 0.5), (0.125, 0.625)} <= set(lines)
    assert "network: proved to keep, not broken (certified)" in texts(figure)
    assert "network: proved to keep, not broken (certified)" not in texts(figure2(to_frame(zoo)))


def test_no_limit_is_drawn_where_too_few_images_state_none(suite):
    records = [record for record in suite() if record.estimator == "label-information"]
    few = [replace(each, flags=("too_few_images: 10 images a class",), fano_accuracy_bound=None) for each in records]
    drawn, without = figure2(to_frame(records)), figure2(to_frame(few))
    assert len(drawn.axes[0].lines) == len(without.axes[0].lines) + 1
    assert "No line: too few images a class to state a bound on heads." in " ".join(texts(without))


def test_many_contradicted_models_are_counted(zoo):
    figure = figure1(to_frame([replace(record, flags=("contradicted",)) for record in zoo]))
    assert "and 6 more contradicted" in texts(figure)


def test_one_panel_a_group(zoo):
    frame = to_frame([replace(record, eps=0.1 if i < 5 else 0.2) for i, record in enumerate(zoo[:10])])
    assert len(figure1(frame).axes) == len(figure2(frame).axes) == 2


def test_figure_one_has_a_panel_an_estimator_that_claims_to_rank(suite):
    figure = figure1(to_frame(suite()))
    titles = [ax.get_title(loc="left").splitlines()[0] for ax in figure.axes]
    assert titles == ["sandwich", "label-information", "label-level", "mine-infonce"]
    alone = figure1(to_frame(suite(estimators=["ref-local"])))
    assert any("does not claim to rank" in text for text in texts(alone))


def test_a_setting_starts_a_row(suite):
    figure = figure1(
        to_frame(suite(models=3, radii=(0.1, 0.2), estimators=["sandwich", "label-level", "mine-infonce"]))
    )
    rows = [round(ax.get_position().y0, 3) for ax in figure.axes]
    assert [len(set(rows[:3])), len(set(rows[3:])), len(set(rows))] == [1, 1, 2]


def test_figure_two_shows_label_information_under_fano_and_replications_apart(suite):
    figure = figure2(to_frame(suite()))
    titles = [ax.get_title(loc="left").splitlines()[0] for ax in figure.axes]
    assert titles == ["label-information", "mine-infonce", "ref-local", "ref-mean"]
    labels = [ax.get_xlabel() for ax in figure.axes]
    assert labels[0] == "label information I(Y; g(X)) (nats, estimate)"
    assert set(labels[1:]) == {"mutual information (nats, estimate)"}
    assert [any(line.is_dashed() for line in ax.lines) for ax in figure.axes] == [False, True, True, True]
    assert {"exact Fano (estimated bound)", "Theorem 3.4 (estimated bound)"} <= set(texts(figure))
    nothing = figure2(to_frame(suite(estimators=["sandwich", "label-level"])))
    assert texts(nothing) == ["no model has these values"]


def test_the_fano_curve_has_the_known_values(suite):
    (ax,) = figure2(to_frame(suite(estimators=["label-information"]))).axes
    curve = max(ax.lines, key=lambda line: len(line.get_xdata()))
    x, y = np.array(curve.get_xdata()), np.array(curve.get_ydata())
    assert np.interp([0.5, 1.08, 1.5], x, y) == pytest.approx([0.495, 0.715, 0.837], abs=0.001)
    assert np.interp([0.003, 0.03], x, y) == pytest.approx(
        [fano_accuracy_bound(nats, 0.1) for nats in (0.003, 0.03)], abs=0.002
    )
    assert (y[0], max(y) <= 1) == (0.1, True)
    assert limit("fano", np.array([-1.0, 0.0, 9.0]), 2) == pytest.approx([0.5, 0.5, 1.0])


def test_contradicted_models_of_several_panels_are_crossed_where_they_are(suite):
    records = suite(estimators=["sandwich", "mine-infonce"])
    planted = [replace(r, flags=("contradicted: x",)) if i == 1 else r for i, r in enumerate(records)]
    figure = figure1(to_frame(planted))
    crossed = [sum(line.get_marker() == "x" for line in ax.lines) for ax in figure.axes]
    assert crossed == [0, 1]
    assert "contradicted: not ranked" in texts(figure)
    assert any("1 contradicted model left out." in text for text in texts(figure))


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


def test_nothing_in_a_figure_overlaps(mixed_zoo, suite, calibrated):
    two = to_frame(suite(models=4, radii=(0.1, 0.2)))
    frame, rows = to_frame(mixed_zoo), [*calibrated("sandwich"), *calibrated("mine-infonce", 0.3)]
    drawn = [figure1(frame), figure2(frame), figure1(two), figure2(two), agreement_figure(two)]
    for figure in (*drawn, calibration_figure(rows)):
        figure_bytes(figure, "svg")
        boxes = [box.get_window_extent() for box in figure.legends] + [axes.get_tightbbox() for axes in figure.axes]
        page = figure.bbox
        for i, one in enumerate(boxes):
            assert page.x0 <= one.x0 + 1
            assert one.x1 <= page.x1 + 1
            assert page.y0 <= one.y0 + 1
            assert one.y1 <= page.y1 + 1
            assert not any(one.overlaps(other) for other in boxes[i + 1 :])


def test_long_names_in_legends_and_channels_of_one_truth_stay_on_the_page(calibrated, suite):
    rows = [
        replace(row, channel=f"{row.channel} behind a map of 8x8 images") for row in calibrated("label-information")
    ]
    alone = [row for row in calibrated("sandwich", error=1e-16, channels=1) if row.normal_tolerance is not None]
    exact = [replace(row, normal_tolerance=None, true_worst_nats=None, worst_nats=None) for row in alone]
    for figure in (
        calibration_figure([*rows, *exact]),
        agreement_figure(to_frame(suite(3, ("sandwich", "mine-infonce")))),
    ):
        figure_bytes(figure, "svg")
        boxes = [box.get_window_extent() for box in figure.legends] + [axes.get_tightbbox() for axes in figure.axes]
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 + 1
            assert box.x1 <= figure.bbox.x1 + 1
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])
    lone = calibration_figure(exact).axes[0]
    assert np.ptp(lone.get_ylim()) > 1e-3  # an error of rounding gets no axis of its own
    assert np.ptp(lone.get_xlim()) == pytest.approx(0.2)


def test_the_agreement_explains_the_star_only_where_one_is_drawn(suite):
    with_star = texts(agreement_figure(to_frame(suite(3, ("sandwich", "ref-local")))))
    without = texts(agreement_figure(to_frame(suite(3, ("sandwich", "mine-infonce")))))
    assert ("ref-local *" in with_star, any("* does not" in text for text in with_star)) == (True, True)
    assert not any("*" in text for text in without)


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
    assert [Sheet(n).columns for n in (1, 2, 3, 4, 5, 7)] == [1, 2, 3, 2, 3, 3]
    assert Sheet(4, groups=(2, 2)).columns == 2
    assert Sheet(2, groups=(1, 1)).columns == 2
