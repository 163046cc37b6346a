"""Attack checks and sanity checks of records as rows of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit.records import AuditRecord
from reports.page.cells import MISSING
from reports.text import plain_text

_OUTCOMES = {True: "passed", False: "failed", None: "does not apply"}


@dataclass(frozen=True)
class CheckRow:
    """One check: identifier (number in older records), name, level, outcome, measured value and criterion."""

    id: str
    name: str
    level: str
    outcome: str
    figure: str
    criterion: str


def check_rows(records: Iterable[AuditRecord]) -> list[Sequence[CheckRow]]:
    """Return the checks of records, a list for each attack: estimators share the checks of one attack."""
    told = dict.fromkeys(tuple(map(_check, record.checks)) for record in records if record.checks)
    return list(told)


def _check(check: Mapping[str, Any]) -> CheckRow:
    figure, why = check.get("figure"), plain_text(str(check.get("reason") or ""))
    criterion = plain_text(str(check.get("criterion", "")))
    return CheckRow(
        id=plain_text(str(check.get("id", check.get("number", "")))),
        name=plain_text(str(check.get("name", ""))),
        level=plain_text(str(check.get("level", ""))),
        outcome=_OUTCOMES.get(check.get("passed"), "unknown"),
        figure=f"{figure:.4g}" if isinstance(figure, int | float) else MISSING,
        criterion=f"{criterion}: {why}" if why else criterion,
    )
