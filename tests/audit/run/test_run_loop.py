"""A run writes its files, computes no cell twice, and isolates failures."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock

from audit.adversary.label_attack import LabelAttack, two_losses
from audit.adversary.pgd import PGD
from audit.adversary.threat import L2, Linf
from audit.certificate.collision_search import SearchEffort
from audit.certificate.layers import CertificationSettings
from audit.certificate.settings import CertificateSettings
from audit.config.settings import AuditSettings
from audit.config.yaml_source import read_config
from audit.errors import EnvironmentFault, IntegrityError, UsageError
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.records import AuditRecord, RecordStore
from audit.run import cell_runner, loading, model_results
from audit.run.cell import Cell, expand
from audit.run.identity import _network_identity, cell_identity
from audit.run.layer_audit import LayerAudit, LayerResult
from audit.run.loading import InputCache, RunOptions, device_of
from audit.run.locks import lock
from audit.run.run_loop import Watcher, claim, run
from audit.storage import digest
from audit.training.heads import HeadTraining
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import identify, load_model
from reports.cli import main
from reports.page.verdicts import verdict
from reports.tables.columns import CERTIFICATE, LEDGER
from reports.tables.ranking import write_leaderboard

REF = "bundled:digits-vgg-robust"
QUICK = """
estimators:
  - {name: mine, steps: 6, every: 3, critic: {width: 8, embedding: 4, channels: 2},
     search: {collapse_steps: 1, rounds: 1, critic_steps: 1}}
attack: {steps: 2}
seeds: [0]
images: 60
"""
SMALL = f"name: small\ndataset: digits\nmodels: [bundled:digits-vgg-standard, {REF}]\nthreats: {{eps: 0.2}}\n{QUICK}"
REQUIRED = [
    "model",
    "source",
    "training",
    "dataset",
    "layer",
    "norm",
    "eps",
    "seeds",
    "images",
    "normal_nats",
    "normal_nats_se",
    "worst_nats",
    "worst_nats_se",
    "rv",
    "rv_se",
    "adversarial_accuracy_bound",
    "natural_accuracy",
    "adversarial_accuracy",
    "adversarial_gap",
    "flags",
    "weights_sha256",
]
MINE = Mine(
    CriticTraining(steps=6, every=3, shape=CriticShape(width=8, embedding=4, channels=2)),
    WorstCaseSearch(collapse_steps=1, rounds=1, critic_steps=1),
)
SETTINGS = AuditSettings(
    MINE,
    two_losses(PGD(steps=2)),
    seeds=(0,),
)
CELL = Cell(REF, None, "digits", 60, "logits", Linf(0.2), SETTINGS)


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "cells").iterdir()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two models; tests must not change it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(SMALL)
    assert main(["run", str(folder / "small.yaml"), "--out", str(folder / "run")]) == 0
    return folder


@pytest.fixture(scope="module")
def measured() -> LayerResult:
    """The result of one real audit of a layer."""
    network = load_model(REF).network
    images = load_images("digits", ImageRequest(count=60))
    return LayerAudit(network, images.images, images.labels, "logits", SETTINGS).under(Linf(0.2))


@pytest.fixture
def measuring(measured: LayerResult, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace layer audits: cells get the numbers of `measured`, and the list receives their layers."""
    layers: list[str] = []

    class WarmStart:
        def __init__(self, _network: Any, _images: Any, _labels: Any, layer: str, _settings: Any, _reuse: Any) -> None:
            layers.append(layer)

        def under(self, _threat: Any, _starts: Any, _cache: Any) -> LayerResult:
            return measured

        def searched(self, _threat: Any, _starts: Any, _cache: Any) -> Any:
            return measured.per_seed

    monkeypatch.setattr(model_results, "LayerAudit", WarmStart)
    return layers


