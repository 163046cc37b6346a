"""Table 1 as a page: mean and standard deviation over seeds beside the paper's figures, and verdicts on its claims.

Imports no torch: everything is derived from the rows that `rvaudit reproduce table1` writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, sqrt
from pathlib import Path

import pandas as pd
from scipy.stats import t as student

from audit.errors import EnvironmentFault, IntegrityError
from audit.storage import write_atomically
from reports.text import format_eps, plain_text

NATURAL, PGD, AUDIT = "natural", "adversarial_pgd7", "adversarial_audit"
HEADS = {"mlp": "MLP head", "linear": "linear head"}
_COLUMNS = ("dataset", "scale", "seed", "row", "head", NATURAL, PGD, AUDIT, "images", "eps", "attack", "settings")
_NUMBERS = ("seed", NATURAL, PGD, AUDIT, "images", "eps")
_CONFIDENCE = 0.95

PAPER: dict[str, dict[str, tuple[float, float, float, float]]] = {
    "cifar10": {
        "standard g, standard h": (58.77, 0.22, 47.01, 0.15),
        "standard g, robust h": (29.75, 15.08, 22.79, 10.28),
        "worst-case g, standard h": (62.54, 14.06, 50.29, 10.98),
        "worst-case g, standard h, E.S. on test": (51.59, 27.53, 48.55, 13.52),
        "worst-case g, robust h": (52.34, 31.52, 43.55, 25.15),
        "supervised, standard": (86.33, 0.07, 86.36, 0.02),
        "supervised, robust": (70.71, 40.50, 72.44, 39.98),
    }
}
"""The paper's Table 1 in per cent: natural and adversarial with the MLP head, then with the linear one.

Source: Zhu, Zhang & Evans 2020, Table 1 (adversarial: PGD-7).
"""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: on one measure and head, one row of the table does better than another."""

    sentence: str
    measure: str
    better: str
    worse: str
    head: str = "mlp"


CLAIMS = (
    Claim(
        "Under a robust MLP head, a worst-case g keeps more adversarial accuracy than a standard g (PGD-7)",
        PGD, "worst-case g, robust h", "standard g, robust h",
    ),
    Claim(
        "The same under the audit's attack",
        AUDIT, "worst-case g, robust h", "standard g, robust h",
    ),
    Claim(
        "Under a standard MLP head, a worst-case g has more natural accuracy than a standard g",
        NATURAL, "worst-case g, standard h", "standard g, standard h",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Judgement:
    """The evidence on a claim: mean difference over seeds in points, its 95 % interval, and a verdict.

    `low` and `high` are None for a single seed, which says nothing of the spread; `verdict` is holds, reversed or
    undecided.
    """

    claim: Claim
    seeds: int
    difference: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """Return holds or reversed where the interval leaves zero out, else undecided."""
        if self.low is not None and self.low > 0:
            return "holds"
        return "reversed" if self.high is not None and self.high < 0 else "undecided"

    def __str__(self) -> str:
        spread = "one seed" if self.low is None else f"95 % [{self.low:+.2f}, {self.high:+.2f}], {self.seeds} seeds"
        return f"{self.claim.sentence}: **{self.verdict}** ({self.difference:+.1f} points; {spread})."


def read_table1(path: Path) -> pd.DataFrame:
    """Return the rows of a file; raises EnvironmentFault where it cannot be read, IntegrityError for other columns."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{path} cannot be read as rows of Table 1: {error}") from error
    missing = [name for name in _COLUMNS if name not in table]
    numeric = [name for name in _NUMBERS if name in table and not pd.api.types.is_numeric_dtype(table[name])]
    if missing or numeric:
        what = f"column {missing[0]} is not there" if missing else f"column {numeric[0]} holds text"
        raise IntegrityError(f"{path} holds no rows of Table 1: {what}")
    return table


def judged(rows: pd.DataFrame) -> list[Judgement]:
    """Return a judgement of every claim whose two table rows there are, by seeds that have both.

    Source of the interval: Student's t on the differences of seeds.
    """
    return [found for claim in CLAIMS if (found := _judged(rows, claim)) is not None]


def to_markdown(rows: pd.DataFrame) -> str:
    """Return the page: for each data set and scale a table in per cent, then the verdicts on the claims."""
    parts = []
    for (dataset, scale), own in rows.groupby(["dataset", "scale"], sort=False):
        parts.append(_section(str(dataset), str(scale), own))
    return "\n".join(parts)


def write_table1(source: Path, target: Path) -> Path:
    """Write the page of a file of rows and return its path."""
    write_atomically(target, to_markdown(read_table1(source)))
    return target


def _section(dataset: str, scale: str, rows: pd.DataFrame) -> str:
    paper = PAPER.get(dataset, {})
    seeds, images, eps = rows["seed"].nunique(), int(rows["images"].max()), float(rows["eps"].max())
    attacks = ", ".join(sorted({plain_text(str(name)) for name in rows["attack"]}))
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        f"## {plain_text(dataset)}, scale {plain_text(scale)}",
        "",
        f"Per cent of {images} test images, {over}; l-inf {format_eps(eps)}. "
        f"PGD-7: the paper's search, 7 steps of 0.32 eps from the clean image. Audit: attack tier {attacks}."
        + (" Paper: its CIFAR-10 figures, PGD-7." if paper else ""),
        "",
        *_table(rows, paper),
        "",
        *(f"- {judgement}" for judgement in judged(rows)),
        "",
    ]
    return "\n".join(lines)


def _table(rows: pd.DataFrame, paper: dict[str, tuple[float, float, float, float]]) -> list[str]:
    measures = {NATURAL: "natural", PGD: "PGD-7", AUDIT: "audit"}
    header = ["", *(f"{title}: {name}" for title in HEADS.values() for name in measures.values())]
    if paper:
        header += [f"paper, {title}" for title in HEADS.values()]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in dict.fromkeys(rows["row"]):
        cells = [_spread(_values(rows, name, head)[measure]) for head in HEADS for measure in measures]
        theirs = paper.get(name)
        pairs = [f"{theirs[i]:.2f} / {theirs[i + 1]:.2f}" if theirs else "" for i in (0, 2)] if paper else []
        lines.append([plain_text(str(name)), *cells, *pairs])
    return [f"| {' | '.join(line)} |" for line in lines]


def _values(rows: pd.DataFrame, row: str, head: str) -> pd.DataFrame:
    return rows[(rows["row"] == row) & (rows["head"] == head)].drop_duplicates("seed", keep="last").set_index("seed")


def _spread(values: "pd.Series[float]") -> str:
    if values.empty:
        return ""
    deviation = float(values.std()) * 100
    return f"{100 * values.mean():.1f}" + ("" if isnan(deviation) else f" ± {deviation:.1f}")


def _judged(rows: pd.DataFrame, claim: Claim) -> Judgement | None:
    better, worse = (_values(rows, row, claim.head)[claim.measure] for row in (claim.better, claim.worse))
    differences: Sequence[float] = list((100 * (better - worse)).dropna())
    if not differences:
        return None
    count, mean = len(differences), sum(differences) / len(differences)
    if count == 1:
        return Judgement(claim, 1, mean, None, None)
    error = sqrt(sum((each - mean) ** 2 for each in differences) / (count - 1) / count)
    half = float(student.ppf((1 + _CONFIDENCE) / 2, count - 1)) * error
    return Judgement(claim, count, mean, mean - half, mean + half)
