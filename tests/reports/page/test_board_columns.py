"""The leaderboard of the page: its columns and their order, flags as codes with one sentence, the head, one model."""

import os
import re
from dataclasses import replace

from audit.flags import MEANINGS, FlagCode
from audit.records import RecordStore
from reports.page.cells import chips, headers_of
from reports.page.html import render_report
from reports.page.origin import of_folder, versions
from reports.publish import write_html
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame


def heads(records, *, shown=True):
    """The titles of the columns of the first table, of those shown at first or of all."""
    head = re.search(r"<thead>(.*?)</thead>", render_report(records), re.S).group(1)
    cells = re.findall(r"<th scope=\"col\"([^>]*)>\s*<button type=\"button\">([^<]*)</button>", head)
    return [title for attributes, title in cells if not (shown and " hidden" in attributes)]


def full(record, **changes):
    made = {"certified_bound": 0.4, "certified_bound_population": 0.5, "certified_tier": "proved", "best_head": "alf"}
    probe = {"worst_probe_accuracy": 0.41, "worst_probe_accuracy_low": 0.38, "worst_probe_accuracy_high": 0.44}
    return replace(record, **made, **probe, best_head_accuracy=0.3, passes=123456, **changes)


def test_what_a_reader_compares_stands_before_the_flags(zoo):
    assert heads([full(record) for record in zoo]) == [
        "rank", "model", "normal-case MI", "worst-case MI", "RV", "Fano accuracy bound", "natural accuracy",
        "adversarial accuracy", "adversarial gap", "worst-case probe", "best head", "no head exceeds", "passes",
        "flags",
    ]  # fmt: skip
    two = [full(record) for record in zoo[:2]]
    assert set(heads(two, shown=False)) - set(heads(two)) == {
        "no head exceeds, all images of their kind", "training", "family", "adversarial accuracy bound",
        "floor of the MI",
    }  # fmt: skip


def test_columns_that_no_row_fills_are_left_out(zoo):
    titles = [header.title for header in headers_of(leaderboard(to_frame(zoo)))]
    assert not {"worst-case probe", "best head", "no head exceeds", "passes"} & set(titles)
    assert "worst-case probe" in heads([full(zoo[0]), zoo[1]])


def test_both_ends_of_the_ledger_are_columns_after_the_bound_on_heads(zoo):
    records = [full(zoo[0], proved_share=0.315, not_broken_share=0.495), zoo[1]]
    titles = heads(records)
    start = titles.index("no head exceeds")
    assert titles[start:] == ["no head exceeds", "proved to stay right", "not broken", "passes", "flags"]
    text = render_report(records)
    assert "<span>0.315</span>" in text
    assert "<span>0.495</span>" in text


def test_cells_show_the_value_and_its_error_under_it(zoo):
    text = render_report([full(zoo[0])])
    assert "<span>0.410 <small>[0.380, 0.440]</small></span>" in text
    assert "<span>0.300 <small>alf</small></span>" in text
    assert "<span>0.400 <small>proved</small></span>" in text
    assert "<span>123,456</span>" in text
    assert "<small>baseline-h, standard</small>" in text


def test_every_meaning_stands_once_and_every_code_leads_to_it(zoo):
    flags = tuple(f"{code}: particular {i}" for i, code in enumerate(FlagCode))
    text = render_report([replace(record, flags=flags) for record in zoo[:3]])
    for code in FlagCode:
        assert text.count(f"{MEANINGS[code]}.".replace("'", "&#39;")) == 1, code
        assert text.count(f'id="flag-{code}"') == 1
        assert text.count(f'href="#flag-{code}" aria-describedby="flag-{code}"') == 3
    assert 'data-particulars="particular 0"' in text


def test_codes_are_told_once_and_those_that_exclude_are_marked():
    found = chips(["gated: a", "unpinned: b", "gated: c", "of another version"])
    assert [(chip.code, chip.particulars, chip.excludes) for chip in found] == [
        ("gated", "a; c", True),
        ("unpinned", "b", False),
        ("of_another_version", "", False),
    ]


def test_the_head_tells_date_command_and_versions(zoo, write_run):
    folder = write_run(zoo[:2])
    for path in (folder / "cells").iterdir():
        os.utime(path, (86_400 * 365, 86_400 * 365))
    assert of_folder(folder) == [("date", "1971-01-01")]
    (folder / "benchmark.yaml").write_text("name: x\n")
    text = write_html(folder).read_text()
    for name, told in (("date", "1971-01-01"), ("command", "rvaudit run benchmark.yaml"),
                       ("versions", "Python 3.11, torch 2.10.0")):  # fmt: skip
        assert f"<dt>{name}</dt><dd>{told}</dd>" in text
    assert len(list(RecordStore(folder))) == 2


def test_versions_that_differ_are_listed_and_strange_ones_are_left_out(zoo):
    other = replace(zoo[1], details={"provenance": {"torch": "2.11"}})
    assert versions([zoo[0], other, replace(zoo[2], details={"provenance": "odd"})]) == [
        ("versions", "Python 3.11, torch 2.10.0 or 2.11")
    ]
    assert versions([replace(zoo[0], details={})]) == []


def test_a_run_of_one_model_opens_with_its_card_and_plots_along_layers_and_radii(zoo):
    records = [
        replace(zoo[2], cell_id=f"{layer}-{eps}", layer=layer, eps=eps, rv=1.0 + eps)
        for layer in ("input", "logits")
        for eps in (0.1, 0.2)
    ]
    text = render_report(records)
    assert text.index('id="models"') < text.index('id="figures"') < text.index('id="leaderboard"')
    assert re.search(r'<details class="model" id="model-1" open>', text)
    titles = (
        "Information against layer: digits, ℓ∞ 0.1, mine",
        "Information against radius: digits, logits, ℓ∞, mine",
        "Accuracy against layer: digits, ℓ∞ 0.2",
        "Accuracy against radius: digits, input, ℓ∞",
    )
    for title in titles:
        assert f"<b>{title}.</b>" in text
    for word in ("Figure 1.", "Spearman", "Every correlation", "correlation of RV"):
        assert word not in text
    twice = render_report([*records, *(replace(r, cell_id=f"{r.cell_id}-s", estimator="sandwich") for r in records)])
    assert "Do the estimators agree?" not in twice  # of one model there is no order
    assert text.count('<option value="view-') == 4
    assert '<option value="view-3" selected>digits, logits, ℓ∞ 0.2</option>' in text


def test_several_models_keep_the_leaderboard_first(zoo):
    text = render_report(zoo)
    assert text.index('id="leaderboard"') < text.index('id="figures"') < text.index('id="models"')
    assert "<select" not in text  # one setting needs no choice
    assert text.count('<a href="#model-') == 12 * 3  # the table and the points of two figures
    assert (
        'data-tip="baseline-h-standard: RV 1.300 ± 0.060, normal 2.200, worst 0.900 nats (estimate); accuracy' in text
    )
