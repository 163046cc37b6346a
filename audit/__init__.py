"""Audit representations: mutual information in the normal and the worst case, accuracies, certificates.

Public names are imported on first use, so that importing `audit.records` or the command line does not import torch.
"""

from collections.abc import Mapping
from importlib import import_module

_EXPORTS = {
    "AUDIT": "audit.adversary.label_attack",
    "AuditRecord": "audit.records",
    "AuditRecords": "audit.commands.python.records",
    "AuditSettings": "audit.config.settings",
    "AuditStage": "audit.commands.python.watching",
    "ESTIMATORS": "audit.information.estimator",
    "L1": "audit.adversary.threat",
    "L2": "audit.adversary.threat",
    "LabelAttack": "audit.adversary.label_attack",
    "LabelEntropy": "audit.information.label_entropy",
    "LabelInformation": "audit.information.label_information",
    "Linf": "audit.adversary.threat",
    "MIEstimate": "audit.information.estimator",
    "Mine": "audit.information.mine",
    "PGD": "audit.adversary.pgd",
    "Representation": "audit.representation.layers",
    "Sandwich": "audit.information.sandwich",
    "TargetModel": "audit.adversary.robustness",
    "ThreatModel": "audit.adversary.threat",
    "Vulnerability": "audit.information.estimator",
    "audit_model": "audit.commands.python.audit",
    "certify": "audit.certificate.certificate",
    "evaluate_robustness": "audit.adversary.robustness",
    "features_of_layers": "audit.representation.layers",
    "layer_names": "audit.representation.layers",
    "train_adversarial_head": "audit.training.heads",
    "train_classifier": "audit.training.classifiers",
    "train_representation": "audit.training.mutual_information",
    "train_standard_heads": "audit.training.heads",
    "verify_witness": "audit.certificate.witness",
}

__all__ = sorted(_EXPORTS)


def exported(package: str, exports: Mapping[str, str], name: str) -> object:
    """Import a public name of a package, from its module or `module:attribute`; raises AttributeError for others."""
    if name not in exports:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module, _, attribute = exports[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_EXPORTS})
