"""Rows of certificates in a file, and the two profiles drawn from them."""

import csv
import json
import subprocess
import sys
from io import StringIO

import matplotlib as mpl
import pytest
from PIL import Image

from audit.errors import IntegrityError
from reports.figures.certificate_figure import (
    COLUMNS,
    eps_profile,
    layer_profile,
    read_rows,
    to_csv,
    write_certificate_figures,
)

TIER = "bit-identical at float32"


def row(layer, eps, bound, best, **changes):
    given = {
        "model": "file:nets/net.pth?arch=a", "training": "standard", "dataset": "digits", "layer": layer,
        "dimension": 10, "norm": "linf", "eps": eps, "images": 40, "certified_bound": bound,
        "certified_bound_population": None if bound is None else min(1.0, bound + 0.1), "confidence": 0.95,
        "certified_tier": TIER, "best_head": "alf", "best_head_accuracy": best, "heads": {"own": 0.0, "alf": best},
        "at_hubs": [6, 3], "flags": [], "reason": "",
        "delta_curve": [{"delta": 0.2, "relative": 0.01, "bound": 0.3}],
    }  # fmt: skip
    return given | changes


@pytest.fixture
def rows():
    return [
        row("penultimate", 2 / 255, 0.9, 0.6), row("penultimate", 8 / 255, 0.7, 0.1),
        row("logits", 2 / 255, 0.5, 0.4), row("logits", 8 / 255, 0.2, 0.0),
    ]  # fmt: skip


def texts(figure):
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def curves(figure, dashes):
    """Return every line of a style as its points."""
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == dashes and len(line.get_xdata()) > 1]
    return [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]


def test_the_layer_profile_has_both_curves_for_every_eps(rows):
    figure = layer_profile(rows)
    assert curves(figure, "--") == [[(0, 0.6), (1, 0.4)], [(0, 0.1), (1, 0.0)]]
    assert [c for c in curves(figure, "-") if c[0][0] != c[1][0]] == [[(0, 0.9), (1, 0.5)], [(0, 0.7), (1, 0.2)]]
    shown = texts(figure)
    assert {"penultimate", "logits", "eps 2/255", "eps 8/255", "net.pth\ndigits, ℓ∞"} <= set(shown)
    assert {"no head exceeds (certified)", "best head (measured)", "adversarial accuracy"} <= set(shown)
    assert any(
        TIER in text.replace("\n", " ") and "95% limit on the population" in text.replace("\n", " ") for text in shown
    )


def test_the_eps_profile_has_both_curves_for_every_layer(rows):
    figure = eps_profile(rows[::-1])
    near, far = 2 / 255, 8 / 255
    assert curves(figure, "--") == [[(near, 0.4), (far, 0.0)], [(near, 0.6), (far, 0.1)]]
    assert {"2/255", "8/255", "eps (pixel units)", "penultimate", "logits"} <= set(texts(figure))


def test_whiskers_reach_the_population_limit(rows):
    whiskers = [c for c in curves(layer_profile(rows[:2] + rows[2:3]), "-") if c[0][0] == c[1][0]]
    assert [(a[1], b[1]) for a, b in whiskers] == [(0.9, 1.0), (0.5, 0.6), (0.7, pytest.approx(0.8))]


def test_what_is_not_applicable_leaves_a_gap(rows):
    figure = layer_profile([row("stages", 2 / 255, None, 0.8, reason="not applicable: wide"), *rows])
    assert curves(figure, "--")[0] == [(0, 0.8), (1, 0.6), (2, 0.4)]
    assert [(1, 0.9), (2, 0.5)] in curves(figure, "-")
    bare = layer_profile([{**one, "best_head": None, "best_head_accuracy": None} for one in rows])
    assert curves(bare, "--") == []


def test_one_layer_or_one_eps_has_no_profile(rows):
    assert layer_profile(rows[:2]) is None
    assert eps_profile(rows[::2]) is None
    assert layer_profile([]) is eps_profile([]) is None


def test_a_panel_a_model(rows):
    both = [*rows, *({**one, "model": "other"} for one in rows)]
    assert len(layer_profile(both).axes) == 2


def test_files_are_whole_and_the_same_again(rows, tmp_path):
    paths = write_certificate_figures(rows, tmp_path / "rows.csv")
    assert [path.name for path in paths] == [
        "rows-layers.png", "rows-layers.svg", "rows-eps.png", "rows-eps.svg",
    ]  # fmt: skip
    with Image.open(paths[0]) as image:
        assert image.width == 1050
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_certificate_figures(rows, tmp_path / "rows.csv")] == before
    assert write_certificate_figures(rows[:1], tmp_path / "one.csv") == []


def test_rows_go_through_csv_and_json(rows, tmp_path):
    rows[0] |= {"flags": ["=1+1: weak"], "reason": "", "certified_bound": 1 / 3, "best_head": None}
    rows[1] |= {"certified_bound": None, "certified_bound_population": None}
    (tmp_path / "rows.csv").write_text(to_csv(rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    back = read_rows(tmp_path / "rows.csv")
    assert [one["certified_bound"] for one in back] == [1 / 3, None, 0.5, 0.2]
    assert [one["eps"] for one in back] == [one["eps"] for one in rows]
    assert (back[0]["delta_curve"], back[0]["heads"], back[0]["at_hubs"]) == ("0.01=0.3", "own=0; alf=0.6", "6; 3")
    assert back[0]["flags"] == "'=1+1: weak"
    assert read_rows(tmp_path / "rows.json") == rows
    assert texts(layer_profile(back)) == texts(layer_profile(read_rows(tmp_path / "rows.json")))
    assert tuple(next(csv.reader(StringIO(to_csv(rows))))) == COLUMNS


@pytest.mark.parametrize("text", ["[1, 2]", "[{}]", "a,b\n1,2\n", "[", "model,layer,norm,eps\nm,l,linf,x\n"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(IntegrityError, match="holds no rows of certificates"):
        read_rows(tmp_path / "rows")


def test_drawing_imports_no_torch():
    code = "import sys, reports.figures.certificate_figure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


LEDGER = {"proved": 0.25, "broken": 0.5, "undecided": 0.25, "kept_population": [0.125, 0.625]}


def spans(figure):
    """Return the vertical lines from one share to another, as (x, low, high)."""
    lines = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    return {(at[0][0], at[0][1], at[1][1]) for at in lines if len(at) == 2 and at[0][0] == at[1][0]}


def test_a_ledger_is_a_band_with_its_limits_on_the_population_also_of_a_single_layer(tmp_path):
    """Proved .25, broken .5: the band reaches from .25 to .5; read back from a file it is the same."""
    one = [row("logits", 2 / 255, 0.9, 0.45, **LEDGER)]
    figure = layer_profile(one)
    assert {(0.0, 0.25, 0.5), (0.0, 0.125, 0.625)} <= spans(figure)
    assert "network: proved to keep, not broken (certified)" in texts(figure)
    (tmp_path / "rows.csv").write_text(to_csv(one))
    assert spans(layer_profile(read_rows(tmp_path / "rows.csv"))) == spans(figure)
    assert [path.name for path in write_certificate_figures(one, tmp_path / "one.csv")] == [
        "one-layers.png", "one-layers.svg",
    ]  # fmt: skip


def test_without_a_ledger_there_is_no_band(rows):
    assert "network: proved to keep, not broken (certified)" not in texts(layer_profile(rows))
