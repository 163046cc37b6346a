from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest

from audit.records import write_calibration
from reports.cli import main
from reports.figures.calibration_figure import calibration_figure
from reports.page.html import render_report
from reports.tables.calibration import calibration_of, calibration_sentence, failed_calibration, verdict


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def crosses(ax):
    return [line for line in ax.lines if line.get_marker() == "x"]


def test_an_estimator_that_passes_says_on_how_many_and_its_largest_error(calibrated):
    rows = calibrated("sandwich", 0.02)
    assert calibration_sentence(rows, "sandwich") == ("calibration: passed on 9 of 9 channels, largest error 0.02 nats")
    assert not failed_calibration(rows, "sandwich")


def test_an_estimator_that_fails_is_named_with_the_channel(calibrated):
    rows = [*calibrated("sandwich", 0.02), *calibrated("mine-infonce", 0.11)]
    rows[10] = replace(rows[10], normal_nats=rows[10].true_normal_nats + 0.31)
    assert calibration_sentence(rows, "mine-infonce") == (
        "FAILED calibration on 2 of 9 channels (largest error 0.31 nats on gaussian sigma 0)"
    )
    assert failed_calibration(rows, "mine-infonce")
    assert not failed_calibration(rows, "sandwich")


def test_a_case_that_was_never_judged_has_not_passed(calibrated):
    rows = [replace(row, worst_tolerance=None) for row in calibrated("mine-infonce", 0.02)]
    assert calibration_sentence(rows, "mine-infonce").endswith("largest error 0.02 nats (normal case only)")


def test_the_worst_case_alone_can_fail(calibrated):
    rows = calibrated("sandwich", 0.02)
    rows[1] = replace(rows[1], worst_nats=rows[1].true_worst_nats - 0.2)
    said = calibration_sentence(rows, "sandwich")
    assert said == "FAILED calibration on 1 of 9 channels (largest error 0.20 nats on two-points sigma 1)"
    assert [verdict(row) for row in rows] == ["passed", "FAILED", *["passed"] * 7, "no verdict"]


def test_nobody_calibrated_it_and_nothing_was_judged(calibrated):
    rows = calibrated("sandwich")
    assert calibration_sentence(rows, "mine-infonce") == "not calibrated"
    assert calibration_sentence([], "sandwich") == "not calibrated"
    assert calibration_sentence(rows[-1:], "sandwich") == "calibration: 1 channel shown, none with a verdict"


def test_rows_of_several_folders_count_once(calibrated, tmp_path):
    rows = calibrated("sandwich")
    for folder in ("one", "two"):
        write_calibration(tmp_path / folder, "key", rows)
    assert len(calibration_of([tmp_path / "one", tmp_path / "two"])) == len(rows)
    assert calibration_of([tmp_path / "three"]) == []


def test_the_figure_crosses_failures_and_sets_its_scale_by_what_is_judged(calibrated):
    figure = calibration_figure([*calibrated("sandwich", 0.02), *calibrated("mine-infonce", 0.3)])
    assert len(figure.axes) == 4
    good, bad = figure.axes[0], figure.axes[2]
    assert (len(crosses(good)), len(crosses(bad))) == (0, 6)
    assert good.get_ylim()[1] < 0.2
    shown = texts(figure)
    assert "+8.00" in shown
    assert {"truth (nats, closed form)", "estimate − truth\n(nats, measured)", "tolerance"} <= set(shown)
    assert any("FAILED calibration on 8 of 9" in text for text in shown)
    assert calibration_figure([]) is None


def test_the_report_names_a_failing_estimator_over_its_ranking(suite, calibrated):
    records = suite(estimators=["sandwich", "mine-infonce", "label-level"])
    page = render_report(records, [*calibrated("sandwich", 0.02), *calibrated("mine-infonce", 0.3)])
    order = [page.index(f"<h4><bdi>{name}</bdi>") for name in ("sandwich", "label-level", "mine-infonce")]
    assert order == sorted(order)
    passed = page.index('<p class="quiet">calibration: passed on 9 of 9 channels, largest error 0.02 nats</p>')
    missing = page.index('<p class="quiet">not calibrated</p>')
    failed = page.index('<p class="notice">FAILED calibration on 8 of 9 channels')
    assert order[0] < passed < order[1] < missing < order[2] < failed
    assert '<section id="calibration">' in page
    assert "+8.000" in page
    assert '<p class="notice">mine-infonce: FAILED calibration on 8 of 9' in page[: page.index("</header>")]
    assert '<section id="calibration">' not in render_report(records)


def test_the_terminal_says_it_in_the_title(suite, calibrated, write_run, capsys):
    folder = write_run(suite(models=3, estimators=["sandwich", "mine-infonce"]))
    write_calibration(folder, "key", calibrated("mine-infonce", 0.3))
    assert main(["leaderboard", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "ℓ∞ 0.2, sandwich" in shown
    assert shown.index("not calibrated") < shown.index("FAILED calibration on 8 of 9 channels (largest error 0.30 nats")


def test_a_broken_calibration_is_an_error_of_its_own(suite, write_run, capsys):
    folder = write_run(suite(models=1))
    (folder / "calibration").mkdir()
    Path(folder / "calibration" / "x.json").write_text("{")
    assert main(["leaderboard", str(folder)]) == 5
    assert "is not a calibration" in capsys.readouterr().err


@pytest.mark.parametrize("hostile", ["</script><script>alert(1)</script>", "\x1b[31mred\u202e", "模型"])
def test_hostile_channels_stay_text(suite, calibrated, hostile):
    rows = [replace(row, channel=hostile, parameters=hostile) for row in calibrated("sandwich", 0.3)]
    renamed = [replace(row, estimator=hostile) for row in rows]
    page = render_report(suite(models=1, estimators=["sandwich"]), [*rows, *renamed])
    assert page.count("<script>") == 1
    assert "\x1b" not in page
    assert "\u202e" not in page
