"""Runs: cells of a benchmark, their identity, the audit of each into one record, executors, locks and warm starts.

May import: every room of `audit` below it and `model_zoo`; not `studies`, `commands` or `reports`.
"""

from audit import exported

_EXPORTS = {
    "Cell": "audit.run.cell",
    "CellRunner": "audit.run.cell_runner",
    "LayerAudit": "audit.run.layer_audit",
    "RunOptions": "audit.run.loading",
    "audit_network": "audit.run.network_audit",
    "open_images": "audit.run.loading",
    "open_model": "audit.run.loading",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
