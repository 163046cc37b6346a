"""Mutual information of a representation, in the normal and the worst case: estimators, searches, floors.

May import: the leaves of `audit`, `adversary`, `representation`.
"""

from audit import exported

_EXPORTS = {
    "ESTIMATORS": "audit.information.estimator",
    "Estimator": "audit.information.estimator",
    "LabelEntropy": "audit.information.label_entropy",
    "LabelInformation": "audit.information.label_information",
    "MIEstimate": "audit.information.estimator",
    "Mine": "audit.information.mine",
    "Reference": "audit.information.released.estimator",
    "Sandwich": "audit.information.sandwich",
    "Vulnerability": "audit.information.estimator",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
