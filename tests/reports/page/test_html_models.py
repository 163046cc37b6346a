"""The section of each model: limits against accuracy, layers, learning curves and checks."""

from dataclasses import replace

import pytest

from reports.page.drawings import Curve, charts, place, strip, thinned
from reports.page.html import render_report
from reports.page.model_limits import profiles
from reports.page.model_pages import model_pages
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame

CHECK = {
    "id": "gradient_free_attack",
    "name": "Square",
    "level": "trust",
    "passed": False,
    "figure": 0.25,
    "criterion": "few anew",
}


def pages_of(records):
    return model_pages(records, leaderboard(to_frame(records)))


def line(*values):
    return [[10 * i, value] for i, value in enumerate(values)]


def test_every_model_has_one_section_and_other_weights_are_another_model(suite, zoo):
    assert [len(page.audits) for page in pages_of(suite(models=2, estimators=["sandwich", "mine-infonce"]))] == [2, 2]
    same = [zoo[0], replace(zoo[0], cell_id="x", weights_sha256="cd" * 32)]
    assert [page.anchor for page in pages_of(same)] == ["model-1", "model-2"]


def test_limits_stand_beside_the_accuracies_by_kind(zoo):
    record = replace(
        zoo[0], fano_accuracy_bound=0.75, adversarial_accuracy=0.125, certified_tier="proved", certified_bound=0.5,
        certified_bound_population=0.625, best_head="alf", best_head_accuracy=0.25,
    )  # fmt: skip
    (found,) = pages_of([record])[0].places
    assert [(row.kind, row.text.split()[0], row.strip.at) for row in found.limits] == [
        ("measured", "0.980", "152.0"),
        ("measured", "0.125", "23.8"),
        ("measured", "0.250", "42.5"),
        ("estimate", "0.750", "117.5"),
        ("estimate", f"{record.adversarial_accuracy_bound:.3f}", place(record.adversarial_accuracy_bound, (0.0, 1.0))),
        ("certified", "0.500", "80.0"),
        ("certified", "0.625", "98.8"),
    ]
    assert {row.strip.shared for row in found.limits} == {"23.8"}
    assert "proved, 500 images" in found.limits[5].name


def test_both_ends_of_the_ledger_stand_among_the_limits(zoo):
    (found,) = pages_of([replace(zoo[0], proved_share=0.25, not_broken_share=0.5)])[0].places
    proved, kept = [row for row in found.limits if row.kind == "certified"]
    assert (proved.text, proved.strip.at, kept.text, kept.strip.at) == ("0.250", "42.5", "0.500", "80.0")
    assert proved.name.startswith("proved to stay right")
    assert kept.name.startswith("not broken")


def test_limits_on_the_population_from_the_ledger_stand_below_it(zoo):
    details = zoo[0].details | {"certificate": {"kept_population": [0.2, 0.6], "confidence": 0.9}}
    record = replace(zoo[0], proved_share=0.25, not_broken_share=0.5, details=details)
    (found,) = pages_of([record])[0].places
    least, most = [row for row in found.limits if row.kind == "certified"][2:]
    assert (least.text, most.text) == ("0.200", "0.600")
    assert (least.name, most.name) == tuple(
        f"keeps at {side}: the network, under every attack in the ball, all images of their kind, 90% confidence"
        for side in ("least", "most")
    )


def test_what_estimators_share_is_told_once(suite):
    records = [replace(record, checks=(CHECK,)) for record in suite(models=1, estimators=["sandwich", "label-level"])]
    (found,) = pages_of(records)[0].places
    assert [row.name.split(" ")[0] for row in found.limits].count("natural") == 1
    assert len(found.checks) == 1
    other = replace(records[1], checks=({**CHECK, "passed": True},))
    assert len(pages_of([records[0], other])[0].places[0].checks) == 2


