"""The recipes of docs/python.md: MLflow with its local file store, and Weights & Biases through its interface."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest

import rvaudit
from rvaudit import AuditRecord

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"


def recipe(name):
    """Return the function of a recipe, as the page has it."""
    (text,) = re.findall(rf"^```python\n(def {name}\(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(text.splitlines()) <= 10
    names = {"rvaudit": rvaudit}
    exec(compile(text, str(PAGE), "exec"), names)
    return names[name]


@pytest.fixture
def records():
    values = {
        "source": "file", "family": "cnn", "training": "robust", "trained_eps": 0.1, "dataset": "digits",
        "layer": "logits", "norm": "linf", "eps": 8 / 255, "weights_sha256": "2" * 64, "estimator": "sandwich",
        "attack": "audit", "seeds": 1, "images": 300, "normal_nats": 1.5, "worst_nats": 1.0, "rv": 0.5,
        "natural_accuracy": 0.9, "adversarial_accuracy": 0.4, "adversarial_gap": 0.5,
        "flags": ("unpinned: not compared",),
    }  # fmt: skip
    return [AuditRecord(cell_id=f"{n:064d}", model=f"net{n}", **{**values, "rv": n / 10}) for n in (1, 2)]


@pytest.mark.filterwarnings("ignore")  # of MLflow and what it imports
def test_mlflow_holds_the_numbers_of_every_record(records, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    try:
        recipe("to_mlflow")(records)
        found = {run.info.run_name: run.data for run in mlflow.search_runs(output_format="list")}
    finally:
        mlflow.set_tracking_uri(before)
    assert set(found) == {"net1 logits", "net2 logits"}
    for record in records:
        data = found[f"{record.model} logits"]
        assert data.metrics["rv"] == record.rv
        assert data.metrics["adversarial_accuracy"] == 0.4
        assert float(data.params["eps"]) == 8 / 255
        assert data.params["estimator"] == "sandwich"
        assert (data.tags["cell_id"], data.tags["flags"]) == (record.cell_id, "unpinned")


def test_weights_and_biases_gets_a_table_and_a_summary(records, monkeypatch):
    """A stand-in with the interface of wandb, which is not installed: init, log, summary, Table."""
    run = MagicMock(summary={})
    run.__enter__.return_value = run
    started = []
    fake = ModuleType("wandb")
    fake.Table = lambda *, dataframe: SimpleNamespace(dataframe=dataframe)
    fake.init = lambda *, project, config: started.append((project, config)) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe("to_wandb")(records, "audits")
    assert started == [("audits", {"cells": [record.cell_id for record in records]})]
    ((logged,), _) = run.log.call_args
    assert list(logged["leaderboard"].dataframe["model"]) == ["net1", "net2"]
    assert run.summary == {"net1/logits/sandwich/rv": 0.1, "net2/logits/sandwich/rv": 0.2}
    run.__exit__.assert_called_once()
