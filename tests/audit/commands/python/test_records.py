"""Records as a collection, and what a notebook shows: every name is escaped, long tables are cut to what matters."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from audit import AuditRecord, AuditRecords
from audit.errors import UsageError
from audit.flags import FlagCode, flag
from reports.tables.ranking import leaderboard
from reports.tables.table import to_frame

HOSTILE = "<script>alert(1)</script>\x1b[31m&"


def record(number: int, **changes: Any) -> AuditRecord:
    values: dict[str, Any] = {
        "cell_id": f"{number:064d}", "model": f"net{number}", "source": "file", "family": "cnn", "training": "robust",
        "trained_eps": 0.1, "dataset": "digits", "layer": "logits", "norm": "linf", "eps": 8 / 255,
        "weights_sha256": "2" * 64, "estimator": "sandwich", "attack": "audit", "seeds": 1, "images": 300,
        "normal_nats": 1.5, "normal_nats_se": 0.01, "worst_nats": 1.5 - 0.1 * number, "worst_nats_se": 0.01,
        "rv": 0.1 * number, "rv_se": 0.01, "natural_accuracy": 0.9, "adversarial_accuracy": 0.9 - 0.1 * number,
        "adversarial_gap": 0.1 * number,
    }  # fmt: skip
    return AuditRecord(**{**values, **changes})


def test_a_collection_is_a_sequence_with_table_ranking_and_figures() -> None:
    records = AuditRecords([record(2), record(1)]) + AuditRecords([record(3)])
    assert [each.model for each in records[1:]] == ["net1", "net3"]
    assert (len(records), records[0], repr(records)) == (3, record(2), "<AuditRecords: 3 of net2, net1, net3>")
    assert records == AuditRecords(list(records)) != AuditRecords([])
    pd.testing.assert_frame_equal(records.to_frame(), to_frame(list(records)))
    assert list(records.leaderboard()["model"]) == ["net1", "net2", "net3"]
    for figure in (records.figure1(), records.figure2()):
        assert isinstance(figure, Figure)
    with pytest.raises(UsageError, match="a str is no AuditRecord"):
        AuditRecords(["net1"])  # type: ignore[list-item]


def test_a_collection_is_stored_as_a_run(tmp_path: Path) -> None:
    records = AuditRecords([record(1), record(2)])
    paths = records.write(tmp_path / "run")
    assert tmp_path / "run" / "report.html" in paths
    assert AuditRecords.read(tmp_path / "run") == records
    assert records.write(str(tmp_path / "run")) == paths
    with pytest.raises(UsageError, match="holds records of another audit"):
        AuditRecords([record(3)]).write(tmp_path / "run")


def test_the_representation_of_a_record_is_one_short_line() -> None:
    told = repr(record(1, details={"curves": [0] * 10_000}, flags=(flag(FlagCode.GATED, "x"),)))
    assert told == (
        "<AuditRecord model net1, dataset digits, layer logits, estimator sandwich, norm linf, eps 0.0314, "
        "normal_nats 1.5, worst_nats 1.4, rv 0.1, natural_accuracy 0.9, adversarial_accuracy 0.8, flags gated>"
    )
    failed = record(1, status="failed", reason="no\nimage", rv=None)
    assert "reason no?image" in repr(failed)
    assert " rv " not in repr(failed)


def test_pages_of_a_notebook_escape_names() -> None:
    hostile = record(1, model=HOSTILE, layer=HOSTILE, estimator=HOSTILE, flags=(f"{HOSTILE}: a",))
    shown = [hostile, AuditRecords([hostile]), leaderboard(to_frame([hostile]))]
    for page in (each._repr_html_() for each in shown):
        assert set(re.findall(r"</?([a-z]+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td", "small", "br"}
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "\x1b" not in page


def test_a_leaderboard_shows_its_main_columns_and_parts_of_it_are_plain_frames() -> None:
    table = AuditRecords([record(1), record(2, flags=(flag(FlagCode.UNPINNED, "x"),))]).leaderboard()
    page = table._repr_html_()
    assert "<td>ℓ∞ 8/255</td>" in page
    assert page.count("<th>") == 13 < len(table.columns)
    assert "2 rows" in page
    for part in (table[["model", "rv"]], table.head(1), table.assign(a=1), table.copy()):
        assert type(part) is pd.DataFrame


def test_the_closing_table_is_sorted_and_says_each_flag_once() -> None:
    gated, unpinned = flag(FlagCode.GATED, "failed determinism"), flag(FlagCode.UNPINNED, "not compared")
    found = AuditRecords([
        record(2, estimator="mine"), record(2, flags=(gated, gated, unpinned)), record(1, flags=(gated, unpinned)),
        record(4, layer="features.10"), record(3, layer="features.2", certified_bound=0.4, best_head="slf",
        best_head_accuracy=0.3, fano_accuracy_bound=0.6),
    ])._repr_html_()  # fmt: skip
    order = re.findall(r"<tr><td>(net\d)</td><td>([a-z.0-9]*)</td><td>ℓ∞</td><td>(8/255)</td><td>(\w+)</td>", found)
    assert [(model, layer, estimator) for model, layer, _, estimator in order] == [
        ("net3", "features.2", "sandwich"), ("net4", "features.10", "sandwich"), ("net1", "logits", "sandwich"),
        ("net2", "logits", "sandwich"), ("net2", "logits", "mine"),
    ]  # fmt: skip
    assert found.count("<td>gated</td>") == 2
    assert found.count("gated: the network failed a sanity check") == 1
    assert found.count("unpinned") == 1
    assert (
        "Provenance, unpinned: the hash of the weights was recorded, not compared with a published one (net1, net2"
        in (found)
    )
    assert "<td>0.600</td><td>0.400</td><td>0.300 (slf)</td>" in found
    assert "A certified bound is proved on these images." in found
