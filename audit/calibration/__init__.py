"""Calibration: estimators run on channels whose normal and worst-case information is known in closed form.

May import: the leaves of `audit`, `adversary`, `representation`, `information`.
"""

from audit import exported

_EXPORTS = {
    "CalibrationPlan": "audit.calibration.plans",
    "Channel": "audit.calibration.channels",
    "applicable_channels": "audit.calibration.calibrate",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
