import csv
import io
import json
from dataclasses import replace

import pandas as pd
import pytest

import reports
from reports.estimators import curve_of
from reports.page.html import render_report
from reports.tables.columns import NO_RESULT, OPTIONAL, PROBE, UNITS, columns_csv
from reports.tables.ranking import leaderboard, to_csv, to_parquet
from reports.tables.table import COLUMNS, KINDS, panels, ranked, sound, split_flags, to_frame, to_rows


def test_one_row_a_record_in_the_promised_columns(zoo):
    frame = to_frame(zoo)
    assert list(frame.columns) == list(COLUMNS)
    assert list(frame["model"]) == [record.model for record in zoo]
    assert frame["rv"].tolist() == [record.rv for record in zoo]


def test_no_records_give_an_empty_typed_frame():
    frame = to_frame([])
    assert list(frame.columns) == list(COLUMNS)
    assert leaderboard(frame).empty
    assert frame["rv"].dtype == "float64"


def test_a_healthy_run_has_no_empty_cell(zoo):
    rows = list(csv.DictReader(io.StringIO(to_csv(leaderboard(to_frame(zoo))))))
    assert len(rows) == 12
    assert all(value != "" for row in rows for value in row.values())
    assert {row["flags"] for row in rows} == {"none"}
    assert [row["rank"] for row in rows] == [str(place) for place in range(1, 13)]


def test_rank_follows_rv(zoo):
    table = reports.leaderboard(reports.to_frame(zoo))
    assert table["rv"].is_monotonic_increasing


def test_equal_rvs_share_a_rank(zoo):
    table = leaderboard(to_frame([replace(record, rv=1.0) for record in zoo]))
    assert set(table["rank"]) == {"1"}


def test_failed_and_contradicted_rows_are_shown_last_and_never_ranked(mixed_zoo):
    table = leaderboard(to_frame(mixed_zoo))
    assert list(table["rank"][-2:]) == ["unranked", "unranked"]
    assert list(table["rank"][:-2]) == [str(place) for place in range(1, 11)]
    assert set(table["model"][-2:]) == {mixed_zoo[2].model, mixed_zoo[7].model}
    assert "failed: the weights hold NaN" in set(table["status"])


def test_groups_are_ranked_apart(zoo):
    mixed = [replace(record, eps=0.1 if i % 2 else 0.2) for i, record in enumerate(zoo)]
    table = leaderboard(to_frame(mixed))
    assert list(table["eps"]) == [0.1] * 6 + [0.2] * 6
    assert list(table["rank"]) == [str(place) for place in range(1, 7)] * 2


def test_estimators_are_never_ranked_together(zoo):
    mixed = [replace(record, estimator="sandwich" if i < 6 else "mine") for i, record in enumerate(zoo)]
    assert len(panels(to_frame(mixed))) == 2
    assert {panel.title.rsplit(", ", 1)[1] for panel in panels(to_frame(mixed))} == {"mine", "sandwich"}


def test_an_estimator_that_does_not_claim_to_rank_is_shown_and_never_ranked(suite):
    table = leaderboard(to_frame(suite(estimators=["sandwich", "ref-local"])))
    assert set(table[table["estimator"] == "ref-local"]["rank"]) == {"unranked"}
    assert set(table[table["estimator"] == "sandwich"]["rank"]) == {str(place) for place in range(1, 9)}
    assert sound(table).all()
    assert list(ranked(table)) == [True] * 8 + [False] * 8


def test_the_default_estimator_comes_first_and_replications_last(suite):
    frame = to_frame(suite(models=2, estimators=["ref-mean", "mine-infonce", "label-level", "sandwich"]))
    names = ["sandwich", "label-level", "mine-infonce", "ref-mean"]
    assert [panel.estimator for panel in panels(frame)] == names
    assert list(leaderboard(frame)["estimator"].unique()) == names


def test_what_limits_no_head_is_empty_and_what_was_estimated_is_named(suite):
    rows = to_rows(suite(models=1, estimators=["label-level", "label-information"]))
    assert rows[0]["fano_accuracy_bound"] is None
    assert rows[0]["quantity"] == "H(argmax g(X))"
    assert rows[0]["ranks"] is True
    assert 0.1 < rows[1]["fano_accuracy_bound"] < rows[1]["adversarial_accuracy_bound"]


def test_the_rv_of_each_seed_is_kept_exactly(suite, zoo):
    (record,) = suite(models=1, estimators=["sandwich"], seeds=5)
    pairs = [pair.split("=") for pair in to_frame([record])["rv_by_seed"][0].split("; ")]
    assert [(int(seed), float(rv)) for seed, rv in pairs] == [
        (row["seed"], row["rv"]) for row in record.details["per_seed"]
    ]
    strange = {"per_seed": [{"seed": 0}, "text", {"rv": 1.0}, {"seed": "=1", "rv": 2.0}]}
    assert list(to_frame([replace(zoo[0], details={}), replace(zoo[0], details=strange)])["rv_by_seed"]) == ["none"] * 2


def test_the_later_folder_counts_where_a_cell_appears_twice(zoo):
    table = leaderboard(to_frame([zoo[0], replace(zoo[0], rv=0.1)]))
    assert table["rv"].tolist() == [0.1]


def test_rows_are_strict_json_with_flags_as_lists(mixed_zoo):
    rows = json.loads(json.dumps(to_rows(mixed_zoo), allow_nan=False))
    assert list(rows[0]) == list(COLUMNS)
    assert rows[0]["flags"] == []
    assert rows[2]["flags"] == list(mixed_zoo[2].flags)
    assert rows[7]["rv"] is None
    assert rows[0]["images"] == 500


