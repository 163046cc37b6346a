"""A frozen layer in the precision of the images, with a float64 copy of the same network."""

import copy
from typing import NamedTuple

from torch import nn

from audit.types import FeatureMap


class DualPrecisionLayer(NamedTuple):
    """A layer in working precision (float32) and a float64 copy of the same network."""

    working: FeatureMap
    precise: FeatureMap

    @classmethod
    def of(cls, representation: nn.Module) -> "DualPrecisionLayer":
        """Return the layer of a representation, with its float64 copy."""
        return cls(representation, copy.deepcopy(representation).double())
