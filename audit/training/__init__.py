"""Training: heads on a frozen layer, classifiers, and representations trained by (worst-case) mutual information.

May import: the leaves of `audit`, `adversary`, `representation`, `information`.
"""

from audit import exported

_EXPORTS = {
    "fit_head": "audit.training.heads",
    "train_adversarial_head": "audit.training.heads",
    "train_classifier": "audit.training.classifiers",
    "train_representation": "audit.training.mutual_information",
    "train_standard_heads": "audit.training.heads",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
