"""The adversary: threat models, attacks on a classifier's label, adversarial accuracy, and checks of the attacks.

May import: the leaves of `audit`.
"""

from audit import exported

_EXPORTS = {
    "AUDIT": "audit.adversary.label_attack",
    "L1": "audit.adversary.threat",
    "L2": "audit.adversary.threat",
    "LabelAttack": "audit.adversary.label_attack",
    "Linf": "audit.adversary.threat",
    "PGD": "audit.adversary.pgd",
    "TargetModel": "audit.adversary.robustness",
    "ThreatModel": "audit.adversary.threat",
    "evaluate_robustness": "audit.adversary.robustness",
    "measure_accuracy": "audit.adversary.accuracy",
    "minimise": "audit.adversary.pgd",
    "threat_model": "audit.adversary.threat",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
