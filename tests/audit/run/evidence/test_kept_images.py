"""Kept images are legal, give the numbers of their records, and verification finds every one that does not."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from audit.commands import execution
from audit.config.yaml_source import read_config
from audit.errors import AuditError, EnvironmentFault, IntegrityError
from audit.records import AuditRecord, RecordStore
from audit.run import identity
from audit.run.cell import Cell, expand
from audit.run.evidence.kept import ImageKeeper, finished, has_images, images_path, read_images
from audit.run.evidence.rereading import Rereader
from audit.run.loading import InputCache, RunOptions
from audit.run.run_loop import Watcher, claim, run
from audit.run.upkeep.progress import counts, run_statuses
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model
from model_zoo.lookup import expand_ref
from reports.cli import main
from reports.tables.ranking import write_leaderboard

REF = "bundled:digits-vgg-standard"
BENCHMARK = f"""\
name: small
dataset: digits
models: [{REF}]
threats: {{eps: 0.1}}
estimators:
- {{name: sandwich, steps: 2, start_steps: 1, draws: 1}}
- {{name: label-level, steps: 2}}
- {{name: ref-local, width: 8, steps: 2, search_steps: 1}}
attack: {{steps: 2}}
seeds: [0, 3]
images: 60
"""
EPS, IMAGES = 0.1, 60
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "b.yaml").write_text(BENCHMARK)
    claim(folder / "run", read_config(folder / "b.yaml"), BENCHMARK)
    records = computed(folder / "run", RunOptions(keep_images=True))
    assert [record.reason for record in records] == [""] * 3
    write_leaderboard(folder / "run")
    return folder / "run"


@pytest.fixture
def folder(kept_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(kept_run, tmp_path / "run"))


def computed(folder: Path, options: RunOptions, known: list[bool] | None = None) -> list[AuditRecord]:
    """Run the benchmark of a folder; append to `known` which records were there."""
    told = known if known is not None else []
    watcher = Watcher(done=lambda _record, was_there: told.append(was_there))
    return run(expand(read_config(folder / "benchmark.yaml")), folder, options, watcher)


def record_of(folder: Path, estimator: str) -> AuditRecord:
    return next(record for record in RecordStore(folder) if record.estimator == estimator)


def cell_of(folder: Path, record: AuditRecord) -> Cell:
    found = expand(read_config(folder / "benchmark.yaml"))
    return next(cell for cell in found if cell.settings.estimator.name == record.estimator)


def test_kept_images_give_the_numbers_of_their_record(kept_run: Path) -> None:
    network = load_model(REF).network
    data = load_images("digits", ImageRequest(IMAGES))
    for record in RecordStore(kept_run):
        path = kept_run / "images" / f"{record.cell_id}.safetensors"
        assert record.details["images"] == {
            "file": f"images/{record.cell_id}.safetensors",
            "sha256": sha256(path.read_bytes()).hexdigest(),
        }
        tensors = safetensors.numpy.load_file(path)
        assert sorted(tensors) == ["adversarial", "clean", "labels", "worst.seed0", "worst.seed3"]
        assert np.array_equal(tensors["clean"], data.images.numpy())
        assert np.array_equal(tensors["labels"], data.labels.numpy())
        for name in ("adversarial", "worst.seed0", "worst.seed3"):
            assert tensors[name].min() >= 0
            assert tensors[name].max() <= 1
            moved = np.abs(tensors[name].astype(float) - tensors["clean"])
            assert 0 < moved.max() <= EPS + 1e-6, name
        for name, stated in (("clean", record.natural_accuracy), ("adversarial", record.adversarial_accuracy)):
            with torch.no_grad():
                answers = network(torch.from_numpy(tensors[name])).argmax(1).numpy()
            assert (answers == tensors["labels"]).mean() == stated


def test_the_entropy_of_the_kept_worst_case_is_that_of_the_record(kept_run: Path) -> None:
    record, network = record_of(kept_run, "label-level"), load_model(REF).network
    tensors = safetensors.numpy.load_file(images_path(kept_run, record.cell_id))
    for row in record.details["per_seed"]:
        with torch.no_grad():
            answers = network(torch.from_numpy(tensors[f"worst.seed{row['seed']}"])).argmax(1).numpy()
        shares = np.bincount(answers) / len(answers)
        shares = shares[shares > 0]
        assert row["worst_nats"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-6)


def test_images_that_no_search_moved_are_the_clean_ones(kept_run: Path) -> None:
    record = record_of(kept_run, "ref-local")  # its search moves held-out images only
    tensors = safetensors.numpy.load_file(images_path(kept_run, record.cell_id))
    moved = (tensors["worst.seed0"] != tensors["clean"]).reshape(IMAGES, -1).any(1)
    assert 0 < moved.sum() <= record.critic_images < IMAGES


def test_verification_reads_kept_images_again(kept_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(kept_run), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["accepted"], told["images"], told["violations"]) == (True, 3, [])
    (unread,) = told["images_not_read"]
    assert unread["file"] == f"{record_of(kept_run, 'ref-local').cell_id}.json"
    assert unread["what"] == "nats: ref-local would have to be fitted again"


def _out_of_range(arrays: Arrays) -> None:
    arrays["adversarial"][7, 0, 0, 0] = -0.01


def _not_a_number(arrays: Arrays) -> None:
    arrays["worst.seed3"][7, 0, 0, 0] = np.nan


def _out_of_the_ball(arrays: Arrays) -> None:
    clean = arrays["clean"][7, 0, 4, 4]
    arrays["worst.seed3"][7, 0, 4, 4] = clean + 0.11 if clean < 0.5 else clean - 0.11


def _clean_as_adversarial(arrays: Arrays) -> None:
    arrays["adversarial"] = arrays["clean"].copy()


def _clean_as_worst(arrays: Arrays) -> None:
    arrays["worst.seed0"] = arrays["clean"].copy()


def _other_labels(arrays: Arrays) -> None:
    arrays["labels"] = arrays["labels"][::-1].copy()


def _other_clean_images(arrays: Arrays) -> None:
    for name in ("clean", "adversarial", "worst.seed0", "worst.seed3"):
        arrays[name] = (arrays[name] * np.float32(0.99)).astype(np.float32)


def _a_seed_left_out(arrays: Arrays) -> None:
    del arrays["worst.seed3"]


def _doubles(arrays: Arrays) -> None:
    arrays["adversarial"] = arrays["adversarial"].astype(np.float64)


LIES: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "range": (_out_of_range, r"1 of 60 adversarial images leave the pixel range \[0, 1\]"),
    "nan": (_not_a_number, "1 of 60 worst-case images of seed 3 leave the pixel range"),
    "ball": (_out_of_the_ball, r"1 of 60 worst-case images of seed 3 leave the ball: 0.11 from clean, eps 0.1"),
    "accuracy": (_clean_as_adversarial, r"adversarial_accuracy is 0\.\d+, its images give \d+/60"),
    "nats": (_clean_as_worst, r"worst_nats of seed 0 is .*, its images give"),
    "labels": (_other_labels, "the clean images or labels are not those of the data set"),
    "clean": (_other_clean_images, "the clean images or labels are not those of the data set"),
    "seed": (_a_seed_left_out, "does not hold the images of the record: 'worst.seed3'"),
    "type": (_doubles, "adversarial is float64"),
}


@pytest.mark.parametrize("lie", LIES)
def test_images_that_do_not_give_their_record_are_found(folder: Path, lie: str) -> None:
    change, expected = LIES[lie]
    record = record_of(folder, "label-level")
    path = images_path(folder, record.cell_id)
    arrays = safetensors.numpy.load_file(path)
    change(arrays)
    content = safetensors.numpy.save(arrays)
    path.write_bytes(content)
    cell, reader = cell_of(folder, record), Rereader(folder, RunOptions())
    (told,) = reader.read(record, cell).wrong
    assert f"the sha256 of {path} is" in told
    note = {**record.details["images"], "sha256": sha256(content).hexdigest()}  # a forger adapts the hash
    forged = replace(record, details={**record.details, "images": note})
    found = reader.read(forged, cell)
    assert re.search(expected, found.wrong[0])


def test_a_changed_byte_and_a_missing_file_fail_verification(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, missing = record_of(folder, "sandwich"), record_of(folder, "label-level")
    path = images_path(folder, changed.cell_id)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    images_path(folder, missing.cell_id).unlink()
    assert main(["verify", str(folder)]) == 5
    told = capsys.readouterr().out
    assert f"{changed.cell_id}.json: the sha256 of {path} is" in told
    assert f"{missing.cell_id}.safetensors cannot be read: No such file or directory" in told
    assert "accepted" not in told


def test_what_cannot_be_read_again_is_told(kept_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(kept_run, "label-level")
    cell = cell_of(kept_run, record)
    reading = Rereader(kept_run, RunOptions()).read(record, None)
    assert reading == ((), ("accuracies and nats: it is no cell of the benchmark",))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "VERSION", 99)
        reading = Rereader(kept_run, RunOptions()).read(record, cell)
        assert reading == ((), ("accuracies and nats: this version of rvaudit measures by another method",))
    other = replace(cell, ref="bundled:digits-vgg-robust")
    (told,) = Rereader(kept_run, RunOptions()).read(record, other).wrong
    assert told.startswith("weights, images or settings differ: the cell is now")

    def missing(_cache: InputCache, _cell: Cell) -> AuditError:
        raise EnvironmentFault("weights.pth does not exist")

    monkeypatch.setattr(InputCache, "open", missing)
    reading = Rereader(kept_run, RunOptions()).read(record, cell)
    assert reading == ((), ("accuracies and nats: weights.pth does not exist",))


def test_finished_cells_without_images_are_computed_again_where_images_are_kept(folder: Path) -> None:
    before = {record.cell_id: record for record in RecordStore(folder)}
    lost, dropped = record_of(folder, "label-level"), record_of(folder, "sandwich")
    images_path(folder, lost.cell_id).unlink()
    plain = {name: value for name, value in dropped.details.items() if name != "images"}
    RecordStore(folder).write(replace(dropped, details=plain))
    known: list[bool] = []
    computed(folder, RunOptions(), known)
    assert known == [True] * 3  # nobody asks for images
    copy = folder / "benchmark.yaml"
    assert counts(run_statuses(folder, expand_ref)) == {"done": 3, "failed": 0, "to do": 0}
    copy.write_text(f"{BENCHMARK}keep_images: true\n")
    assert counts(run_statuses(folder, expand_ref)) == {"done": 1, "failed": 0, "to do": 2}
    known = []
    computed(folder, RunOptions(keep_images=True), known)
    assert sorted(known) == [False, False, True]
    for record in RecordStore(folder):
        assert has_images(folder, record)
        read_images(folder, record)
        old = before[record.cell_id]
        assert replace(record, seconds=0.0) == replace(old, seconds=0.0)  # with the same hash of the images
    known = []
    computed(folder, RunOptions(keep_images=True), known)
    assert known == [True] * 3


def test_failures_stay_failures_where_images_are_asked_for(kept_run: Path) -> None:
    record = replace(record_of(kept_run, "sandwich"), status="failed", details={})
    assert finished(kept_run, [record], keep=True) == [record]


def test_images_of_another_machine_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"cannot keep images: the run folder .* is not on this machine"):
        ImageKeeper(tmp_path / "nowhere", keep=True).check()
    ImageKeeper(tmp_path / "nowhere", keep=False).check()
    ImageKeeper(None, keep=True).check()


def test_a_record_without_images_is_not_read(tmp_path: Path, kept_run: Path) -> None:
    record = record_of(kept_run, "sandwich")
    with pytest.raises(IntegrityError, match="names no images"):
        read_images(tmp_path, replace(record, details={}))


def test_the_options_and_the_key_ask_for_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def stop(config: object, *_arguments: object) -> list[AuditRecord]:
        asked.append(config.keep_images)  # type: ignore[attr-defined]
        return []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(execution, "run_benchmark", stop)
    monkeypatch.setattr(execution, "publish", lambda *_arguments, **_named: None)
    Path("b.yaml").write_text(BENCHMARK)
    Path("k.yaml").write_text(f"{BENCHMARK}keep_images: true\n")
    words = ["audit", REF, "--dataset", "digits", "--eps", "0.1"]
    for given in (["run", "b.yaml"], ["run", "b.yaml", "--keep-images"], ["run", "k.yaml"], words):
        assert main(given) == 0
    assert main([*words, "--keep-images"]) == 0
    assert asked == [False, True, True, False, True]
    plain, kept = (read_config(Path(name)).canonical() for name in ("b.yaml", "k.yaml"))
    assert plain == kept  # one run folder
