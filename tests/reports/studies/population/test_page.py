"""The verdict, page and figures of the study, from rows whose answer is known."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from audit.errors import EnvironmentFault, IntegrityError
from reports.studies.population.analysis import Design, SetAnalysis, Verdict, read_design, read_study_rows, verdict
from reports.studies.population.page import answer, draw, page

OUTCOMES = {"gap": {"sign": 1, "words": "gap"}, "adversarial": {"sign": -1, "words": "adversarial accuracy"}}
PREDICTORS = {
    "rv": {"robust": -1, "estimator": True, "words": "RV"},
    "rival": {"robust": -1, "estimator": False, "words": "a rival"},
    "natural": {"robust": 0, "estimator": False, "words": "natural accuracy"},
}
DESIGN = Design(
    {
        "outcomes": OUTCOMES,
        "predictors": PREDICTORS,
        "exclusion": {"natural_accuracy": 0.5},
        "statistics": {"shuffles": 300, "draws": 200, "seed": 0, "level": 0.05, "coverage": 0.9},
    }
)
FAMILIES = ("a", "b", "c", "d", "held")


def rows(rv, rival, seed=0):
    """Return networks whose vulnerability is random inside groups, and known to RV and to a rival by these weights."""
    draws, found = np.random.default_rng(seed), []
    for group in range(8):
        for family in FAMILIES:
            for number in range(2):
                truth, noise = draws.normal(), draws.normal(size=4)
                found.append({
                    "model": f"{family}-{group}-{number}", "family": family, "training": "robust",
                    "method": "adversarial", "multiple": 0.1 * group, "group": f"adversarial {group}",
                    "seed": number, "trained_eps": 0.01 * group, "held_back": family == "held", "dataset": "toy",
                    "eps": 0.05, "settings": "x", "rv": rv * truth + 0.3 * noise[0],
                    "rival": rival * truth + 0.6 * noise[1], "natural": 0.9 + 0.01 * noise[2],
                    "gap": 0.5 + 0.1 * truth, "adversarial": 0.4 - 0.1 * truth,
                })  # fmt: skip
    return pd.DataFrame(found)


def analysed(rv, rival, **more):
    return SetAnalysis("toy", rows(rv, rival, **more), DESIGN)


@pytest.mark.parametrize(
    ("rv", "rival", "word", "start"),
    [
        (
            1.0,
            0.5,
            "yes",
            "Yes: RV predicts robustness inside training groups, and beyond the best cheap rival (80 net",
        ),
        (0.0, 0.5, "no", "No: RV neither follows robustness inside training groups nor adds"),
    ],
)
def test_the_first_sentence_is_the_verdict(rv, rival, word, start):
    analysis = analysed(rv, rival)
    assert verdict([analysis], "rv").word == word
    text = page([analysis], DESIGN)
    assert text.startswith(f"# Does RV predict robustness?\n\n{start}")
    assert answer([analysis], DESIGN) in text
    assert "80 networks, 0 left out that have not learned; 64 for all choices" in text


def test_a_relation_that_the_rival_explains_is_no_yes():
    frame = rows(1.0, 0.0)
    frame["rival"] = frame["rv"]  # the same numbers: nothing is added
    analysis = SetAnalysis("toy", frame, DESIGN)
    found = verdict([analysis], "rv")
    assert (found.related, found.adds, found.word) == (2, 0, "mixed")
    assert answer([analysis], DESIGN).startswith(
        "In part: RV follows robustness inside training groups in 2 of 2 cases"
    )


def test_a_relation_of_the_wrong_sign_is_no_confirmation():
    assert verdict([analysed(-1.0, 0.0)], "rv").related == 0
    assert (Verdict(0, 0, 0).word, Verdict(2, 2, 2).word, Verdict(0, 1, 2).word) == ("open", "yes", "mixed")


def test_networks_held_back_and_untrained_enter_no_choice():
    frame = rows(1.0, 0.5)
    spoiled = frame.copy()
    held = spoiled["held_back"]
    spoiled.loc[held, "rv"] = 100.0
    spoiled.loc[held, "gap"] = 0.0
    one, other = (SetAnalysis("toy", each, DESIGN).found[0] for each in (frame, spoiled))
    assert (one.inside, one.added, one.overall) == (other.inside, other.added, other.overall)
    assert other.held_back.error > one.held_back.error
    untrained = frame.assign(natural=np.where(frame["family"] == "a", 0.2, frame["natural"]))
    analysis = SetAnalysis("toy", untrained, DESIGN)
    assert len(analysis.usable) == 64
    assert set(analysis.chosen["family"]) == {"b", "c", "d"}


def test_holm_counts_every_estimator_and_outcome():
    analysis = analysed(0.4, 0.5)
    raw = sorted(each.inside.p for each in analysis.found)
    assert sorted(each.corrected for each in analysis.found)[0] == pytest.approx(min(1.0, len(raw) * raw[0]))


def test_rows_become_a_page_and_figures(tmp_path):
    plan = """
