"""Starts of the repeated game: images pushed past a probe, images whose classes are mixed, images that are merged."""

from collections.abc import Collection
from typing import NamedTuple

from audit.adversary.passes import deviations
from audit.information.dependence import KernelDependence
from audit.information.estimator import Origin
from audit.information.probing.densities import SHARPNESS, DensityDescent
from audit.information.probing.opponents import Field, FieldDescent, MergeDescent, ProbeDescent, fit_opponent
from audit.information.probing.positions import Position, PositionReader
from audit.information.probing.settings import LabelInformationSettings
from audit.types import Encoded

PUSHED, MIXED, MERGED = Origin("pushed"), Origin("mixed"), Origin("merged")
_MIXING_STEPS = 30
_SLOWING = 0.15  # the first step of round r is 1 / (1 + 0.15 r) of the first round's


def round_sizes(settings: LabelInformationSettings, eps: float, number: int = 0, steps: int = 0) -> list[float]:
    """Return the step sizes of the round of this number in pixel units: `steps` of them, by default as in a round."""
    first, steps = eps * settings.relative_step / (1 + _SLOWING * number), steps or settings.steps
    return [first * (1 - 0.9 * step / max(1, steps - 1)) for step in range(steps)]


def nothing_left(settings: LabelInformationSettings, *nats: float) -> bool:
    """Return whether the least of these values leaves nothing to search for."""
    return min(nats) <= settings.gain / 2


class OwnStarts(NamedTuple):
    """The starts that a search finds itself, from clean images and their encoding."""

    settings: LabelInformationSettings
    field: Field
    reader: PositionReader

    def find(self, clean: Encoded, kinds: Collection[Origin], best: Position) -> dict[Origin, Position]:
        """Return the starts of these kinds by their origin, as far as there is something left to search for."""
        found = dict[Origin, Position]()
        for origin, start in ((PUSHED, self.pushed), (MIXED, self.mixed), (MERGED, self.merged)):
            if origin in kinds and not nothing_left(self.settings, best.nats, *(each.nats for each in found.values())):
                found[origin] = start(clean)
        return found

    def pushed(self, clean: Encoded) -> Position:
        """Return images pushed past the boundaries of a linear probe."""
        probe = fit_opponent("linear", clean, self.field.labels, self.reader.panel.readers)
        return self._at(ProbeDescent(self.field, [probe], hinge=False), PUSHED)

    def mixed(self, clean: Encoded) -> Position:
        """Return images moved to where densities of the classes, which move with them, are alike."""
        components = self.reader.panel.readers.panel.components
        dependence = KernelDependence(clean.features.clone(), SHARPNESS, components)
        return self._at(DensityDescent(self.field, dependence), MIXED, _MIXING_STEPS)

    def merged(self, clean: Encoded) -> Position:
        """Return images whose features were moved towards the mean of the clean ones."""
        features = clean.features
        return self._at(MergeDescent(self.field, features.mean(0), deviations(features, correction=0)), MERGED)

    def _at(self, descent: FieldDescent, origin: Origin, steps: int = 0) -> Position:
        sizes = round_sizes(self.settings, self.field.threat.eps, steps=steps)
        return self.reader.at(self.reader.moved(descent, self.field.clean, sizes), origin)
