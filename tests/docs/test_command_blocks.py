"""Every command block of README and docs runs, in order, in the folder of a reader of that page; or says why not.

A block is excused by a comment just before it, `<!-- not run: REASON -->`. A block whose first line is a comment with
the name of a file is that file. Commands run in this process, shortened: fewer images (`FEWER`), and smaller defaults
for options that the line does not give (`SMALLER`). Benchmark files are validated as they stand, and shortened alike
before they run.
"""

import importlib.util
import inspect
import io
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from audit.studies.recipes.model_cards import describe_model, write_model
from model_zoo.architectures import build
from reports.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if ".ipynb_checkpoints" not in path.parts
)
COMMANDS = ("console", "python", "yaml")
_FENCE = re.compile(r"^(?P<excuse><!-- not run: .+? -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
_FILE = re.compile(r"# ([\w.]+\.(?:py|yaml))\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it is not run, or an empty excuse."""

    page: str
    line: int
    language: str
    text: str
    excuse: str

    @property
    def file(self) -> str:
        """The file that the first line names, or an empty name."""
        found = _FILE.match(self.text)
        return found[1] if found else ""


def blocks_of(page: str, text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        excuse = (match["excuse"] or "").removeprefix("<!-- not run: ").removesuffix(" -->\n")
        found.append(Block(page, line, match["language"].strip(), match["text"], excuse))
    return found


def read_page(page: str) -> str:
    """Return the text of a page, whose name is relative to the root."""
    return (ROOT / page).read_text(encoding="utf-8")


def command_blocks(page: str) -> list[Block]:
    """Return the blocks of a page whose language is that of a command, a program or a benchmark file."""
    return [block for block in blocks_of(page, read_page(page)) if block.language in COMMANDS]


BENCHMARK = """name: digits
dataset: digits
images: 50
models: [bundled:digits-vgg-standard, bundled:digits-vgg-robust]
layers: [logits]
threats: {norm: linf, eps: 0.2}
estimators: [sandwich]
seeds: [101]
attack: smoke
keep_images: true
"""


# models, layer and radius of Figures 3 to 5, on few images
FIGURES = """name: few
dataset: digits
images: 12
models: [bundled:digits-vgg-standard]
layers: [stages.1.0]
threats: {norm: linf, eps: 0.05}
seeds: [0]
estimators: [sandwich]
"""


def write_parquet(path: Path, count: int = 60) -> None:
    """Write colour images of 32x32 pixels, enlarged digits, in the layout of Hugging Face."""
    digits = load_digits()
    rows = []
    for values, label in zip(digits.images[:count], digits.target[:count], strict=True):
        image = Image.fromarray((values * 15.9375).astype(np.uint8)).resize((32, 32)).convert("RGB")
        image.save(buffer := io.BytesIO(), "PNG")
        rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": int(label)})
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_checkpoints(folder: Path, nets: ModuleType) -> None:
    """Write weights of the network that the last function of `nets.py` builds, as training code does."""
    factory = [f for f in vars(nets).values() if inspect.isfunction(f) and f.__module__ == nets.__name__][-1]
    for seed, name in enumerate(("checkpoint.pth", "other.pth")):
        torch.manual_seed(seed)
        torch.save({"state_dict": factory().state_dict(), "epoch": 3}, folder / name)


def write_encoders(folder: Path) -> None:
    """Write an untrained encoder of Table 1, alone and with a head, where the study of digits leaves them."""
    for stem, classes in (("digits-tiny-worst-case-seed0", 0), ("digits-tiny-worst-case-seed0-robust-h", 10)):
        arguments = {"image_shape": [1, 8, 8], "width": 4, "num_classes": classes}
        card = describe_model("paper-encoder", arguments, "paper-encoder", "digits", 0.2)
        network = build("paper-encoder", arguments)
        write_model(
            network, folder / f"{stem}.safetensors", card | {"id": stem, "published": [], "reference": "", "recipe": ""}
        )


@dataclass
class Reader:
    """Somebody who follows a page in a folder: the names that Python blocks have defined so far."""

    folder: Path
    names: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with benchmark.yaml, its run under runs/digits, and two further runs of it to compare."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "benchmark.yaml").write_text(BENCHMARK, encoding="utf-8")
    for name, text in (("digits", BENCHMARK), ("second", BENCHMARK.replace("[101]", "[101, 102]"))):
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        command = ["run", str(folder / "config.yaml"), "--out", str(folder / "runs" / name), "--jobs", "1"]
        assert not cli.main([*command, "--device", "cpu"], standalone_mode=False)
    shutil.copytree(folder / "runs" / "digits", folder / "runs" / "first")
    return folder


@pytest.fixture
def reader(tmp_path: Path, finished_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A folder with copies of the finished runs, of the documents' rows and of the data that pages name."""
    folder = tmp_path / "reader"
    shutil.copytree(finished_runs, folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.md", "*.png", "notebooks"))
    write_parquet(folder / "cifar10-test.parquet")
    write_encoders(folder / "runs" / "table1-digits-tiny" / "encoders")
    (folder / "few.yaml").write_text(FIGURES, encoding="utf-8")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    model, images = (
        nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10)),
        torch.rand(60, 3, 8, 8),
    )
    labels = model(images).argmax(1)
    loader = DataLoader(TensorDataset(images, labels), 20)
    return Reader(folder, {"model": model, "loader": loader, "images": images, "labels": labels})


# the images of each verb where the line gives more, or none
FEWER = {"audit": 50, "attack": 8, "certify": 24, "features": 12, "saliency": 12}
# options that a line does not give
SMALLER: dict[str, dict[str, Any]] = {
    "audit": {"--seeds": 1, "--estimator": ["sandwich"]},
    "run": {"--jobs": 1},
}
ADDED = {
    ("reproduce", "theorem-3.2"): ["--samples", "60", "--seeds", "1", "--shift", "1"],
    ("reproduce", "figure3"): ["few.yaml"],
    ("reproduce", "figure4"): ["few.yaml"],
    ("reproduce", "figure5"): ["few.yaml"],
}


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of every command of a console block, continued lines joined and comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shortened(words: list[str]) -> list[str]:
    """Return a command on fewer images."""
    fewer = FEWER.get(words[0])
    return [*words, *(["--images", str(fewer)] if fewer else []), *ADDED.get(tuple(words[:2]), [])]


def smaller_defaults() -> dict[str, dict[str, Any]]:
    """Return the default map of click: names of parameters instead of options."""
    found: dict[str, dict[str, Any]] = {}
    for verb, values in SMALLER.items():
        command = cli.get_command(click.Context(cli), verb)
        names = {option: parameter.name for parameter in command.params for option in parameter.opts}
        found[verb] = {names[option]: value for option, value in values.items()}
    return found


def run_console(block: Block, reader: Reader) -> None:
    for words in commands_of(block):
        assert words[0] == "rvaudit", f"{block.page}:{block.line}: no way to run {shlex.join(words)}"
        arguments = shortened(words[1:])
        code = cli.main(arguments, standalone_mode=False, default_map=smaller_defaults())
        assert not code, f"{block.page}:{block.line}: exit code {code} of {shlex.join(words)}"


def run_python(block: Block, reader: Reader) -> None:
    exec(compile(block.text, f"{block.page}:{block.line}", "exec"), reader.names)


def write_network(block: Block, reader: Reader) -> None:
    path = reader.folder / block.file
    path.write_text(block.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(nets := importlib.util.module_from_spec(spec))
    write_checkpoints(reader.folder, nets)


def write_benchmark(block: Block, reader: Reader) -> None:
    assert block.file, f"{block.page}:{block.line}: the first line of a benchmark names its file"
    path = reader.folder / block.file
    path.write_text(block.text, encoding="utf-8")
    cli.main(["validate", str(path), "--schema"], standalone_mode=False)
    yaml = YAML()
    config = yaml.load(path)
    yaml.dump({**config, "images": 50, "estimators": ["sandwich"], "seeds": [101], "attack": "smoke"}, path)


def run(block: Block, reader: Reader) -> None:
    """Do with a block what its language asks for."""
    if block.language == "python":
        (write_network if block.file else run_python)(block, reader)
    else:
        {"console": run_console, "yaml": write_benchmark}[block.language](block, reader)


PAGES_WITH_COMMANDS = [page for page in PAGES if any(not block.excuse for block in command_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS)
def test_every_command_block_of_a_page_runs(page: str, reader: Reader) -> None:
    for block in command_blocks(page):
        if not block.excuse:
            run(block, reader)


def test_fewer_than_one_block_in_ten_is_excused(record_property: Any) -> None:
    blocks = [block for page in PAGES for block in command_blocks(page)]
    excused = [block for block in blocks if block.excuse]
    record_property("blocks run", len(blocks) - len(excused))
    record_property("blocks excused", len(excused))
    assert len(blocks) > 40
    assert 10 * len(excused) < len(blocks), [f"{block.page}:{block.line}: {block.excuse}" for block in excused]


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_whose_language_is_named(page: str) -> None:
    text = read_page(page)
    other = [block for block in blocks_of(page, text) if block.language not in COMMANDS]
    assert not [b.line for b in other if re.search(r"^(\$ )?(rvaudit|python|pip|make) ", b.text, re.M)]
    assert not re.findall(r"^ {4,}(?:\$ )?(?:rvaudit|make|pip) .*", re.sub(_FENCE, "", text), re.M)
    assert text.count("<!-- not run:") == sum(bool(block.excuse) for block in blocks_of(page, text))
