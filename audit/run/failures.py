"""Records of cells that could not be computed."""

from collections.abc import Sequence

from audit.adversary.attack_checks import Check
from audit.errors import AuditError, EnvironmentFault
from audit.records import AuditRecord
from audit.run.cell import Cell
from audit.run.identity import failure_id


def failure(cell: Cell, error: BaseException, checks: Sequence[Check] = ()) -> AuditRecord:
    """Return the record of a cell that could not be computed, with the reason and the sanity checks made before."""
    first = next(iter(str(error).splitlines()), "")
    reason = first if isinstance(error, AuditError) else f"{type(error).__name__}: {first}".removesuffix(": ")
    return AuditRecord(
        cell_id=failure_id(cell),
        model=cell.name or cell.ref,
        source=cell.ref.partition(":")[0],
        family="unknown",
        training="unknown",
        trained_eps=0.0,
        dataset=cell.dataset,
        layer=cell.layer,
        norm=cell.threat.norm,
        eps=cell.threat.eps,
        weights_sha256="unknown",
        estimator=cell.settings.estimator.name,
        attack=cell.settings.attack.name_in(cell.threat.norm),
        seeds=len(cell.settings.seeds),
        images=cell.images or 0,
        status="failed",
        reason=reason,
        checks=tuple(check._asdict() for check in checks),
        details={"error": type(error).__name__, "exit_code": getattr(error, "exit_code", 1)},
    )


def worker_failure(cell: Cell, ending: str) -> AuditRecord:
    """Return the record of a cell whose worker died more often than it is retried; `ending` is how it last died."""
    message = f"its worker died repeatedly, perhaps out of memory ({ending})"
    return failure(cell, EnvironmentFault(message))