def test_flags_survive_their_separator(zoo):
    frame = to_frame([replace(zoo[0], flags=("saturated; badly", "noisy"))])
    assert split_flags(frame["flags"][0]) == ["saturated, badly", "noisy"]


def test_only_the_certificate_and_the_ledger_are_called_certified():
    assert {name for name, kind in KINDS.items() if kind == "certified"} == {
        "certified_bound",
        "certified_bound_population",
        "proved_share",
        "not_broken_share",
        "kept_population_low",
        "kept_population_high",
    }
    assert set(KINDS.values()) == {"certified", "estimate", "measured"}
    assert KINDS["rv"] == KINDS["adversarial_accuracy_bound"] == "estimate"
    assert KINDS["adversarial_gap"] == KINDS["natural_accuracy"] == "measured"
    assert set(KINDS) <= set(COLUMNS)


def test_every_number_that_is_published_has_a_kind_and_a_unit(suite):
    table = leaderboard(to_frame(suite(models=2)))
    described = {row["column"]: row for row in csv.DictReader(io.StringIO(columns_csv()))}
    assert list(described) == ["rank", *COLUMNS]
    assert set(table.columns) == set(described)
    given = {"trained_eps", "eps", "num_classes", "seeds", "images", "ranks", "passes"}
    for name in table.columns:
        numeric = pd.api.types.is_numeric_dtype(table[name]) or name in ("rank", "rv_by_seed")
        expected = {"estimate", "measured", "certified"} if numeric and name not in given else {NO_RESULT}
        assert described[name]["kind"] in expected, name
        assert described[name]["unit"]
        assert described[name]["meaning"]
    assert all(UNITS[name] in ("nats", "fraction") for name in KINDS)


def test_only_estimates_that_limit_heads_have_a_curve(suite):
    curves = {record.estimator: curve_of(record.estimator, record.quantity) for record in suite(models=1)}
    assert curves == {
        "sandwich": "",
        "label-information": "fano",
        "label-level": "",
        "mine-infonce": "theorem",
        "ref-local": "theorem",
        "ref-mean": "theorem",
    }
    assert curve_of("own", "I(X; g(X) + noise)") == ""


def test_parquet_round_trip(mixed_zoo):
    table = leaderboard(to_frame(mixed_zoo)).drop(columns=[name for names, _ in OPTIONAL for name in names])
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(to_parquet(table))), table, check_dtype=False)


def test_files_leave_out_what_no_row_has_and_keep_what_one_has(zoo):
    def header(records):
        return set(to_csv(leaderboard(to_frame(records))).splitlines()[0].split(","))

    optional = {name for names, _ in OPTIONAL for name in names}
    assert header(zoo) == {"rank", *COLUMNS} - optional
    assert optional & header([replace(zoo[0], passes=7), zoo[1]]) == {"passes"}
    assert optional & header([replace(zoo[0], worst_probe_accuracy=0.4), zoo[1]]) == set(PROBE)


def test_hostile_names_stay_text_in_csv(hostile):
    text = to_csv(leaderboard(to_frame(hostile)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(hostile)
    for row in rows:
        for name in ("model", "family", "layer", "flags"):
            assert not row[name].lstrip().startswith(("=", "+", "-", "@"))
    to_parquet(leaderboard(to_frame(hostile)))


def test_public_names():
    assert {"leaderboard", "to_frame", "write_reports"} <= set(reports.__all__)
    assert set(reports.__all__) <= set(dir(reports))
    with pytest.raises(AttributeError, match="no attribute 'rank'"):
        _ = reports.rank


def test_a_model_whose_attack_failed_a_trust_check_is_shown_and_never_ranked(zoo):
    check = {"id": "unbounded_attack", "name": "unbounded attack", "level": "trust", "passed": False}
    flag = "untrusted: the adversarial accuracy is an upper bound, attack not trustworthy: failed 5 unbounded attack"
    records = [
        replace(zoo[0], checks=({**check, "passed": True},)),
        replace(zoo[1], checks=(check,), flags=(flag,)),
        zoo[2],
    ]
    frame = to_frame(records)
    assert frame["attack_trust"].tolist() == ["trusted", "upper bound", "not checked"]
    assert ranked(frame).tolist() == [True, False, True]
    shown = render_report(records)
    assert "The adversarial accuracy is an upper bound, because the attack failed a trust check, for:" in shown
    assert "unbounded attack" in shown


def test_a_search_for_the_worst_case_that_is_not_trusted_has_a_sentence_of_its_own(zoo):
    search = "untrusted_search: the worst-case information is an upper bound: worst case: slope"
    attack = "untrusted: the adversarial accuracy (upper bound, attack not trustworthy) failed 5 unbounded attack"
    check = {"id": "gradient_slope", "name": "slope", "level": "trust", "passed": False}
    told = "The worst-case information is an upper bound, because its search failed a trust check, for:"
    of_attack = "The adversarial accuracy is an upper bound, because the attack failed a trust check, for:"
    first, second = (
        replace(record, checks=(check,), flags=(flag,)) for record, flag in zip(zoo[:2], (search, attack), strict=True)
    )
    frame = to_frame([first, second])
    assert not ranked(frame).any()
    assert frame["attack_trust"].tolist() == ["trusted", "upper bound"]  # the attack on the first found what it should
    shown = render_report([first, zoo[2]])
    assert told in shown
    assert of_attack not in shown
    assert "the worst-case information is only an upper bound; the model is not ranked" in shown
    assert "the adversarial accuracy is only an upper bound" not in shown
    both = render_report([first, second, zoo[2]])
    meanings = ("the adversarial accuracy is only an upper bound", "may have stopped short")
    assert all(text in both for text in (told, of_attack, *meanings))
