"""Descent of images to where the densities of all classes are alike: the start of the game."""

from dataclasses import dataclass

from torch import Tensor

from audit.information.dependence import KernelDependence
from audit.information.probing.opponents import FieldDescent
from audit.types import Encoded

SHARPNESS = 2.0  # of the kernel


@dataclass(frozen=True)
class DensityDescent(FieldDescent):
    """Descent of images on max(0, ln p(y | z) - ln p(y)), where p rests on a density of each class among the others."""

    dependence: KernelDependence

    def prepare(self) -> None:
        """Estimate the densities from the features of the last pass."""
        self.dependence.renew()

    def value(self, encoded: Encoded, index: Tensor) -> Tensor:
        """Return the value (N,) of images with these indices, in nats."""
        labels = self.field.labels
        own, shares = labels[index], labels.bincount() / len(labels)
        weights = (own[:, None] == labels[self.dependence.known]) / shares[own][:, None]
        return self.dependence.told(encoded.features, index, weights).clamp_min(0)
