"""The "Guess First" report: the paper's data, means over seeds, verdicts that need an attack that holds."""

from pathlib import Path

import pandas as pd
import pytest

from audit.errors import EnvironmentFault, IntegrityError, UnknownNameError
from reports.studies.guess_first import accuracy_figure, accuracy_table, masking, report_text, write_guess_first
from reports.studies.guess_first_claims import (
    BLACK,
    PAIRS,
    WHITE,
    claims_table,
    counts,
    decided,
    elimination,
    judge_all,
    sentence,
)
from reports.studies.guess_first_paper import PAPER, RECIPES, Line, published
from reports.studies.guess_first_rows import accuracy, over, read_rows

PGD = WHITE[0]
DOCS = Path(__file__).resolve().parents[3] / "docs" / "guess-first"


def row(recipe, seed, line, value, trusted=True, **others):
    plain = {"recipe": recipe, "seed": seed, "dataset": "mnist", "training": "2 epochs", "layer": "", "images": 2000,
             "verdict": "holds" if trusted else "too weak", "note": "", "excess": None, "rv": None, "rv_se": None,
             "accuracy_bound": None}  # fmt: skip
    return {**plain, **line._asdict(), "accuracy": value, "trusted": trusted, **others}


def table(figures, line=PGD, **others):
    """Rows with one accuracy a recipe and a hundredth of spread over three seeds."""
    rows = [row(recipe, seed, line, value + 0.01 * (seed - 1), **others)
            for recipe, value in figures.items() for seed in range(3)]  # fmt: skip
    return pd.DataFrame(rows)


def whole():
    """Rows of every line of the paper, its own figures a hundred images' noise away."""
    parts = [table({name: value / 100 for name, value in figures.items()}, line)
             for line, figures in PAPER["mnist"].items()]  # fmt: skip
    for line in WHITE:
        figures = PAPER["mnist"][line]
        parts.append(table({name: value / 100 for name, value in figures.items()}, line._replace(attack="adaptive")))
        parts.append(table(dict.fromkeys(RECIPES, 0.5), line._replace(attack="two-losses", eps=line.eps / 2)))
    sandwich = Line("sandwich", "white", "linf", 0.15)
    nats = [row(recipe, seed, sandwich, None, layer="logits", rv=1 + 0.1 * number, rv_se=0.01, accuracy_bound=0.8)
            for number, recipe in enumerate(RECIPES) for seed in range(3)]  # fmt: skip
    return pd.concat([*parts, pd.DataFrame(nats)], ignore_index=True)


def judged(rows, pair=("c-js-ie", "c-js"), line=PGD):
    (found,) = [each for each in judge_all(rows, [line]) if each.pair == pair]
    return found


def test_the_papers_figures_are_data():
    assert {name: len(lines) for name, lines in PAPER.items()} == {"mnist": 11, "fashion-mnist": 11}
    assert PAPER["mnist"][Line("pgd", "white", "linf", 0.3)]["c-js-ie"] == 50.0
    assert PAPER["mnist"][Line("clean", "none", "", 0.0)]["vib"] == 99.0
    assert PAPER["fashion-mnist"][Line("cw", "black", "l2", 2.0)]["c-dv-ie"] == 24.7
    assert published("digits") is PAPER["mnist"]
    with pytest.raises(UnknownNameError, match="did you mean 'mnist'"):
        published("mnists")


def test_means_and_standard_deviations_over_seeds():
    found = accuracy(table({"cnn": 0.5}), "cnn", PGD)
    assert found.over.mean == pytest.approx(0.5)
    assert found.over.deviation == pytest.approx(0.01)
    assert found.variance == pytest.approx(0.01**2 / 3 + 0.25 / 2000)
    assert accuracy(table({"cnn": 0.5}), "vib", PGD) is None
    assert over(pd.Series([0.25])).deviation != over(pd.Series([0.25])).deviation  # of one seed it is not known


def test_the_table_has_every_line_of_the_paper_with_its_figure_beside_ours():
    text = accuracy_table(whole())
    for line, figures in PAPER["mnist"].items():
        assert all(f"({value:.1f})" in text for value in figures.values()), line
    assert "69.8 ± 1.0 (69.8)" in text
    assert "†" not in text
    assert "| PGD white linf 0.15 | 4.4 ± 1.0 (4.4)" in text
    assert "adaptive white linf 0.3" in text
    assert "69.8 ± 1.0 † (69.8)" in accuracy_table(table({"c-js": 0.698}, trusted=False))
    assert "not measured (4.4)" in accuracy_table(table({"c-js": 0.698}))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [({"c-js-ie": 0.8, "c-js": 0.6}, "confirmed"), ({"c-js-ie": 0.6, "c-js": 0.8}, "refuted"),
     ({"c-js-ie": 0.7, "c-js": 0.69}, "undecided"), ({"c-js-ie": 0.7}, "undecided")],
)  # fmt: skip
def test_an_order_is_confirmed_or_refuted_beyond_two_standard_errors_only(ours, verdict):
    assert judged(table(ours)).verdict == verdict


def test_no_verdict_rests_on_an_attack_that_failed():
    high = table({"c-js-ie": 0.8}, trusted=False)
    low = table({"c-js": 0.6}, trusted=False)
    rest = {"high": table({"c-js-ie": 0.8}), "low": table({"c-js": 0.6})}
    assert judged(pd.concat([high, rest["low"]])).verdict == "undecided"
    assert "failed its checks" in judged(pd.concat([high, rest["low"]])).reason
    # the smaller figure may be an upper bound: the truth lies still further below
    assert judged(pd.concat([rest["high"], low])).verdict == "confirmed"
    one = rest["high"][rest["high"]["seed"] == 0]
    assert "one seed" in judged(pd.concat([one, rest["low"]])).reason


