"""The wheel holds everything: installed in an empty environment, it runs a benchmark from another folder."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("audit", "model_zoo", "reports", "rvaudit.py", "pyproject.toml", "README.md", "LICENSE")
BENCHMARK = """name: digits
dataset: digits
images: 50
models: [bundled:digits-baseline-h-robust]
layers: [logits]
threats: {norm: linf, eps: 0.2}
estimators: [sandwich]
seeds: [101]
attack: audit
"""


def closure(name, extras=()):
    """Return the normalised names of a distribution and of everything that it requires here."""
    found, todo = set(), [(name, frozenset(extras))]
    while todo:
        name, extras = todo.pop()
        key = (canonicalize_name(name), extras)
        if key in found or not list(metadata.distributions(name=name)):
            continue
        found.add(key)
        for requirement in map(Requirement, metadata.requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                todo.append((requirement.name, frozenset(requirement.extras)))
    return {name for name, _ in found}


def link_dependencies(requirements, site):
    """Link what an installation with some requirements would hold into its site-packages, and nothing else."""
    here = Path(sysconfig.get_path("purelib"))
    names = set().union(*(closure(each.name, each.extras) for each in requirements))
    homes = metadata.packages_distributions().items()
    lacking = {module for module, owners in homes if not names & {canonicalize_name(owner) for owner in owners}}
    for path in here.iterdir():
        owner, _, kind = path.name.partition("-")
        declared = (
            canonicalize_name(owner) in names
            if kind.endswith(".dist-info")
            else path.name.partition(".")[0] not in lacking
        )
        if declared and path.suffix != ".pth" and not path.name.startswith(("__", "rvaudit")):
            (site / path.name).symlink_to(path)
    return lacking


def run(*command, folder):
    done = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources, since building writes beside them."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder, folder=folder)
    (found,) = (folder / "dist").glob("rvaudit-*.whl")
    return found


def test_the_wheel_holds_every_module_and_every_data_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    ours = [
        path.relative_to(ROOT) for package in ("audit", "model_zoo", "reports") for path in (ROOT / package).rglob("*")
    ]
    wanted = {str(path) for path in ours if (ROOT / path).is_file() and path.suffix != ".pyc"}
    wanted |= {name for name in SOURCES if name.endswith(".py") and (ROOT / name).exists()}
    assert wanted - held == set()
    assert not [name for name in held if name.startswith(("tests", "docs", "benchmarks"))]


@pytest.mark.slow
def test_an_installed_wheel_runs_a_benchmark_from_another_folder(wheel, tmp_path):
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
        folder=tmp_path,
    )
    (site,) = environment.glob("lib/python*/site-packages")
    (path,) = site.glob("rvaudit-*.dist-info")
    asked = [Requirement(text) for text in metadata.PathDistribution(path).requires]
    lacking = link_dependencies(
        [each for each in asked if not each.marker or each.marker.evaluate({"extra": ""})], site
    )
    assert {"ray", "robustbench", "pytest"} <= lacking
    assert not {"torch", "timm", "pyautoattack", "numpy"} & lacking
    where = run(python, "-c", "import audit, model_zoo, reports; print(audit.__file__)", folder=elsewhere)
    assert Path(where.strip()).is_relative_to(environment)

    (elsewhere / "benchmark.yaml").write_text(BENCHMARK)
    rvaudit = environment / "bin" / "rvaudit"
    (record,) = json.loads(
        run(rvaudit, "run", "benchmark.yaml", "--offline", "--device", "cpu", "--json", folder=elsewhere)
    )
    assert record["status"] == "valid", record["reason"]
    assert 0 <= record["adversarial_accuracy"] <= record["natural_accuracy"] <= 1
    assert record["normal_nats"] > record["worst_nats"]
    for name in ("report.html", "leaderboard.csv", "leaderboard.parquet", "columns.csv"):
        assert (elsewhere / "runs" / "digits" / name).stat().st_size > 100
    assert "digits-baseline-h-robust" in run(rvaudit, "models", "--source", "bundled", folder=elsewhere)
