"""Two runs side by side: pairs, intervals, and which parts of identities differ."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from scipy import stats

from audit.errors import UsageError
from audit.records import AuditRecord, RecordStore
from reports.cli import main
from reports.tables.comparison import compare, identity_differences, paired, to_safetensors


def record(model: str = "m", eps: float = 0.1, shift: float = 0.0, seeds: int = 3, **changes: object) -> AuditRecord:
    """Return a record whose rv is 1 + the model's and the seed's own part + shift."""
    own = len(model) / 10
    per_seed = [
        {"seed": seed, "normal_nats": 2.0 + own, "worst_nats": 1.0 - seed / 10 - shift, "normal_nats_se": 0.1,
         "worst_nats_se": 0.1, "rv": 1.0 + own + seed / 10 + shift}
        for seed in range(seeds)
    ]  # fmt: skip
    values = {"normal_nats": 2.0 + own, "worst_nats": 1.0 - (seeds - 1) / 20 - shift}
    made = AuditRecord(
        cell_id=f"{model}-{eps}-{shift}", model=model, source="x", family="f", training="standard", trained_eps=0.0,
        dataset="digits", layer="logits", norm="linf", eps=eps, weights_sha256="0" * 64, estimator="sandwich",
        attack="a", seeds=seeds, images=60, **values, rv=values["normal_nats"] - values["worst_nats"], rv_se=0.2,
        worst_nats_se=0.1, normal_nats_se=0.1, natural_accuracy=0.9, adversarial_accuracy=0.5 - shift,
        details={"per_seed": per_seed, "identity": {"eps": eps, "settings": {"seeds": list(range(seeds)), "steps": 3}}},
    )  # fmt: skip
    return replace(made, **changes)


def test_a_constant_shift_is_found_with_no_doubt() -> None:
    found = compare(
        [record(model) for model in ("a", "bb", "ccc")], [record(m, shift=0.25) for m in ("a", "bb", "ccc")]
    )
    for pair in found.pairs:
        assert pair.rv.mean == pytest.approx(0.25)
        assert (pair.rv.low, pair.rv.high) == (pytest.approx(0.25), pytest.approx(0.25))
        assert (pair.rv.pairs, pair.rv.how) == (3, "paired")
        assert pair.worst_nats.mean == pytest.approx(-0.25)
        assert (pair.natural_accuracy, pair.adversarial_accuracy) == (0.0, pytest.approx(-0.25))
        assert pair.differing == ()
    (overall,) = found.overall
    assert (overall.rv.mean, overall.rv.pairs) == (pytest.approx(0.25), 3)


def test_a_run_beside_itself_differs_by_nothing() -> None:
    (pair,) = compare([record()], [record()]).pairs
    assert (pair.rv.mean, pair.rv.low, pair.rv.high) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    values = [0.3, -0.1, 0.25, 0.4]
    found, reference = paired(values), stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(reference.low), pytest.approx(reference.high))
    assert paired([1.0]).low is None


def test_the_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0.5, 1.0, size=(2000, 5))
    covered = [found.low <= 0.5 <= found.high for found in map(paired, draws)]
    assert 0.935 < np.mean(covered) < 0.965


def test_one_seed_alone_has_the_interval_of_standard_errors() -> None:
    (pair,) = compare([record(seeds=1)], [record(seeds=1, shift=0.25)]).pairs
    assert pair.rv.mean == pytest.approx(0.25)
    assert pair.rv.high - pair.rv.mean == pytest.approx(1.96 * 0.2 * 2**0.5, rel=1e-3)
    assert pair.rv.how == "standard errors, unpaired"


def test_only_shared_seeds_are_paired() -> None:
    (pair,) = compare([record(seeds=2)], [record(seeds=4, shift=0.25)]).pairs
    assert (pair.rv.pairs, pair.rv.mean) == (2, pytest.approx(0.25))
    assert pair.differing == ("settings.seeds",)


def test_identities_differ_by_name() -> None:
    other = record()
    other.details["identity"] = {"eps": 0.1, "settings": {"seeds": [0, 1, 2], "steps": 4}, "version": 9}
    other.details["identity"]["settings"]["attack"] = {"noise": 1, "queries": 2}
    differing = ("settings.attack.noise", "settings.attack.queries", "settings.steps", "version")
    assert identity_differences(record(), other) == differing
    assert compare([record()], [other]).shown()[0][-1] == "settings.attack, settings.steps, version"


def test_cells_of_one_run_only_are_named_and_failed_ones_are_none() -> None:
    found = compare([record(), record("x")], [record(), record(eps=0.2), record("x", status="failed")])
    assert [key[0] for key in found.only_first] == ["x"]
    assert [key[4] for key in found.only_second] == [0.2]
    assert found.overall == ()
    with pytest.raises(UsageError, match="no finished cell in common"):
        compare([record()], [record("other")])


def test_a_table_of_numbers_comes_back_from_safetensors(tmp_path: Path) -> None:
    table = pd.DataFrame({"rv": [0.1, None], "images": pd.array([3, None], dtype="Int64"), "model": ["a", "\u202e=x"]})
    path = tmp_path / "t.safetensors"
    path.write_bytes(to_safetensors(table))
    back = safetensors.numpy.load_file(path)
    assert back["rv"].tolist()[0] == 0.1
    assert np.isnan(back["rv"][1])
    assert back["images"].tolist()[0] == 3.0
    with safetensors.safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["model"]) == ["a", "\u202e=x"]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    for name, shift in (("one", 0.0), ("two", 0.25)):
        for model in ("a", "\x1b[31mbb"):
            RecordStore(tmp_path / name).write(record(model, shift=shift, cell_id=f"{len(model)}"))
    return tmp_path / "one", tmp_path / "two"


def test_the_command(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "Over 2 models, logits, 0.1, sandwich: RV differs by +0.250 nats, [+0.250, +0.250]" in shown
    assert main(["compare", *map(str, runs), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 2
    assert main(["compare", str(runs[0]), str(runs[0] / "nowhere")]) == 3


@pytest.mark.parametrize("ending", ["csv", "parquet", "safetensors"])
def test_an_export_holds_every_row(runs: tuple[Path, Path], ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs[0].parent / f"out.{ending}"
    assert main(["export", str(runs[0]), str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    readers = {
        "csv": lambda: pd.read_csv(out)["rv"].tolist(),
        "parquet": lambda: pd.read_parquet(out)["rv"].tolist(),
        "safetensors": lambda: safetensors.numpy.load_file(out)["rv"].tolist(),
    }
    values = readers[ending]()
    assert len(values) == told["rows"] == 2
    assert sorted(values) == sorted(each.rv for each in RecordStore(runs[0]))


def test_an_export_of_another_ending_is_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(runs[0]), "x.xlsx"]) == 2
    assert "must end in one of .csv, .parquet, .safetensors" in capsys.readouterr().err
