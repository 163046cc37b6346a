"""Measurements: normal- and worst-case mutual information of a representation, and the accuracies beside them.

Names are loaded on first use, so that importing `audit.records` or the command line does not import torch.
"""

from importlib import import_module

_EXPORTS = {
    "audit_model": "audit.run.layer_audit",
    "AuditSettings": "audit.run.layer_audit",
    "AuditRecord": "audit.records",
    "ThreatModel": "audit.adversary.threat",
    "Linf": "audit.adversary.threat",
    "L2": "audit.adversary.threat",
    "L1": "audit.adversary.threat",
    "PGD": "audit.adversary.pgd",
    "Representation": "audit.representation.layers",
    "features_of_layers": "audit.representation.layers",
    "layer_names": "audit.representation.layers",
    "estimate_mi": "audit.information.critic_training",
    "estimate_vulnerability": "audit.information.critic_descent",
    "Adversary": "audit.information.critic_descent",
    "MIEstimate": "audit.information.critic_training",
    "max_adversarial_accuracy": "audit.theory",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'audit' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
