"""`leaderboard A B`: which run folder a row is from."""

import json
from pathlib import Path
from typing import Any

import pytest

from audit.records import AuditRecord, RecordStore
from reports.cli import main

FIRST, SECOND = ("1", "2"), ("2", "3")


def record(number: str, **changes: Any) -> AuditRecord:
    values: dict[str, Any] = {
        "cell_id": number * 64, "model": f"net{number}", "source": "file", "family": "cnn", "training": "robust",
        "trained_eps": 0.1, "dataset": "digits", "layer": "logits", "norm": "linf", "eps": 0.1,
        "weights_sha256": number * 64, "estimator": "sandwich", "attack": "audit", "seeds": 1, "images": 300,
        "normal_nats": 1.5, "normal_nats_se": 0.01, "worst_nats": 1.0, "worst_nats_se": 0.01, "rv": 0.5, "rv_se": 0.01,
        "natural_accuracy": 0.9, "adversarial_accuracy": 0.5, "adversarial_gap": 0.4,
    }  # fmt: skip
    return AuditRecord(**{**values, **changes})


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    for place, numbers in (("a/first", FIRST), ("a/second", SECOND), ("b/second", ("3",))):
        for number in numbers:
            RecordStore(tmp_path / place).write(record(number))
    return [str(tmp_path / place) for place in ("a/first", "a/second", "b/second")]


def test_rows_of_several_runs_name_their_folders(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(runs[0]) / "both.csv"
    assert main(["leaderboard", *runs[:2], "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = {"net1": "first", "net2": "first, second", "net3": "second"}
    assert {row["model"]: row["run"] for row in rows} == expected
    assert list(rows[0])[:2] == ["rank", "run"]
    assert out.read_text().splitlines()[1].startswith("1,first,net1,")
    assert main(["leaderboard", *runs[:2]]) == 0
    shown = capsys.readouterr().out
    (header,) = [line for line in shown.splitlines() if " model " in line]
    assert header.split("┃")[1:4] == [" rank ", " model ", " run           "]
    assert "first, second" in shown
    assert main(["leaderboard", *runs[1:], "--json"]) == 0
    named = {row["model"]: row["run"] for row in json.loads(capsys.readouterr().out)}
    assert named == {"net2": runs[1], "net3": f"{runs[1]}, {runs[2]}"}


def test_one_run_has_no_such_column(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", runs[0], "--json"]) == 0
    assert all("run" not in row for row in json.loads(capsys.readouterr().out))