def test_a_run_writes_all_its_files(small: Path) -> None:
    folder = small / "run"
    derived = ["leaderboard.csv", "leaderboard.parquet", "report.html"]
    derived += [f"figures/figure{number}.{kind}" for number in (1, 2) for kind in ("png", "svg")]
    assert all((folder / name).stat().st_size > 100 for name in derived)
    assert len(list((folder / "cells").glob("*.json"))) == 2
    assert not [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    assert (folder / "benchmark.yaml").read_text() == SMALL
    table = pd.read_csv(folder / "leaderboard.csv", keep_default_na=False, na_values=[""])
    assert set(REQUIRED) <= set(table.columns)
    assert not table.columns[table.isna().all()].tolist()
    assert sorted(table["model"]) == ["digits-vgg-robust", "digits-vgg-standard"]
    assert table["adversarial_gap"].tolist() == pytest.approx(table["natural_accuracy"] - table["adversarial_accuracy"])
    assert pd.read_parquet(folder / "leaderboard.parquet").columns.tolist() == table.columns.tolist()


def test_records_store_identity_and_provenance(small: Path) -> None:
    for record in RecordStore(small / "run"):
        assert record.valid
        assert record.weights_pinned
        assert record.details["identity"]["weights_sha256"] == record.weights_sha256
        assert {"torch", "python", "device"} <= set(record.details["provenance"])
        assert record.details["notes"]["recorded_ref"] == f"bundled:{record.model}"
        assert record.seconds is not None


def test_the_second_run_recomputes_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(small / "run")
    for module, name in (
        (model_results, "evaluate_robustness"),
        (model_results, "LayerAudit"),
        (loading, "load_model"),
    ):
        monkeypatch.setattr(module, name, None)
    assert main(["run", str(small / "small.yaml"), "--out", str(small / "run"), "--json"]) == 0
    assert _files(small / "run") == before
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["digits-vgg-standard", "digits-vgg-robust"]
    seen: list[bool] = []
    watcher = Watcher(done=lambda _record, known: seen.append(known))
    run(expand(read_config(small / "small.yaml")), small / "run", watcher=watcher)
    assert seen == [True, True]


def test_a_folder_of_another_configuration_is_refused(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, other = _files(small / "run"), small / "other.yaml"
    other.write_text(SMALL.replace("eps: 0.2", "eps: 0.1"))
    assert main(["run", str(other), "--out", str(small / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert "holds a run of another configuration (its benchmark.yaml): choose another with --out" in captured.err
    assert _files(small / "run") == before
    assert (small / "run" / "benchmark.yaml").read_text() == SMALL


def test_a_killed_run_resumes_with_the_missing_cell(measuring: list[str], tmp_path: Path) -> None:
    cells = [replace(CELL, layer=layer) for layer in ("logits", "penultimate", "input")]

    class Killed(BaseException):
        pass

    def kill(_record: AuditRecord, _known: bool) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(cells, tmp_path, watcher=Watcher(done=kill))
    first = _files(tmp_path)
    assert len(first) == 1
    seen: list[bool] = []
    records = run(cells, tmp_path, watcher=Watcher(done=lambda _record, known: seen.append(known)))
    assert seen == [True, False, False]
    assert measuring == ["logits", "penultimate", "input"]
    assert [record.layer for record in records] == ["logits", "penultimate", "input"]
    assert first.items() <= _files(tmp_path).items()
    RecordStore(tmp_path).path(records[1].cell_id).unlink()
    run(cells, tmp_path)
    assert measuring[3:] == ["penultimate"]


def test_layers_of_one_model_share_its_attack(
    measuring: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[Any] = []
    real: Callable[..., Any] = model_results.evaluate_robustness

    def counting(*arguments: Any) -> Any:
        attacked.append(arguments[1])
        return real(*arguments)

    monkeypatch.setattr(model_results, "evaluate_robustness", counting)
    pairs = [(layer, threat) for layer in ("logits", "penultimate") for threat in (Linf(0.1), L2(0.5))]
    cells = [replace(CELL, layer=layer, threat=threat) for layer, threat in pairs]
    records = run([*cells, replace(CELL, ref="bundled:digits-vgg-standard")], tmp_path)
    assert attacked == [L2(0.5), Linf(0.1), Linf(0.2)]
    assert records[0].adversarial_accuracy == records[2].adversarial_accuracy
    assert measuring == ["logits", "penultimate", "logits"]  # threat models share a layer's normal case


def _with_attack(cell: Cell, attack: LabelAttack) -> Cell:
    return replace(cell, settings=replace(cell.settings, attack=attack))


def test_the_identity_covers_everything_that_decides_numbers() -> None:
    images = load_images("digits", ImageRequest(count=60))
    entry = identify(REF)
    same = cell_identity(CELL, entry, images.sha256)
    larger = replace(two_losses(PGD(steps=2, batch_size=7)), fast=False)
    harder = two_losses(PGD(steps=3))
    assert cell_identity(_with_attack(replace(CELL, name="mine"), larger), entry, images.sha256) == same
    assert "device" not in json.dumps(same)
    changed = [
        replace(CELL, after=replace(CELL, threat=Linf(0.1))),
        replace(CELL, threat=Linf(0.1)),
        replace(CELL, threat=L2(0.2)),
        replace(CELL, layer="penultimate"),
        replace(CELL, settings=replace(SETTINGS, seeds=(1,))),
        replace(CELL, settings=replace(SETTINGS, reduce="mean")),
        _with_attack(CELL, harder),
        *(
            replace(CELL, settings=replace(SETTINGS, estimator=estimator))
            for estimator in (
                replace(MINE, search=replace(MINE.search, rounds=2)),
                replace(MINE, training=replace(MINE.training, bound="donsker-varadhan")),
                Reference(per_position=True),
                Reference(per_position=False),
            )
        ),
    ]
    ids = [digest(cell_identity(cell, entry, images.sha256)) for cell in changed]
    fewer = load_images("digits", ImageRequest(count=59))
    ids.append(digest(cell_identity(CELL, entry, fewer.sha256)))
    ids.append(digest(cell_identity(CELL, identify("bundled:digits-vgg-standard"), images.sha256)))
    assert len({*ids, digest(same)}) == len(ids) + 1


def test_a_failed_model_leaves_the_others_and_is_retried(
    measuring: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config, folder = tmp_path / "late.safetensors", tmp_path / "b.yaml", tmp_path / "run"
    late = f"'file:{weights}?arch=bundled:digits-vgg-robust&num_classes=10'"
    config.write_text(SMALL.replace("bundled:digits-vgg-standard", late) + "layers: [logits, penultimate]\n")
    assert main(["run", str(config), "--out", str(folder)]) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert captured.err.count("late.safetensors does not exist") == 1
    assert captured.err.count(": failed\n") == 2
    records = list(RecordStore(folder))
    assert sorted((record.status, record.model == "digits-vgg-robust") for record in records) == [
        ("failed", False),
        ("failed", False),
        ("valid", True),
        ("valid", True),
    ]
    (failed, *_) = [record for record in records if not record.valid]
    assert failed.details["exit_code"] == 3
    assert "late.safetensors does not exist" in failed.reason
    assert "failed: " in (folder / "leaderboard.csv").read_text()
    weights.write_bytes((benchmark_folder() / "digits-vgg-robust.safetensors").read_bytes())
    assert main(["run", str(config), "--out", str(folder)]) == 0
    assert [record.status for record in RecordStore(folder)] == ["valid"] * len(list(RecordStore(folder)))
    assert "failed" not in (folder / "leaderboard.csv").read_text()


def benchmark_folder() -> Path:
    return Path(cell_runner.__file__).parents[2] / "model_zoo" / "bundled"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ValueError("odd\nsize"), "ValueError: odd"),
        (torch.OutOfMemoryError("no room"), "OutOfMemoryError: no room"),
        (KeyError(), "KeyError"),
        (UsageError("one sentence"), "one sentence"),
    ],
)
def test_any_exception_of_a_network_becomes_a_record(
    raised: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(model_results, "LayerAudit", fail)
    (record,) = run([CELL], tmp_path)
    assert (record.status, record.reason) == ("failed", reason)
    assert record.details["error"] == type(raised).__name__


def test_a_damaged_record_is_reported_and_kept(measuring: list[str], tmp_path: Path) -> None:
    (record,) = run([CELL], tmp_path)
    path = RecordStore(tmp_path).path(record.cell_id)
    path.write_text(path.read_text()[:-20])
    (again,) = run([CELL], tmp_path)
    assert again.details["error"] == IntegrityError.__name__
    assert f"{path} is not a record" in again.reason
    assert path.read_text()[-1] != "}"


def test_unpinned_weights_are_flagged(measuring: list[str], tmp_path: Path) -> None:
    weights = benchmark_folder() / "digits-vgg-robust.safetensors"
    ref = f"file:{weights}?arch=bundled:digits-vgg-robust&num_classes=10&name=mine"
    (record,) = run([replace(CELL, ref=ref)], tmp_path)
    assert record.model == "mine"
    assert any(flag.startswith("unpinned: ") for flag in record.flags)
    assert not record.weights_pinned


def test_devices() -> None:
    assert device_of("cpu").type == "cpu"
    assert device_of("auto").type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="unknown device 'gpu'; legal: auto, cpu, cuda"):
        device_of("gpu")
    with pytest.raises(EnvironmentFault, match=r"device 'cuda:99' does not exist: this machine has \d+ GPUs"):
        device_of("cuda:99")


def test_an_unwritable_folder_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "b.yaml").write_text(SMALL)
    with pytest.raises(EnvironmentFault, match="cannot write"):
        claim(tmp_path / "file", read_config(tmp_path / "b.yaml"), SMALL)


def test_the_same_weights_with_another_normalisation_are_another_cell():
    ref = "file:{}?arch=nets.py:net&num_classes=10&mean={}&std=.5,.5,.5&name={}"
    network = _network_identity
    assert network(ref.format("a.pth", ".5,.5,.5", "one")) == network(ref.format("b.pth", ".5,.5,.5", "two"))
    assert network(ref.format("a.pth", ".5,.5,.5", "one")) != network(ref.format("a.pth", ".4,.4,.4", "one"))
    assert network("timm:resnet18") == "timm:resnet18"


def test_the_cells_of_one_model_stay_together(tmp_path):
    (tmp_path / "b.yaml").write_text(
        "name: a\ndataset: digits\nmodels: [bundled:digits-vgg-*, bundled:digits-resnet-standard]\n"
        "threats: {eps: [0.1, 0.2]}\nestimators: [sandwich, label-level]\n"
    )
    refs = [cell.ref for cell in expand(read_config(tmp_path / "b.yaml"))]
    runs = [ref for ref, before in zip(refs, ["", *refs], strict=False) if ref != before]
    assert len(refs) == 16
    assert len(runs) == len(set(runs)) == 4


CERTIFIED = """\
name: certified
dataset: digits
images: 50
models: [bundled:digits-vgg-standard]
layers: [logits]
threats: {norm: linf, eps: 0.2}
estimators: [{name: label-level, steps: 5}, {name: label-information, rounds: 1, steps: 5}]
seeds: [0]
attack: {steps: 2}
certificate: true
"""


@pytest.mark.slow
def test_estimators_share_a_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = model_results.certify_layers

    def counting(*arguments: Any) -> Any:
        made.append(arguments[1:3])
        return real(*arguments)

    monkeypatch.setattr(model_results, "certify_layers", counting)
    # how tight the certificate is and how well heads are trained does not matter: that estimators share them does
    effort = SearchEffort(hubs=1, neighbours=2, newton_steps=10)
    monkeypatch.setattr(model_results, "CertificateSettings", partial(CertificateSettings, effort=effort))
    monkeypatch.setattr(
        model_results, "CertificationSettings", partial(CertificationSettings, heads=HeadTraining(epochs=1))
    )
    (tmp_path / "b.yaml").write_text(CERTIFIED)
    records = run(expand(read_config(tmp_path / "b.yaml")), tmp_path / "run")
    assert made == [(["logits"], [Linf(0.2)])]
    for record in records:
        assert record.valid, record.reason
        assert record.best_head_accuracy is not None
        assert record.certified_bound is not None
        assert record.best_head_accuracy <= record.certified_bound < record.certified_bound_population
        assert record.certified_tier == "bit-identical at float32"
        assert record.details["certificate"]["at_hubs"]
    (path, *_) = write_leaderboard(tmp_path / "run")
    table = pd.read_csv(path)
    assert set(CERTIFICATE) <= set(table.columns)
    assert not table[list(CERTIFICATE)].isna().any().any()
    assert not set(LEDGER) & set(table.columns)


LEDGERED = """\
name: ledgered
dataset: digits
images: 50
models: [bundled:digits-baseline-h-robust]
layers: [logits]
threats: {norm: linf, eps: 0.01}
estimators: [{name: label-level, steps: 2}]
seeds: [0]
attack: {steps: 2}
certificate: {ledger: true}
"""


def test_a_ledger_reaches_the_record_the_leaderboard_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # neither collisions nor trained heads are what is tested
    quick = partial(CertificateSettings, effort=SearchEffort(hubs=0, neighbours=0))
    monkeypatch.setattr(model_results, "CertificateSettings", quick)
    monkeypatch.setattr(model_results, "CertificationSettings", partial(CertificationSettings, measured=("own",)))
    (tmp_path / "b.yaml").write_text(LEDGERED)
    (record,) = run(expand(read_config(tmp_path / "b.yaml")), tmp_path / "run")
    row = record.details["certificate"]
    assert record.proved_share == row["proved"] > 0
    assert record.not_broken_share == (50 - round(50 * row["broken"])) / 50 < 1
    assert record.adversarial_accuracy is not None
    assert record.proved_share <= record.adversarial_accuracy <= record.not_broken_share
    assert record.proved_share < record.not_broken_share
    assert record.passes is not None
    assert record.passes > row["passes"] + row["attack_passes"] + row["ledger_passes"] > row["ledger_passes"] > 0
    (path, *_) = write_leaderboard(tmp_path / "run")
    assert pd.read_csv(path).loc[0, list(LEDGER)].tolist() == [
        record.proved_share,
        record.not_broken_share,
        *row["kept_population"],
    ]
    between = f"between {record.proved_share:.3f} and {record.not_broken_share:.3f} of the images stay right, proved"
    assert f"; {between} (50 images); " in verdict([record])


def test_without_a_certificate_records_have_no_trace_of_it(small: Path) -> None:
    (record, *_) = RecordStore(small / "run")
    assert "certificate" not in record.details["identity"]["settings"]
    assert not {*CERTIFICATE, *LEDGER} & set(pd.read_csv(small / "run" / "leaderboard.csv").columns)


def test_the_failures_of_two_estimators_are_two_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = replace(CELL, ref="bundled:no-such-model")
    other = replace(lost, settings=replace(SETTINGS, estimator=Reference(per_position=True)))
    first, second = run([lost, other], tmp_path)
    assert first.cell_id != second.cell_id
    assert len(list(RecordStore(tmp_path))) == 2


def test_training_images_of_heads_change_ids_of_certified_cells_only(tmp_path: Path) -> None:
    images = load_images("digits", ImageRequest(count=60))
    np.savez(tmp_path / "copy.npz", images=images.images.numpy(), labels=images.labels.numpy())
    inputs = InputCache(RunOptions())
    plain, with_heads = CELL, replace(CELL, settings=replace(SETTINGS, certificate=True))
    assert "examples_sha256" not in inputs.open(plain).identity
    named = inputs.open(with_heads).identity
    assert len(named["examples_sha256"]) == 64
    copy = inputs.open(replace(with_heads, dataset=f"npz:{tmp_path / 'copy.npz'}")).identity
    assert copy["examples_sha256"] is None  # no training images: other heads, another certificate


def test_locks_survive_the_deletion_of_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = FileLock.acquire, 3

    def taken_away(lock: FileLock, timeout: float) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            raise FileNotFoundError(2, "No such file or directory")
        return real(lock, timeout=timeout)

    monkeypatch.setattr(FileLock, "acquire", taken_away)
    with lock(tmp_path, "a", wait=False) as mine:
        assert mine
    left = 100
    with pytest.raises(EnvironmentFault, match=r"\.locks was deleted 10 times by other runs"):
        lock(tmp_path, "a", wait=False).__enter__()


def test_a_model_is_freed_before_the_next_one_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def loading_model(*arguments: Any) -> Any:
        alive.append(sum(network() is not None for network in networks))
        model = load_model(*arguments)
        networks.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(loading, "load_model", loading_model)
    todo = [CELL, replace(CELL, ref="bundled:digits-vgg-standard"), replace(CELL, ref="bundled:digits-resnet-standard")]
    assert all(record.valid for record in run(todo, tmp_path))
    assert alive == [0, 0, 0]
