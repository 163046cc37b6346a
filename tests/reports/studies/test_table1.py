"""Table 1 as a page: means, the paper's figures, and claims judged by what seeds agree on."""

import pandas as pd
import pytest

from audit.errors import EnvironmentFault, IntegrityError
from reports.studies.table1 import CLAIMS, PAPER, judged, read_table1, to_markdown, write_table1

ROBUST = ("standard g, robust h", "worst-case g, robust h")
STANDARD = ("standard g, standard h", "worst-case g, standard h")


def row(name, seed, natural, pgd=0.1, audit=0.05, **changes):
    return {
        "dataset": "cifar10", "scale": "small", "seed": seed, "row": name, "head": "mlp", "natural": natural,
        "adversarial_pgd7": pgd, "adversarial_audit": audit, "images": 500, "eps": 8 / 255, "attack": "audit",
        "settings": "ab",
    } | changes  # fmt: skip


def table(better, worse, names=ROBUST):
    rows = [row(names[1], i, 0.5, value, value) for i, value in enumerate(better)]
    return pd.DataFrame(rows + [row(names[0], i, 0.5, value, value) for i, value in enumerate(worse)])


def test_mean_and_standard_deviation_stand_beside_the_papers_figures():
    page = to_markdown(table([0.30, 0.32, 0.34], [0.1, 0.1, 0.1]))
    assert (
        "| worst-case g, robust h | 50.0 ± 0.0 | 32.0 ± 2.0 | 32.0 ± 2.0 |  |  |  | 52.34 / 31.52 | 43.55 / 25.15 |"
        in page
    )
    assert "3 seeds; l-inf 8/255" in page
    assert "attack tier audit" in page


def test_one_seed_has_no_deviation_and_other_data_sets_no_figures_of_the_paper():
    rows = table([0.3], [0.1]).assign(dataset="digits", eps=0.2)
    page = to_markdown(rows)
    assert "| worst-case g, robust h | 50.0 | 30.0 | 30.0 |  |  |  |" in page
    assert "paper" not in page.partition("PGD-7: the paper's search")[2]
    assert "one seed; l-inf 0.2" in page


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ([0.30, 0.31, 0.32], [0.15, 0.16, 0.18], "holds"),
        ([0.15, 0.16, 0.18], [0.30, 0.31, 0.32], "reversed"),
        ([0.30, 0.10, 0.20], [0.15, 0.16, 0.17], "undecided"),
        ([0.30], [0.10], "undecided"),
    ],
)
def test_a_claim_holds_where_the_seeds_agree(better, worse, verdict):
    (first, second) = judged(table(better, worse))
    assert (first.verdict, second.verdict) == (verdict, verdict)
    assert first.difference == pytest.approx(100 * (sum(better) - sum(worse)) / len(better))
    assert f"**{verdict}**" in str(first)


def test_the_interval_is_students_on_the_differences_of_seeds():
    """Differences of 1, 2 and 3 points: mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.3027."""
    judgement = judged(table([0.11, 0.12, 0.13], [0.10, 0.10, 0.10]))[0]
    assert judgement.low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert judgement.high == pytest.approx(2 + 4.30265 / 3**0.5, abs=1e-4)


def test_seeds_are_compared_with_themselves_whatever_their_order():
    rows = table([0.11, 0.22, 0.33], [0.10, 0.20, 0.30])
    shuffled = rows.sample(frac=1, random_state=1)
    assert [str(each) for each in judged(shuffled)] == [str(each) for each in judged(rows)]
    alone = rows[(rows["row"] != ROBUST[0]) | (rows["seed"] == 2)]
    assert judged(alone)[0].seeds == 1


def test_natural_accuracy_is_judged_under_the_standard_head():
    rows = table([0.1] * 3, [0.1] * 3, STANDARD)
    rows.loc[rows["row"] == STANDARD[1], "natural"] = [0.62, 0.63, 0.64]
    (judgement,) = judged(rows)
    assert judgement.claim.measure == "natural"
    assert judgement.verdict == "holds"


def test_the_papers_own_figures_hold_its_claims():
    for claim in CLAIMS[::2]:
        place = 0 if claim.measure == "natural" else 1
        figures = PAPER["cifar10"]
        assert figures[claim.better][place] > figures[claim.worse][place]


def test_names_from_files_cannot_steer_the_page():
    page = to_markdown(table([0.3], [0.1]).assign(dataset="x\x1b[31m\nred"))
    assert "## x red, scale small" in page


def test_files_are_read_back_and_others_refused(tmp_path):
    path, rows = tmp_path / "rows.csv", table([0.3, 0.4], [0.1, 0.2])
    rows.to_csv(path, index=False)
    assert write_table1(path, tmp_path / "t.md").read_text() == to_markdown(rows)
    rows.drop(columns="eps").to_csv(path, index=False)
    with pytest.raises(IntegrityError, match="column eps is not there"):
        read_table1(path)
    rows.assign(natural="x").to_csv(path, index=False)
    with pytest.raises(IntegrityError, match="column natural holds text"):
        read_table1(path)
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        read_table1(tmp_path / "none.csv")


def test_the_columns_are_those_that_the_study_writes():
    from audit.studies.table1 import COLUMNS
    from reports.studies import table1

    assert table1._COLUMNS == COLUMNS
