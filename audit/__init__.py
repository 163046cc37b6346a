"""Measurements: normal- and worst-case mutual information of a representation, and the accuracies beside them.

Names are loaded on first use, so that importing `audit.records` or the command line does not import torch.
"""

from importlib import import_module

_EXPORTS = {
    "audit_model": "audit.measurement",
    "AuditSettings": "audit.measurement",
    "AuditRecord": "audit.records",
    "ThreatModel": "audit.threat",
    "Linf": "audit.threat",
    "L2": "audit.threat",
    "L1": "audit.threat",
    "PGD": "audit.pgd",
    "Representation": "audit.representation",
    "features_of_layers": "audit.representation",
    "layer_names": "audit.representation",
    "estimate_mi": "audit.information",
    "estimate_vulnerability": "audit.vulnerability",
    "Adversary": "audit.vulnerability",
    "MIEstimate": "audit.information",
    "max_adversarial_accuracy": "audit.theory",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'audit' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
