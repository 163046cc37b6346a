"""The hostile corpus through every loading path: no code runs; one-line errors, exit codes, bounded memory."""

import contextlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from audit.errors import AuditError, EnvironmentFault, IntegrityError, UnknownNameError, UnsafeError, UsageError
from model_zoo import libraries
from model_zoo.architectures import build
from model_zoo.catalogue import read_card
from model_zoo.entries import PretrainedFacts
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model
from model_zoo.sources import downloads
from model_zoo.sources.downloads import Download, fetch
from model_zoo.sources.hub import config_facts, read_config
from model_zoo.untrusted import file_sha256
from model_zoo.weights import checkpoints
from model_zoo.weights.checkpoints import read_weights
from reports.cli import main

HERE = Path(__file__).parent
MOST = 300 << 20  # bytes above the memory of a valid file


def _corpus() -> ModuleType:
    """Import the corpus module from this folder, because test folders are not packages."""
    sys.path.insert(0, str(HERE))
    try:
        return importlib.import_module("hostile")
    finally:
        sys.path.remove(str(HERE))


hostile = _corpus()
# These take seconds to hash or scan, so they are opened once, in the separate process.
SLOW = {"sparse", "sparse-huge", "sparse-safetensors", "empty-lists", "deep-tuple", "members"}
SIZE = (1, 8, 8)


class Corpus:
    """The corpus on disk, and the canary file that a payload would create."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder / "files", folder / hostile.CANARY
        self.made = hostile.write_all(self.folder, self.canary)

    def weights(self) -> Iterator[tuple[Any, Path]]:
        return ((one, path) for one, path in self.made["weights"] if one.name not in SLOW)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"))


def refused(one: Any, action: Callable[..., object], *arguments: object) -> str:
    """Run a call that must be refused; return a description of any deviation, '' without one."""
    try:
        action(*arguments)
    except AuditError as error:
        said = str(error)
        faults = [f"code {error.exit_code}"] if error.exit_code != one.code else []
        faults += ["no single line"] if not said.isprintable() or len(said) > 900 else []
        faults += ["other words"] if one.says not in said else []
        return f"{one.name}: {', '.join(faults)}: {said[:200]}" if faults else ""
    except Exception as error:
        return f"{one.name}: {type(error).__name__}: {error}"
    return f"{one.name}: was loaded"


def test_the_corpus_is_large_and_its_payloads_work(corpus: Corpus, tmp_path: Path) -> None:
    names = [one.name for files in corpus.made.values() for one, _ in files]
    assert len(names) > 140
    assert len(set(names)) > 120
    for name in ("global-reduce", "protocol-0", "inst", "obj", "stack-global", "stack-global-memo", "build-setstate"):
        canary = tmp_path / name
        with contextlib.suppress(TypeError):
            pickle.loads(hostile.opcodes(canary)[name])
        assert canary.exists(), name
    for name in ("system", "nested-pickle"):
        canary = tmp_path / f"value-{name}"
        pickle.loads(pickle.dumps(hostile.calling(canary)[name]))
        assert canary.exists(), name


def test_no_file_runs_code_or_exhausts_memory(corpus: Corpus) -> None:
    """Open the corpus in one process, with the environment variable set that makes torch unpickle by default."""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(HERE.parents[2])}
    command = [sys.executable, str(HERE / "hostile.py"), str(corpus.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=corpus.folder, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    wanted = {f"{kind}/{one.name}": one.code for kind, files in corpus.made.items() for one, _ in files}
    assert {name: code for name, code in told["codes"].items() if code != wanted[name]} == {}
    assert len(told["codes"]) == len(wanted)
    assert told["after"] - told["before"] < MOST, sorted(told["grown"].items(), key=lambda item: -item[1])[:3]
    assert not corpus.canary.exists()


def _small(*_: object, **__: object) -> torch.nn.Module:
    card = read_card("digits-vgg-standard")
    return build(card["architecture"], card["arguments"])


FACTS = PretrainedFacts(
    name="small",
    family="vgg",
    num_classes=10,
    image_shape=SIZE,
    mean=(0.5,),
    std=(0.5,),
    hub_repo="nobody/small",
    hub_file="model.safetensors",
    url="https://example.org/small.pth",
)


@pytest.fixture
def small_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the architectures of all libraries by one small network, which builds quickly."""
    for name in ("timm_build", "torchvision_build", "robustbench_build"):
        monkeypatch.setattr(libraries, name, _small)
    monkeypatch.setattr(libraries, "timm_facts", lambda _: FACTS)
    monkeypatch.setattr(libraries, "torchvision_facts", lambda *_: ("V1", FACTS))


