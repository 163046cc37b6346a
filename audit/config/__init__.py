"""Configuration: benchmark files in YAML, their sections and legal values, and the settings of an audit.

May import: the leaves of `audit`, `adversary`, `representation`, `information`.
"""

from audit import exported

_EXPORTS = {
    "AuditSettings": "audit.config.settings",
    "BenchmarkConfig": "audit.config.benchmark",
    "read_config": "audit.config.yaml_source",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
