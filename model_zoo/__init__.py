"""The model zoo: models by reference, safe readers of weight files, and data sets.

`sources` locates weights, `weights` reads them, `architectures` holds networks of our own, `images` the data sets. May
import: the leaves of `audit`.
"""

from audit import exported

_EXPORTS = {
    "ImageRequest": "model_zoo.images.datasets",
    "list_models": "model_zoo.catalogue",
    "load_images": "model_zoo.images.datasets",
    "load_model": "model_zoo.load",
    "wrap": "model_zoo.wrapping",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    return exported(__name__, _EXPORTS, name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_EXPORTS})