def test_equal_figures_of_the_paper_claim_nothing():
    rows = table({"c-js-ie": 0.8, "c-dv": 0.2, "c-dv-ie": 0.1, "cnn": 0.1}, Line("clean", "none", "", 0.0))
    line = Line("clean", "none", "", 0.0)
    assert judged(rows, ("c-dv-ie", "c-dv"), line).verdict == "undecided"


def test_where_nothing_is_left_nothing_is_ordered():
    rows = table({"c-js-ie": 0.005, "c-js": 0.0}).assign(accuracy=lambda all_: all_["accuracy"].clip(0, 0.009))
    assert judged(rows).reason == "next to nothing is left of either"
    assert "undecided: nothing left" in claims_table(judge_all(rows, [PGD]))


def test_the_papers_order_can_be_judged_by_the_adaptive_attack():
    rows = pd.concat([table({"c-js-ie": 0.8, "c-js": 0.6}),
                      table({"c-js-ie": 0.2, "c-js": 0.6}, PGD._replace(attack="adaptive"))])  # fmt: skip
    assert judged(rows).verdict == "confirmed"
    (again,) = [each for each in judge_all(rows, [PGD], "adaptive") if each.pair == ("c-js-ie", "c-js")]
    assert again.verdict == "refuted"
    assert again.paper == pytest.approx(8.2)
    assert again.ours == pytest.approx(-40)
    words = "adaptive white linf 0.15, C-JS-IE above C-JS: paper +8.2, ours -40.0 ± "
    assert sentence(again).startswith(words)
    assert decided([again, judged(table({"c-js-ie": 0.7}))]).startswith(f"- {words}")


def test_every_verdict_of_figures_like_the_papers_confirms_or_is_too_close():
    found = judge_all(whole(), (*WHITE, *BLACK))
    assert len(found) == 7 * len(PAIRS)
    assert not [each for each in found if each.verdict == "refuted"]
    assert sum(each.verdict == "confirmed" for each in found) > 50
    assert counts(found).startswith("Of 84 ordered pairs: ")
    assert claims_table(found).count("\n") == 2 + len(PAIRS)


def test_masking_is_told_from_checks_and_from_what_weaker_attacks_leave():
    def found(fgsm, pgd, trusted=True):
        excess = {"fgsm": fgsm, "pgd": pgd, "adaptive": None}
        return {name: accuracy(table({"c-js": 0.5}, trusted=trusted, excess=more), "c-js", PGD)
                for name, more in excess.items()}  # fmt: skip

    assert masking(found(0.3, 0.01)) == "no sign"
    told = masking(found(0.8, 0.25))
    assert "PGD leaves 25.0 points too much" in told
    assert "single steps leave 80 points too much" in told
    assert "too weak" in masking(found(0.3, 0.01, trusted=False))


def test_elimination_is_judged_by_its_error():
    rows = whole()
    told = elimination(rows)
    assert told == [
        "logits, 0.15: C-DV-IE 1.30, C-DV 1.10 nats: higher with elimination (+0.20 ± 0.01)",
        "logits, 0.15: C-JS-IE 1.40, C-JS 1.20 nats: higher with elimination (+0.20 ± 0.01)",
    ]
    rows.loc[(rows["recipe"] == "c-dv-ie") & rows["rv"].notna(), "rv"] = 1.11
    assert "undecided (+0.01 ± 0.01)" in elimination(rows)[0]
    rows.loc[(rows["recipe"] == "c-js") & rows["rv"].notna(), "trusted"] = False
    assert "undecided (an estimate is contradicted)" in elimination(rows)[1]


def test_the_figure_has_a_curve_a_model_and_hollow_marks_where_an_attack_failed():
    rows = whole()
    rows.loc[(rows["recipe"] == "c-js") & (rows["attack"] == "pgd") & (rows["access"] == "white"), "trusted"] = False
    axes = accuracy_figure(rows).axes
    assert len(axes) == 3
    curves = [line for line in axes[0].lines if len(line.get_xdata()) == 3]
    assert len(curves) == len(RECIPES)
    assert list(curves[0].get_xdata()) == [0, 0.15, 0.3]
    marks = [line for line in axes[0].lines if len(line.get_xdata()) == 1]
    assert sum(mark.get_markerfacecolor() == "white" for mark in marks) == 2


def test_rows_become_a_page_and_a_figure_beside_them(tmp_path):
    path = tmp_path / "mnist.csv"
    whole().to_csv(path, index=False)
    paths = write_guess_first(path)
    assert [each.name for each in paths] == ["mnist.md", "mnist.png", "mnist.svg"]
    text = paths[0].read_text()
    assert text == report_text(read_rows(path))
    for part in ("3 seeds; 2 epochs.", "### Gradient masking", "higher with elimination", "Theorem 3.4"):
        assert part in text
    first = paths[1].read_bytes()
    assert write_guess_first(path)[1].read_bytes() == first


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.csv")), ids=lambda path: path.stem)
def test_the_committed_page_is_made_of_its_rows(path):
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report_text(read_rows(path))


def test_what_holds_no_rows_is_refused(tmp_path):
    with pytest.raises(EnvironmentFault, match="reproduce guess-first"):
        read_rows(tmp_path / "none.csv")
    for name, content in (("other.csv", "a,b\n1,2\n"), ("empty.csv", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(IntegrityError, match="holds no rows"):
            read_rows(tmp_path / name)
