"""The opening of the page and what stands over its tables: who loses least, checks, convergence, what was audited."""

import re
from dataclasses import replace

import pytest

from reports.page.html import render_report
from reports.page.model_limits import places
from reports.page.opening import flagged, opening
from reports.page.verdicts import verdict
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame

SETTING = "digits, penultimate, ℓ∞ 0.2"
GATE = {"id": "finite", "name": "finite", "level": "gate", "passed": True, "figure": 0, "criterion": "is finite"}
SLOW = "search_not_converged: the second half lowered worst_nats by 0.076 nats"


def told(records, setting=SETTING):
    return opening(records, leaderboard(to_frame(records)), setting)


@pytest.fixture
def two(suite):
    return suite(models=3, estimators=["label-information", "sandwich"])


def test_the_lowest_rv_of_each_estimator_and_the_verdict_on_it(two):
    lowest = min((r for r in two if r.estimator == "sandwich"), key=lambda r: r.rv)
    own = [r for r in two if r.model == lowest.model]
    labels = next(r for r in own if r.estimator == "label-information")
    name = lowest.model.removeprefix("bundled:")
    first, second, *_ = told(two)
    assert first == (
        f"Lowest RV, so the most robust representation ({SETTING}): {name} by "
        f"sandwich ({lowest.rv:.3f} ± {lowest.rv_se:.3f} nats, estimate) and "
        f"label-information ({labels.rv:.3f} ± {labels.rv_se:.3f} nats, estimate)."
    )
    assert second == f"{name}: u{verdict(own)[1:]}"


def test_estimators_that_name_different_models_are_told_apart(two):
    lowest = min(r.rv for r in two if r.estimator == "label-information")
    other = next(r for r in two if r.estimator == "label-information" and r.rv > lowest)
    moved = [replace(r, rv=lowest - 0.1) if r is other else r for r in two]
    name = other.model.removeprefix("bundled:")
    assert told(moved)[0].endswith(
        f"; {name} by label-information ({lowest - 0.1:.3f} ± {other.rv_se:.3f} nats, estimate)."
    )


def test_only_ranked_models_of_the_leading_setting_are_named(two):
    other = [replace(r, cell_id=f"{r.cell_id}-x", layer="logits", rv=0.01, model="bundled:elsewhere") for r in two[:1]]
    assert not any("elsewhere" in sentence for sentence in told([*two, *other])[:2])
    gated = [replace(r, flags=("gated: finite failed",)) for r in two]
    assert not any(sentence.startswith("Lowest RV") for sentence in told(gated))
    alone = [r for r in two if r.model == two[0].model]
    assert not any(sentence.startswith("Lowest RV") for sentence in told(alone))


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ([(), (), ()], "No audit holds checks of its network, attack or search."),
        ([(GATE,), (GATE,), (GATE,)], "0 of 3 audits failed one."),
        ([(GATE,), ({**GATE, "passed": False},), ()], "1 of 2 audits failed one; 1 audit without checks."),
        ([(GATE,), (GATE, {**GATE, "level": "note", "passed": False}), (GATE,)], "0 of 3 audits failed one."),
    ],
)
def test_failed_checks_are_counted_by_audit(zoo, checks, said):
    records = [replace(record, checks=made) for record, made in zip(zoo[:3], checks, strict=True)]
    assert any(sentence.endswith(said) for sentence in told(records))


def test_what_has_not_converged_is_named_with_its_direction(zoo):
    assert "No estimate is flagged as not converged." in told(zoo[:2])
    flagged_ones = [replace(zoo[0], flags=(SLOW,)), replace(zoo[1], flags=("not_converged: late",)), zoo[2]]
    names = [record.model.removeprefix("bundled:") for record in flagged_ones]
    assert told(flagged_ones)[-1] == (
        f"Not converged: the worst-case search (its information is likely too large), mine: {names[0]}; "
        f"the critic (its information is likely too small), mine: {names[1]}."
    )


def test_a_flag_lists_the_rows_it_concerns_with_their_figures(zoo):
    records = [replace(zoo[0], flags=(SLOW,)), zoo[1]]
    (code, meaning, rows), *more = flagged(leaderboard(to_frame(records)))
    assert not more
    assert (code, rows) == (
        "search_not_converged",
        ["baseline-h-standard, mine: the second half lowered worst_nats by 0.076 nats"],
    )
    assert meaning in render_report(records)
    assert f"{rows[0]}.</dd>" in render_report(records)
    many = [replace(record, flags=(SLOW,)) for record in zoo[:9]]
    assert flagged(leaderboard(to_frame(many)))[0][2][6:] == ["and 3 more"]


def test_a_table_has_the_columns_that_its_own_rows_fill(two):
    none = [replace(r, fano_accuracy_bound=None) if r.estimator == "sandwich" else r for r in two]
    text = render_report(none)
    tables = re.findall(r'<table class="sortable">(.*?)</table>', text, re.S)
    assert ['data-key="fano-accuracy-bound"' in table for table in tables] == [False, True]
    for table in tables:
        heads = table.count('<th scope="col"')
        rows = re.findall(r'<tr class="(?:un)?ranked">(.*?)</tr>', table, re.S)
        assert {row.count("<td") + row.count('<th scope="row"') for row in rows} == {heads}
    assert text.count("Its worst case limits no head, so this table has no accuracy bound.") == 1


def test_what_was_audited_and_the_attack_stand_over_the_tables(zoo):
    text = render_report(zoo[:3])
    record = zoo[0]
    assert (
        f"{record.images} images of digits in 10 classes, layer penultimate, radius ℓ∞ 0.2 for pixels from 0 to 1, "
        f"seeds: {record.seeds}. Adversarial accuracy is measured under {record.attack}.</p>"
    ) in text
    bare = render_report([replace(record, num_classes=None)])
    assert f"{record.images} images of digits, layer penultimate, " in bare


def test_the_head_of_an_encoder_is_named_with_its_accuracy_and_explained(zoo):
    encoder = replace(zoo[0], natural_head="slf", adversarial_head="alf", adversarial_accuracy=0.05)
    assert "; the best linear head found (alf) keeps 0.050" in verdict([encoder])
    assert verdict([encoder]).endswith(f", {encoder.natural_accuracy:.3f} without attack (slf).")
    assert verdict([replace(encoder, natural_head="alf")]).endswith("without attack.")
    names = [row.name for row in places([encoder], {encoder.cell_id: SETTING})[0].limits]
    assert names[0] == f"natural accuracy of the slf head, {encoder.images} images"
    assert names[1].startswith(f"adversarial accuracy of the alf head under {encoder.attack}, ")
    assert "<em>alf</em> linear and trained on attacked ones" in render_report([encoder, zoo[1]])
    assert "<em>alf</em>" not in render_report(zoo[:2])


def test_checks_name_the_estimators_that_share_them(two):
    own = [replace(r, checks=(GATE,)) for r in two if r.model == two[0].model]
    shared = places(own, dict.fromkeys((r.cell_id for r in own), SETTING))
    assert [names for names, _ in shared[0].checks] == ["sandwich, label-information"]
    other = [own[0], replace(own[1], checks=({**GATE, "passed": False},))]
    apart = places(other, dict.fromkeys((r.cell_id for r in own), SETTING))
    assert [names for names, _ in apart[0].checks] == ["sandwich", "label-information"]