def test_a_failed_audit_has_a_reason_and_no_limits(mixed_zoo):
    failed = [audit for page in pages_of(mixed_zoo) for audit in page.audits if audit.reason]
    assert [audit.reason for audit in failed] == ["the weights hold NaN"]
    assert [page.audits for page in pages_of(mixed_zoo) if not page.places] == [failed]
    assert "No numbers: the weights hold NaN" in render_report(mixed_zoo)


def test_a_profile_needs_two_layers_and_goes_from_the_input_to_the_logits(zoo):
    names = ["logits", "features.10", "penultimate", "features.2", "input"]
    records = [replace(zoo[0], cell_id=name, layer=name, rv=0.5 + i / 4, rv_se=0.25) for i, name in enumerate(names)]
    (profile,) = profiles(records)
    assert [row.layer for row in profile.rows] == ["input", "features.2", "features.10", "penultimate", "logits"]
    assert profile.rows[0].strip.high == "155.0"  # 1.5 + 0.25 is the largest
    assert profile.rows[-1].strip.at == place(0.5, (0.0, 1.75))
    assert profiles(records[:1]) == []
    assert profiles([records[0], replace(records[1], status="failed")]) == []
    assert profiles([records[0], replace(records[1], eps=0.1)]) == []
    assert "Layer by layer: digits, ℓ∞ 0.2, mine" in render_report(records)


def test_negative_rv_stands_left_of_zero(zoo):
    records = [replace(zoo[0], cell_id=str(rv), layer=f"l.{2 + rv}", rv=rv, rv_se=None) for rv in (-1.0, 1.0)]
    rows = profiles(records)[0].rows
    assert [(row.strip.at, row.strip.shared) for row in rows] == [("5.0", "80.0"), ("155.0", "80.0")]


def test_curves_have_held_out_and_training_lines_on_one_scale(zoo):
    normal = {"validation": line(0.0, 1.0, 2.0), "training": line(0.0, 2.0, 4.0)}
    worst = {"validation": line(0.0, 1.0), "training": line(0.0, None, 1.0)}
    seeds = [{"seed": 0, "normal_nats": 2.0, "worst_nats": 0.0}]
    details = {"curves": [{"seed": 0, "normal": normal, "worst": worst}], "per_seed": seeds}
    (audit,) = pages_of([replace(zoo[0], details=details)])[0].audits
    first, second = audit.charts
    assert [kind for kind, _ in first.lines] == ["held-out", "training"]
    assert (
        (first.top, first.bottom, first.last)
        == (second.top, second.bottom, second.last)
        == ("4.00", "0.00", "20 steps")
    )
    assert first.lines[0][1] == "46.0,118.0 179.0,91.0 312.0,64.0"
    assert second.lines[1][1] == "46.0,118.0 312.0,91.0"  # a value that is no number is left out
    assert (first.dots, second.dots) == (["64.0"], ["118.0"])
    assert "held-out from 0.00 to 2.00; training from 0.00 to 4.00" in first.words
    assert "curves" not in audit.parts
    assert 'class="held-out" points="46.0,118.0' in render_report([replace(zoo[0], details=details)])


@pytest.mark.parametrize("curves", [[], [{"seed": 0, "normal": {"validation": [], "training": []}, "worst": {}}]])
def test_an_estimator_that_trains_nothing_has_no_chart(zoo, curves):
    (audit,) = pages_of([replace(zoo[0], details={"curves": curves})])[0].audits
    assert audit.charts == []


@pytest.mark.parametrize("curves", ["odd", {"normal": [1, 2]}, [3], {"normal": {"validation": 7}}])
def test_curves_of_another_shape_are_shown_as_they_are(zoo, curves):
    (audit,) = pages_of([replace(zoo[0], details={"curves": curves})])[0].audits
    assert audit.parts["curves"] == curves


@pytest.mark.parametrize("pairs", ["no", [1, 2], [[1]], [["a", "b"]], [[0, 1.0], [1, float("nan")]]])
def test_pairs_that_are_none_make_no_line(zoo, pairs):
    details = {"curves": [{"seed": 0, "normal": {"validation": pairs}, "worst": None}]}
    assert pages_of([replace(zoo[0], details=details)])[0].audits[0].charts == []


