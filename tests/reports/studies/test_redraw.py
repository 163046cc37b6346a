"""The committed figures are drawn from their rows, the same bytes every time, and without torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from audit.errors import EnvironmentFault, IntegrityError, UnknownNameError
from reports.cli import main
from reports.figures.leaderboard_figures import read_leaderboard
from reports.figures.saliency_figure import draw_saliency
from reports.studies.redraw import STUDIES, draw_studies, holds_studies

DOCS = Path(__file__).parents[3] / "docs"
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class NoTorch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "timm"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, NoTorch())
from reports.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The committed rows, without any picture, drawn by a process that cannot import torch."""
    folder = tmp_path_factory.mktemp("docs")
    for place in ("digits", "figures"):
        shutil.copytree(DOCS / place, folder / place, ignore=shutil.ignore_patterns("*.png", "third-party"))
    command = [sys.executable, "-c", BLOCKED, "figures", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_committed_figure_is_redrawn_without_torch(drawn):
    expected = {"digits/figure1.png", "digits/figure2.png", "digits/agreement.png", "figures/theorem32.png",
                "figures/digits/figure3.png", "figures/digits/figure4.png", "figures/digits/figure5.png"}  # fmt: skip
    assert {str(path.relative_to(drawn)) for path in drawn.rglob("*.png")} == expected
    for name in expected:
        assert (DOCS / name).exists(), f"{name} is not committed: make figures"


def test_only_one_study_and_wrong_names(drawn, capsys):
    assert [path.name for path in draw_studies(drawn, "theorem-3.2")] == ["theorem32.png"]
    with pytest.raises(UnknownNameError, match="did you mean 'figure3'"):
        draw_studies(drawn, "figure33")
    with pytest.raises(EnvironmentFault, match="holds no rows of guess-first"):
        draw_studies(drawn, "guess-first")
    assert main(["figures", str(drawn), "--only", "theorem-3.2"]) == 0
    assert capsys.readouterr().out.strip().endswith("theorem32.png")


def test_a_run_folder_is_no_folder_of_studies(tmp_path):
    assert holds_studies(DOCS)
    (tmp_path / "figures").mkdir()
    (tmp_path / "cells").mkdir()
    assert not holds_studies(tmp_path)
    assert {"figure1-2", "figure3", "figure4-5", "theorem-3.2", "table1", "guess-first", "speed", "study"} == set(
        STUDIES
    )


def test_another_table_is_no_leaderboard(tmp_path):
    (tmp_path / "x.csv").write_text("rank,model\n1,a\n")
    with pytest.raises(IntegrityError, match="is no leaderboard: it lacks the columns"):
        read_leaderboard(tmp_path / "x.csv")
    frame = read_leaderboard(DOCS / "digits" / "leaderboard.csv")
    assert len(frame) == 48  # twelve models, four estimators
    assert frame["rv"].notna().all()


def test_maps_of_zeros_and_many_maps_are_drawn(tmp_path):
    facts = {"model": "m", "family": "f", "training": "standard", "trained_eps": 0.0, "dataset": "d", "layer": "l"}
    measures = ("alignment", "alignment_se", "cosine", "cosine_se", "correlation", "correlation_se")
    rows = [{**facts, "feature": str(i), "images": 3, "zeros": 3, **dict.fromkeys(measures)} for i in range(11)]
    pd.DataFrame(rows).to_csv(tmp_path / "s.csv", index=False)
    maps = [{**facts, "feature": str(i), "values": [[[0, 0], [0, 0]]]} for i in range(11)]
    panel = {"dataset": "d", "images": [[[[1], [2]], [[3], [4]]]], "labels": [0], "maps": maps}
    (tmp_path / "s.json").write_text(json.dumps([panel]))
    assert draw_saliency(tmp_path / "s.csv") == [tmp_path / "s.png"]