def _at(place: Path, source: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    if source.is_symlink():
        place.symlink_to(source.readlink())
    else:
        place.symlink_to(source)


PLACES = {
    "timm:small": "cache/timm/small.safetensors",
    "torchvision:small/V1": "cache/torchvision/small.pth",
    "robustbench:cifar10/Linf/Rice2020Overfitting": "models/cifar10/Linf/Rice2020Overfitting.pt",
    "hf-hub:nobody/small": "cache/hf-hub/nobody/small/model.safetensors",
}


@pytest.mark.usefixtures("small_libraries")
@pytest.mark.parametrize("ref", PLACES)
def test_malicious_files_in_every_cache_are_refused(
    ref: str, corpus: Corpus, offline: SourceSettings, tmp_path: Path
) -> None:
    place = tmp_path / PLACES[ref]
    place.parent.mkdir(parents=True)
    (place.parent / "config.json").write_text('{"architecture": "small", "num_classes": 10}')
    _at(place, hostile.GOOD)
    load_model(ref, offline) if "robustbench" not in ref else None
    complaints = []
    for one, path in corpus.weights():
        _at(place, path)
        complaints.append(refused(one, load_model, ref, offline))
    assert [complaint for complaint in complaints if complaint] == []
    assert not corpus.canary.exists()


def test_malicious_file_references_are_refused(corpus: Corpus, offline: SourceSettings) -> None:
    complaints = [
        refused(one, load_model, f"file:{path}?arch={hostile.REF}&num_classes=10", offline)
        for one, path in corpus.weights()
    ]
    assert [complaint for complaint in complaints if complaint] == []
    assert not corpus.canary.exists()


@pytest.mark.parametrize("kind", hostile.DATA)
def test_malicious_data_sets_are_refused(kind: str, corpus: Corpus) -> None:
    complaints = [refused(one, load_images, f"{kind}:{path}") for one, path in corpus.made[kind]]
    assert [complaint for complaint in complaints if complaint] == []
    assert not corpus.canary.exists()


@pytest.mark.usefixtures("small_libraries")
def test_malicious_downloads_are_refused(
    corpus: Corpus, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloaded files are refused with the same errors; web pages and empty bodies are not stored."""
    url, answers, _ = server
    complaints = []
    for one, path in corpus.weights():
        if not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        answers[f"/{one.name}.pth"] = (path.read_bytes(), None)
        facts = replace(FACTS, url=f"{url}/{one.name}.pth")
        monkeypatch.setattr(libraries, "torchvision_facts", lambda *_, facts=facts: ("V1", facts))
        sources = SourceSettings(cache_dir=tmp_path)
        if not path.stat().st_size:
            one = one._replace(says="sent an empty body")
        complaints.append(refused(one, load_model, "torchvision:small/V1", sources))
    assert len(complaints) > 90
    assert [complaint for complaint in complaints if complaint] == []
    assert not (tmp_path / "torchvision" / "page.pth").exists()
    assert not corpus.canary.exists()


@pytest.mark.parametrize(
    "name",
    ["zip-system", "member-inst", "joblib", "deflated", "hostile-key", "page", "pipe", "raw-hostile-name", "nan"],
)
def test_the_terminal_shows_a_one_line_error(
    name: str, corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name != "hostile-key":  # one written report is enough
        monkeypatch.setattr("reports.publish.write_reports", lambda _folder: [])
    ((one, path),) = [(one, path) for one, path in corpus.made["weights"] if one.name == name]
    ref = f"file:{path}?arch={hostile.REF}&num_classes=10"
    assert main(["audit", ref, "--dataset", "digits", "--eps", "0.1", "--images", "60", "--out", "run"]) == one.code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "\x1b[2J" not in said
    assert len([line for line in said.splitlines() if line.startswith("Error: ")]) == 1


def test_a_flipped_bit_is_detected_by_a_pinned_hash(tmp_path: Path, offline: SourceSettings) -> None:
    data = bytearray(hostile.GOOD.read_bytes())
    data[-20] ^= 1
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(data))
    ref = f"file:{path}?arch={hostile.REF}&num_classes=10"
    assert not load_model(ref, offline).entry.pinned
    with pytest.raises(IntegrityError, match="not the published"):
        load_model(f"{ref}&sha256={file_sha256(hostile.GOOD)}", offline)


def test_exactly_two_kinds_of_metadata_are_read(tmp_path: Path) -> None:
    import argparse

    import numpy as np

    kinds = [np.float64(0.5), np.float32(2), np.int64(-3), np.uint8(7), np.bool_(True), np.float16(1.5)]
    torch.save({"w": torch.ones(1), "args": argparse.Namespace(a=1), "numbers": kinds}, tmp_path / "w.pth")
    contents, _ = checkpoints.read_contents(tmp_path / "w.pth")
    assert isinstance(contents, dict)
    assert contents["numbers"] == [0.5, 2.0, -3, 7, True, 1.5]
    assert contents["args"].a == 1
    big = np.dtype(">f8").type(0.25).newbyteorder() if hasattr(np.float64, "newbyteorder") else None
    assert big is None or isinstance(big, np.float64)
    for other in (np.array(["x"])[0], np.complex128(1), np.datetime64("2020-01-01"), np.void(b"12345678")):
        torch.save({"w": torch.ones(1), "x": other}, tmp_path / "other.pth")
        with pytest.raises(AuditError) as caught:
            read_weights(tmp_path / "other.pth")
        assert caught.value.exit_code in (hostile.BROKEN, hostile.UNSAFE)


def test_pickles_are_refused_with_an_old_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(EnvironmentFault, match=r"less safely than 2\.10 does; upgrade torch, or convert"):
        read_weights(tmp_path / "w.pth")
    assert read_weights(hostile.GOOD).tensors


CONFIGS = {
    "classes": ({"num_classes": 10**10}, UsageError, "num_classes"),
    "size": ({"pretrained_cfg": {"input_size": [3, 10**5, 10**5]}}, UsageError, "input_size"),
    "mean": ({"pretrained_cfg": {"mean": [0.5] * 10**4, "std": [1] * 10**4}}, UsageError, "mean"),
    "std": ({"pretrained_cfg": {"std": [0, 0, 0]}}, UsageError, "std"),
    "infinite": ({"num_classes": 1e400}, UsageError, "wrong kind"),
    "crop": ({"pretrained_cfg": {"crop_pct": 1e-9}}, UsageError, "crop_pct 1e-09 is not the share"),
    "crop-kind": ({"pretrained_cfg": {"crop_pct": "all"}}, UsageError, "wrong kind"),
    "crop-mode": ({"pretrained_cfg": {"crop_mode": ["center"]}}, UsageError, "wrong kind"),
    "interpolation": ({"pretrained_cfg": {"interpolation": "random"}}, UsageError, "interpolation 'random'"),
    "width": ({"model_args": {"embed_dim": 2**16, "depth": 40}}, UnsafeError, "far larger than its weights"),
    "unknown": ({"model_args": {"act_layer": "no\x1b[2Jsuch"}}, UsageError, "timm cannot build"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_beyond_the_limits_are_refused(name: str, offline: SourceSettings) -> None:
    change, error, says = CONFIGS[name]
    folder = offline.cache / "hf-hub" / "nobody" / "net"
    folder.mkdir(parents=True)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, **change}
    (folder / "config.json").write_text(json.dumps(config).replace("Infinity", "1e999"))
    (folder / "model.safetensors").write_bytes(hostile.GOOD.read_bytes())
    with pytest.raises(error, match=says) as caught:
        load_model("hf-hub:nobody/net", offline)
    assert str(caught.value).isprintable()


def test_configurations_that_are_not_json_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":' * 100_000)
    with pytest.raises(UsageError, match="not in timm's layout"):
        read_config(path, "a/b")
    hostile.sparse(path, 1 << 33)
    with pytest.raises(UnsafeError, match="more than the limit of 1000000"):
        read_config(path, "a/b")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EnvironmentFault, match="pipe"):
        read_config(path, "a/b")
    with pytest.raises(UnknownNameError):
        config_facts({"architecture": "hf-hub:a/b"}, "a/b")


def test_pickles_of_named_data_sets_are_not_opened(tmp_path: Path) -> None:
    """CIFAR batches are pickles: hashes are compared before they are opened, and an archive beside them is ignored."""
    canary = tmp_path / "canary"
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("test_batch", "data_batch_1", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(hostile.Runs(os.system, f"touch {canary}")))
    hostile.tarred(tmp_path / "data" / "cifar-10-python.tar.gz", "w:gz")
    with pytest.raises(EnvironmentFault, match="not complete"):
        load_images("cifar10", ImageRequest(count=10, data_dir=tmp_path / "data", offline=True))
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("t10k-images-idx3", "t10k-labels-idx1", "train-images-idx3", "train-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\x00\x00\x0d\x7f" + b"\xff" * 40)
    with pytest.raises(EnvironmentFault, match="not complete"):
        load_images("mnist", ImageRequest(count=10, data_dir=tmp_path / "data", offline=True))
    assert not canary.exists()
    assert not (tmp_path / "escaped").exists()


def test_archives_extracted_by_torchvision_stay_in_their_folder(tmp_path: Path) -> None:
    import tarfile

    from torchvision.datasets.utils import extract_archive

    from model_zoo.images.named import _safe_tar_extraction

    hostile.tarred(tmp_path / "slip.tar")
    inner = tmp_path / "inner"
    with _safe_tar_extraction(), pytest.raises(tarfile.FilterError):
        extract_archive(str(tmp_path / "slip.tar"), str(inner))
    assert not (tmp_path / "escaped").exists()
    assert tarfile.TarFile.extraction_filter is None


YAML = {
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "object": "name: !!python/object/apply:os.system ['touch canary']\n",
    "deep": "a: " + "[" * 3_000,
    "large": "a: b\n" * 300_000,
}


@pytest.mark.parametrize("name", YAML)
def test_malicious_yaml_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.yaml").write_text(YAML[name])
    assert main(["run", "b.yaml"]) == hostile.USAGE
    assert "Traceback" not in capsys.readouterr().err
    assert not Path("canary").exists()


def test_bodies_above_the_size_limit_are_not_kept(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, _ = server
    monkeypatch.setattr(downloads, "MAX_FILE_BYTES", 1000)
    answers["/long"], answers["/silent"] = (b"x" * 2000, None), (b"x" * 2000, 0)
    with pytest.raises(UnsafeError, match=r"sends 2000 bytes, more than the limit of 1000"):
        fetch(Download(url=f"{url}/long"), tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_compressed_bodies_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Compressed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Accept-Encoding"])
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(b"\x1f\x8b")

        def log_message(self, *_: object) -> None:
            return

    http = HTTPServer(("127.0.0.1", 0), Compressed)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    with pytest.raises(UnsafeError, match="was sent compressed"):
        fetch(Download(url=f"http://127.0.0.1:{http.server_port}/w"), tmp_path / "w.pth")
    http.shutdown()
    http.server_close()
    thread.join()
    assert asked == ["identity"]


def test_folders_and_pipes_cannot_be_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(EnvironmentFault, match=r"cannot read .* not a file but a folder, a pipe or a device"):
            file_sha256(path)