[outcomes]
gap = { sign = 1, words = "gap" }
adversarial = { sign = -1, words = "adversarial accuracy" }
[predictors]
rv = { robust = -1, estimator = true, words = "RV" }
rival = { robust = -1, estimator = false, words = "a rival" }
natural = { robust = 0, estimator = false, words = "natural accuracy" }
[exclusion]
natural_accuracy = 0.5
[statistics]
shuffles = 50
draws = 50
seed = 0
level = 0.05
coverage = 0.9
"""
    assert draw(tmp_path) == []
    rows(1.0, 0.5).drop(columns="group").to_csv(tmp_path / "toy.csv", index=False)
    with pytest.raises(EnvironmentFault, match="the plan of the study lies beside its rows"):
        draw(tmp_path)
    (tmp_path / "plan.toml").write_text(plan)
    written = draw(tmp_path)
    assert [path.name for path in written] == ["study.md", "population.png", "forest.png"]
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in draw(tmp_path)] == before
    design = read_design(tmp_path / "plan.toml")
    assert read_study_rows(tmp_path / "toy.csv", design)["group"].iloc[0] == "adversarial 0"
    (tmp_path / "toy.csv").write_text("model,family\na,b\n")
    with pytest.raises(IntegrityError, match="lacks the columns training"):
        draw(tmp_path)
    (tmp_path / "plan.toml").write_text("[outcomes")
    with pytest.raises(IntegrityError, match="is no plan of a study"):
        draw(tmp_path)


def test_costly_estimators_are_judged_on_the_networks_that_they_measured():
    found = rows(1.0, 0.5)
    held = found["family"].isin(["a", "b"])
    found["rv_slow_logits"] = found["gap"].where(held)  # the outcome itself
    design = Design(
        DESIGN.values | {"subset": {"estimators": {"rv_slow_logits": "slow"}, "optional": {"rv_mine": "mine"}}}
    )
    analysis = SetAnalysis("toy", found, design)
    subset = analysis.subset
    assert len(subset.every) == held.sum()
    (slow,) = [each for each in subset.found if (each.estimator, each.outcome) == ("rv_slow_logits", "gap")]
    assert slow.inside.value == pytest.approx(1.0)
    assert slow.held_back is None
    told = page([analysis], design)
    assert "### Costly estimators, on the plan's subset" in told
    assert "| RV by slow at the logits | gap | 1.00" in told
    assert answer([analysis], design) == answer([SetAnalysis("toy", rows(1.0, 0.5), DESIGN)], DESIGN)
    assert "Costly" not in page([SetAnalysis("toy", rows(1.0, 0.5), DESIGN)], DESIGN)


def test_few_networks_leave_the_question_open(tmp_path):
    few = rows(1.0, 0.5).iloc[:3]
    assert not SetAnalysis("toy", few, DESIGN).enough
    assert answer([], DESIGN).startswith("Open: there are too few networks to tell")


ROOT = Path(__file__).resolve().parents[4]
STUDY = ROOT / "docs" / "study"


def test_the_committed_page_is_made_of_the_committed_rows(tmp_path):
    plan = (STUDY / "plan.toml").read_bytes()
    assert plan == (ROOT / "audit" / "studies" / "population" / "plan.toml").read_bytes()
    for name in ("plan.toml", "digits.csv", "mnist.csv"):
        (tmp_path / name).write_bytes((STUDY / name).read_bytes())
    design = read_design(tmp_path / "plan.toml")
    analyses = [
        SetAnalysis(name, read_study_rows(tmp_path / f"{name}.csv", design), design) for name in ("digits", "mnist")
    ]
    assert page(analyses, design) == (STUDY / "study.md").read_text(encoding="utf-8")
    assert sum(len(each.every) for each in analyses) >= 120
    # the page written by hand opens with the same verdict
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert " ".join(text.split("\n\n")[1].split()) == answer(analyses, design)
