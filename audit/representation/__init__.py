"""Representations: any named layer of a network as a function g of images, read through forward hooks.

May import: the leaves of `audit`, `adversary`.
"""

from audit import exported

_EXPORTS = {
    "Representation": "audit.representation.layers",
    "features_of_layers": "audit.representation.layers",
    "layer_names": "audit.representation.layers",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)
