"""Studies: one module per table or figure of the papers; `recipes` train the networks they need.

May import: `run` and everything below it, `attribution`, `model_zoo`.
"""

from audit import exported

_EXPORTS = {
    "write_rows": "audit.studies.rows",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
