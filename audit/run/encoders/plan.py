"""Which images the heads of an encoder are trained and measured on."""

from typing import NamedTuple

from torch import Tensor

from audit.types import Images, Labels


class Fold(NamedTuple):
    """Images (M, C, H, W) and labels (M,) to train a head on; indices (B,) of the audited images to measure it on."""

    images: Images
    labels: Labels
    measured: Tensor


class HeadPlan(NamedTuple):
    """How heads are trained and measured: `folds`, and `trained_on` in words; no fold, and the `reason`, if at all."""

    folds: tuple[Fold, ...]
    trained_on: str
    reason: str = ""
