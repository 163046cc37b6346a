"""One name for the three packages: the public names of `audit`, `model_zoo` and `reports`, imported on first use.

`python -m rvaudit` is the command `rvaudit`.
"""

import sys
from importlib import import_module
from importlib.metadata import version

import audit
import model_zoo
import reports

_HOMES = {name: package.__name__ for package in (reports, model_zoo, audit) for name in package.__all__}

__version__ = version("rvaudit")
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Import a public name of one of the packages on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted({*globals(), *_HOMES})


if __name__ == "__main__":
    from reports.cli import main

    sys.exit(main())
