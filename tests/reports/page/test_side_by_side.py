"""`rvaudit report RUN --compare OTHER`: the cells that two runs share, with the values of both."""

from dataclasses import replace

import pytest

from audit.errors import UsageError
from reports.cli import main
from reports.page.html import render_report
from reports.page.side_by_side import Other, side_by_side


def test_rows_hold_both_values_and_their_difference(zoo):
    seeds = [{"seed": seed, "rv": 1.0 + seed / 10, "worst_nats": 0.9} for seed in range(2)]
    first = replace(zoo[0], rv=1.05, details={"per_seed": seeds, "identity": {"eps": 0.2, "steps": 10}})
    later = [{**row, "rv": row["rv"] + 0.25} for row in seeds]
    second = replace(first, rv=1.3, natural_accuracy=0.5, adversarial_accuracy=None,
                     details={"per_seed": later, "identity": {"eps": 0.2, "steps": 20}})  # fmt: skip
    found = side_by_side([first, zoo[1]], Other("other", [second, zoo[2]]))
    assert found.rows == [
        ("baseline-h-standard", "digits, penultimate, ℓ∞ 0.2", "mine", "1.050 ± 0.060", "1.300 ± 0.060",
         "+0.250 [+0.250, +0.250]", "0.980 → 0.500", "0.050 → –", "steps"),
    ]  # fmt: skip
    assert any("only the first run has bundled:baseline-h-quarter" in sentence for sentence in found.unpaired)
    assert any(
        "only the second run has bundled:baseline-h-robust, penultimate, linf 0.2" in sentence
        for sentence in found.unpaired
    )
    assert found.sentences[-1].startswith("Differences are the second run less the first")


def test_runs_without_a_common_cell_are_refused(zoo):
    with pytest.raises(UsageError, match="no finished cell in common"):
        render_report(zoo[:1], other=Other("other", zoo[1:2]))


def test_the_command_writes_a_page_of_its_own(zoo, write_run, capsys):
    run, other = write_run(zoo[:3]), write_run([replace(zoo[0], rv=2.0)], "<b>other")
    assert main(["report", str(run), "--compare", str(other)]) == 0
    assert str(run / "comparison.html") in capsys.readouterr().out
    text = (run / "comparison.html").read_text()
    assert "<h2>Beside <bdi>&lt;b&gt;other</bdi></h2>" in text
    assert text.index('id="comparison"') < text.index('id="leaderboard"')
    assert "Cells that only one of the runs has: 2" in text
    assert 'id="comparison"' not in (run / "report.html").read_text()
