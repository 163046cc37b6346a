from dataclasses import replace

import pytest

from audit.records import AuditRecord
from reports.page.html import render_report
from reports.statistics.gap_statistics import correlations
from reports.tables.contradictions import cross_check
from reports.tables.ranking import leaderboard
from reports.tables.table import contradicted, to_frame, to_rows

SAID = "contradicted: worst_nats 1.30 at eps 8/255 is above 0.90 at eps 2/255"


def at(record, eps, worst, **changes):
    """The record at another radius; its identity differs in the radius alone, as a run's does."""
    details = {**record.details, "identity": {"seed": 0, "eps": eps}}
    named = {"cell_id": f"{record.cell_id}-{eps:g}", "details": details, "worst_nats_se": 0.05}
    return replace(record, **{**named, "eps": eps, "worst_nats": worst, **changes})


def flags(*records):
    return [record.flags for record in cross_check(records)]


def test_a_worst_case_that_rises_with_eps_is_flagged_with_both_figures(zoo):
    small, large = at(zoo[0], 2 / 255, 0.9), at(zoo[0], 8 / 255, 1.3)
    assert flags(small, large) == [(), (SAID,)]
    assert flags(large, small) == [(SAID,), ()]
    assert list(contradicted(to_frame([small, large]))) == [False, True]
    assert to_rows([small, large])[1]["flags"] == [SAID]


def test_a_worst_case_that_falls_is_fine(zoo):
    assert flags(at(zoo[0], 2 / 255, 1.3), at(zoo[0], 8 / 255, 0.9)) == [(), ()]


@pytest.mark.parametrize(("worst", "refuted"), [(1.04, False), (1.0414, False), (1.0415, True)])
def test_two_combined_standard_errors_are_excused(zoo, worst, refuted):
    # 2 * hypot(0.05, 0.05) = 0.14142
    (_, found) = flags(at(zoo[0], 0.1, 0.9), at(zoo[0], 0.2, worst))
    assert bool(found) == refuted


def test_errors_that_are_not_known_excuse_rounding_only(zoo):
    exact = {"worst_nats_se": None}
    assert flags(at(zoo[0], 0.1, 0.9, **exact), at(zoo[0], 0.2, 0.9 + 1e-9, **exact)) == [(), ()]
    (_, found) = flags(at(zoo[0], 0.1, 0.9, **exact), at(zoo[0], 0.2, 0.901, **exact))
    assert found == ("contradicted: worst_nats 0.901 at eps 0.2 is above 0.900 at eps 0.1",)


@pytest.mark.parametrize(
    "difference",
    [
        {"model": "other"},
        {"weights_sha256": "cd" * 32},
        {"dataset": "mnist"},
        {"layer": "logits"},
        {"norm": "l2"},
        {"estimator": "sandwich"},
        {"images": 100},
        {"details": {"identity": {"seed": 0, "eps": 0.2, "settings": "other"}}},
        {"status": "failed"},
        {"worst_nats": None},
    ],
)
def test_only_records_equal_in_everything_but_eps_are_compared(zoo, difference):
    assert flags(at(zoo[0], 0.1, 0.9), at(zoo[0], 0.2, 1.3, **difference)) == [(), ()]


def test_the_lowest_smaller_ball_speaks_and_earlier_flags_stay(zoo):
    radii = [at(zoo[0], eps, worst) for eps, worst in ((0.05, 0.8), (0.1, 0.5), (0.2, 1.3))]
    found = flags(*radii[:2], replace(radii[2], flags=("saturated",)))
    assert found == [(), (), ("contradicted: worst_nats 1.30 at eps 0.2 is above 0.50 at eps 0.1", "saturated")]


def test_a_refuted_record_refutes_no_other(zoo):
    collapsed = at(zoo[0], 0.1, 0.1, flags=("contradicted: worst_nats 0.10 is under its measured floor 0.50",))
    assert flags(collapsed, at(zoo[0], 0.2, 0.8))[1] == ()


def test_an_overwritten_cell_is_no_witness(zoo):
    old = at(zoo[0], 0.1, 0.1)
    assert flags(old, replace(old, worst_nats=0.9), at(zoo[0], 0.2, 0.8))[2] == ()


def test_checking_twice_changes_nothing(zoo):
    radii = [at(zoo[0], eps, worst) for eps, worst in ((0.05, 0.8), (0.1, 1.3), (0.2, 1.8))]
    once = cross_check(radii)
    assert [len(record.flags) for record in once] == [0, 1, 1]
    assert cross_check(once) == once
    assert all(isinstance(record, AuditRecord) for record in once)


def test_the_report_the_ranking_and_the_correlations_see_it(zoo):
    records = [at(record, eps, worst) for record in zoo for eps, worst in ((2 / 255, 0.9), (8 / 255, 0.8))]
    records[1] = replace(records[1], worst_nats=1.3)
    table = leaderboard(to_frame(records))
    refuted = table[contradicted(table)]
    assert list(refuted["rank"]) == ["unranked"]
    assert [correlations(rows).spearman.n for _, rows in table.groupby("eps")] == [12, 11]
    page = render_report(records)
    assert "worst_nats 1.30 at eps 8/255 is above 0.90 at eps 2/255." in page
    board, details = page.split("<h2>Model by model</h2>")
    assert SAID in board
    assert SAID in details
    assert "1 contradicted model left out." in page
