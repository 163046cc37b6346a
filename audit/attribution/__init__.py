"""Attribution: information of single features, their receptive fields, and saliency maps of information.

May import: the leaves of `audit`, `adversary`, `representation`, `information`.
"""

from audit import exported

_EXPORTS = {
    "FeatureSettings": "audit.attribution.single_features",
    "audit_features": "audit.attribution.single_features",
    "feature_saliency": "audit.attribution.saliency",
    "layer_saliency": "audit.attribution.saliency",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
