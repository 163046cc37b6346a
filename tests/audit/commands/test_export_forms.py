"""`rvaudit export --format hf-eval|card`, and where files go without a name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

from audit.flags import FlagCode, flag
from audit.records import AuditRecord, RecordStore
from reports.cli import main

RAW = "a|b<script>*"


def record(number: int, **changes: Any) -> AuditRecord:
    values: dict[str, Any] = {
        "cell_id": f"{number:064d}", "model": "bundled:net", "source": "bundled", "family": "cnn", "training": "robust",
        "trained_eps": 0.1, "dataset": "digits", "layer": "logits", "norm": "linf", "eps": 8 / 255, "images": 300,
        "weights_sha256": "2" * 64, "estimator": "sandwich", "attack": "audit", "seeds": 1, "normal_nats": 1.5,
        "normal_nats_se": 0.01, "worst_nats": 1.0, "worst_nats_se": 0.02, "rv": 0.5, "rv_se": 0.03,
        "natural_accuracy": 271 / 300, "natural_accuracy_low": 0.86, "natural_accuracy_high": 0.93,
        "adversarial_accuracy": 1 / 3 * 1e-4, "adversarial_accuracy_low": 0.0, "adversarial_accuracy_high": 0.01,
        "adversarial_gap": 0.9,
    }  # fmt: skip
    return AuditRecord(**{**values, **changes})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    gated = (flag(FlagCode.GATED, "failed determinism"), flag(FlagCode.UNPINNED, "not compared"))
    for each in (
        record(1, certified_bound=0.25, fano_accuracy_bound=0.4),
        record(2, estimator="mine", rv=1e-5),
        record(3, model="other", flags=gated, layer=RAW),
        record(4, model="bundled:net", status="failed", reason="x", rv=None),
    ):
        RecordStore(Path("run")).write(each)
    return Path("run")


def test_evaluation_results_are_read_by_the_library_of_the_hub(run: Path) -> None:
    assert main(["export", str(run), "--format", "hf-eval", "--out", "hub"]) == 0
    assert sorted(path.name for path in Path("hub").iterdir()) == ["net.yaml", "other.yaml"]
    name, results = model_index_to_eval_results(yaml.safe_load(Path("hub/net.yaml").read_text())["model-index"])
    assert name == "net"
    assert {(each.task_type, each.dataset_type, each.dataset_name) for each in results} == {
        ("image-classification", "digits", "digits")
    }
    by_kind: dict[str, list[Any]] = {}
    for each in results:
        by_kind.setdefault(each.metric_type, []).append(each)
    assert [each.metric_value for each in by_kind["accuracy"]] == [271 / 300]
    (adversarial,) = by_kind["adversarial_accuracy"]  # estimators share it
    assert adversarial.metric_value == 1 / 3 * 1e-4
    assert adversarial.metric_args == {"norm": "linf", "eps": "8/255", "attack": "audit"}
    assert [each.metric_value for each in by_kind["representation_vulnerability"]] == [0.5, 1e-5]
    assert by_kind["certified_accuracy_bound"][0].metric_value == 0.25
    _, gated = model_index_to_eval_results(yaml.safe_load(Path("hub/other.yaml").read_text())["model-index"])
    assert {each.metric_type for each in gated} == {"accuracy", "adversarial_accuracy"}  # no estimate that is unranked


def test_a_card_states_one_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "card", "--model", "net", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    text = (run / "exports" / "card.md").read_text()
    assert told == {"path": "run/exports/card.md", "lines": text.count("\n")}
    assert text.startswith("## Robustness of net, audited with rvaudit ")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["digits", "ℓ∞ 8/255", "0.9033 [0.8600, 0.9300]", "0.0000 [0.0000, 0.0100]", "audit"]
    information = {row[3]: row for row in rows[5:]}
    assert information["sandwich"][4:] == ["1.500 ± 0.010", "1.000 ± 0.020", "0.500 ± 0.030", "0.4000", "0.2500"]
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if "±" in line}) == 1
    assert "other" not in text


def test_names_and_flags_on_a_card_are_text(run: Path) -> None:
    assert main(["export", str(run), "card.md", "--format", "card", "--model", "other"]) == 0
    text = Path("card.md").read_text()
    assert r"a\|b\<script\>\*" in text
    assert text.count("`gated`: the network failed a sanity check") == text.count("- `unpinned`:") == 1
    assert "| gated |" in text


def test_files_without_a_name_go_below_the_run(run: Path) -> None:
    for form in ("csv", "parquet", "safetensors", "hf-eval"):
        assert main(["export", str(run), "--format", form]) == 0
    names = ["hf-eval", "leaderboard.csv", "leaderboard.parquet", "leaderboard.safetensors"]
    assert sorted(path.name for path in (run / "exports").iterdir()) == names


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--format", "card"), "the run holds 2 models: add --model, one of net, other"),
        (("--format", "card", "--model", "nte"), "unknown model of the run 'nte'; did you mean 'net'"),
        (("--format", "csv", "--model", "net"), "--model net is for --format card"),
        (("run", "--format", "card", "--model", "net"), "run is a folder; the section of a model card"),
        (("file", "--format", "hf-eval"), "file is a file; evaluation results are written into a folder"),
        ((), "name the file or folder to write once"),
    ],
)
def test_wrong_requests(words: tuple[str, ...], said: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert main(["export", str(run), *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_without_a_valid_record_has_nothing_to_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RecordStore(tmp_path).write(record(1, status="failed", reason="x"))
    for form in ("card", "hf-eval"):
        assert main(["export", str(tmp_path), "--format", form]) == 2
        assert "holds no valid record" in capsys.readouterr().err