def test_checks_say_level_outcome_figure_and_criterion(zoo):
    skipped = {**CHECK, "passed": None, "figure": None, "reason": "no gradient", "level": "note"}
    record = replace(zoo[0], checks=(CHECK, skipped, {"name": "bare"}))
    names, rows = pages_of([record])[0].places[0].checks[0]
    assert names == "mine"
    assert [(row.outcome, row.figure, row.level) for row in rows[:2]] == [
        ("failed", "0.25", "trust"),
        ("does not apply", "–", "note"),
    ]
    assert rows[1].criterion == "few anew: no gradient"
    assert "Checks and gates: 1 of 3 failed" in render_report([record])


def test_lines_are_thinned_to_sixty_points_with_both_ends():
    points = [(float(i), float(i)) for i in range(1000)]
    kept = thinned(points)
    assert (len(kept), kept[0], kept[-1]) == (60, points[0], points[-1])
    assert kept == sorted(set(kept))
    assert charts([("flat", [Curve("training", [(0.0, 1.0), (0.0, 1.0)])], [])])[0].top == "1.00"


def test_strips_stay_between_their_ends():
    assert strip(7.0).at == "155.0"
    assert strip(-7.0).at == "5.0"
    assert strip(0.5, interval=(0.1, float("nan"))).low == ""


def test_certified_is_claimed_only_where_a_certificate_is(zoo):
    assert "Nothing in this report is certified" in render_report(zoo[:1])
    text = render_report([replace(zoo[0], certified_bound=0.5)])
    assert "Nothing in this report is certified" not in text
    assert "no head on the layer can exceed" in text
    proved = render_report([replace(zoo[0], proved_share=0.25, not_broken_share=0.5)])
    assert "Nothing in this report is certified" not in proved


def test_a_model_adds_a_bounded_number_of_bytes_however_long_its_record(zoo):
    long = line(*range(3_000))
    curves = [{"seed": 0, "normal": {"validation": long, "training": long}, "worst": {"validation": long}}]
    details = {"curves": curves, "renames": ["a.weight -> b.weight"] * 5_000, "deep": {str(i): i for i in range(5_000)}}
    details |= {"numbers": list(range(5_000)), "note": "n" * 50_000}
    few = [replace(zoo[0], cell_id=f"c{i}", model=f"m{i}", checks=(CHECK,) * 10, details=details) for i in range(4)]
    two, four = render_report(few[:2]), render_report(few)  # the page of a single model has other figures
    assert (len(four) - len(two)) / 2 < 30_000
    assert "and 4900 more, in the record" in two


def test_deep_settings_are_shown_to_the_last_number(zoo):
    identity = {"settings": {"attack": {"stages": [{"pgd": {"steps": 4711}}]}}}
    assert "4711" in render_report([replace(zoo[0], details={"identity": identity})])


def test_a_failed_gate_is_announced_and_stands_among_the_checks(zoo):
    gate = {**CHECK, "id": "finite_activations", "name": "finite", "level": "gate"}
    gated = replace(zoo[0], checks=(gate,), flags=("gated: finite failed",))
    text = render_report([gated, zoo[1]])
    assert (
        "Failed a sanity check, so broken or not what they claim to be: baseline-h-standard. They are not ranked."
        in text
    )
    assert "Failed a sanity check" not in render_report(zoo[:2])
    assert '<tr class="failed"><th scope="row">finite <code>finite_activations</code></th><td>gate</td>' in text


def test_checks_of_older_records_show_their_number(zoo):
    older = {**{key: value for key, value in CHECK.items() if key != "id"}, "number": 15}
    text = render_report([replace(zoo[0], checks=(older,))])
    assert '<tr class="failed"><th scope="row">Square <code>15</code></th>' in text
