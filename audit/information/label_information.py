"""Estimator `label-information`: information about the label that a panel reads from clean and from moved features."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from audit.adversary.passes import deviations
from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.flags import FlagCode, flag
from audit.information.encoding import encode, encode_clean
from audit.information.estimator import (
    ATTACKED,
    CARRIED,
    CLEAN,
    COLD_START,
    EARLIER,
    Estimator,
    EstimatorInputs,
    FloorKind,
    MIEstimate,
    Vulnerability,
    WarmStart,
)
from audit.information.floors import empirical_entropy, few_a_class
from audit.information.probing.game import Found, ProbeGame
from audit.information.probing.learning_curve import Points, extrapolated, largest, learning_curves
from audit.information.probing.members import Readers, of_present_classes
from audit.information.probing.opponents import Field
from audit.information.probing.panel import Panel, Reading
from audit.information.probing.settings import LabelInformationSettings
from audit.types import Encoded, Images, Labels, empty_pixels, equal_pixels, image_slices

_TWO_SIDED = 1.959964  # normal quantile of a 95 % interval
_ENOUGH_A_CLASS = 20  # images


class _LayerReading(NamedTuple):
    """What a panel reads at one layer, its largest values by images, and the upper end of its interval in nats."""

    reading: Reading
    curve: Points
    upper: float


@dataclass(frozen=True)
class LabelInformation(LabelInformationSettings, Estimator):
    """Estimate of I(Y; g(X)) in nats by the best of several cross-fitted classifiers, each of which errs low.

    H(Y) - E[-ln q(Y | g(X))], the largest over a panel of classifiers q: linear, with one hidden layer, nearest
    neighbours, boosted trees, random forest, and the network's own output where the layer determines it. Each is fitted
    and calibrated on other folds than the one it is evaluated on. The value is between 0 and H(Y), at most ln K.
    Features are (N, D), labels (N,).

    The worst case is the smallest value that a repeated game between images and probes finds
    (`audit.information.probing.game`), from clean and from attacked images.

    `upper`, on which bounds rest, is the upper end of an interval: two standard errors above the largest value that a
    classifier has, or that its learning curve over a quarter, half and all of the images (`by_images`) tends to.
    Fewer than 20 images a class are flagged `too_few_images`: classifiers then read too little to state bounds or to
    rank by.

    Raises UsageError for a setting that is not legal and for fewer than two images a class; InvalidModelError if a
    feature or a gradient is not finite.

    Source: Barber & Agakov 2003, the variational bound H(Y) - E[-ln q]; Zhu, Zhang & Evans 2020, Definition 3.1, with
    the label in place of the image.
    """

    quantity: ClassVar[str] = "I(Y; g(X))"
    version: ClassVar[int] = 6
    reads_later_layers: ClassVar[bool] = True
    floor_kind: ClassVar[FloorKind] = "labels"

    def check_labels(self, labels: Labels) -> None:
        """Raise UsageError if labels (N,) have fewer than two images a class, so that nothing can be read of most."""
        few = few_a_class(labels)
        if few:
            message = f"{self.name} reads labels from features, and {few}"
            raise UsageError(f"{message}; use sandwich or mine, or more images a class")

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the label information of the clean images."""
        self.check_labels(inputs.labels)
        return self._estimate(inputs, inputs.images, seed)

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return both cases; the search compares candidates by a quicker panel than the reported value's."""
        normal, indices = warm_start.normal or self.normal(inputs, seed), torch.arange(len(inputs.images))
        if threat.eps == 0:
            return Vulnerability(normal, normal, inputs.images, indices, 0.5 * len(indices), CLEAN)
        clean = encode_clean(inputs, self.batch_size)
        inputs = inputs._replace(clean=clean)  # every reading below needs its scale
        game = self._game(inputs, clean, threat, seed)
        given = {CARRIED: warm_start.images, ATTACKED: warm_start.attacked, EARLIER: warm_start.earlier}
        starts = {each: _projected(images, inputs, threat) for each, images in given.items() if images is not None}
        found = game.search(of_present_classes(clean, inputs.labels), starts, warm_start.origin)
        # these are compared by the reported value too, so that neither the worst case is above the normal one, nor that
        # of a larger ball above that of a smaller one within it, nor that of a layer above that of an earlier one
        kept = {each: starts[each] for each in (CARRIED, EARLIER) if each in starts}
        candidates = {found.best.origin: found.best.images, **kept}
        read = {each: self._estimate(inputs, images, seed) for each, images in candidates.items() if each != CLEAN}
        candidates, read = {**candidates, CLEAN: inputs.images}, {**read, CLEAN: normal}
        origin = min(read, key=lambda each: read[each].nats)
        upper = min(each.upper for each in read.values() if each.upper is not None)
        flags = (*read[origin].flags, *self._search_flags(found))
        worst = replace(read[origin], validated=found.best.nats, history=found.curve, upper=upper, flags=flags)
        return Vulnerability(normal, worst, candidates[origin], indices, found.passes, origin)

    def read_worst(self, inputs: EstimatorInputs, images: Images, seed: int) -> MIEstimate:
        """Return the label information that the panel reads from perturbed images."""
        if equal_pixels(images, inputs.images):
            return self.normal(inputs, seed)
        return self._estimate(inputs, images, seed)

    def _game(self, inputs: EstimatorInputs, clean: Encoded, threat: ThreatModel, seed: int) -> ProbeGame:
        labels = inputs.labels.unique(return_inverse=True)[1]

        def encoder(images: Images) -> Encoded:
            return of_present_classes(inputs.encoder(images), inputs.labels)

        field = Field(encoder, inputs.images, labels, threat, self.batch_size)
        return ProbeGame(self, field, Panel(self._readers, unit=_unit(clean)), seed)

    @property
    def _readers(self) -> Readers:
        return Readers(self.panel, self.probes)

    def _estimate(self, inputs: EstimatorInputs, images: Images, seed: int) -> MIEstimate:
        """Return what is read at the layer and at later ones: what they tell of the labels, this layer tells too."""
        here = self._read(inputs, images, seed)
        later = {layer: self._read(given, images, seed) for layer, given in inputs.later.items()}
        best = max((here, *later.values()), key=lambda each: each.reading.nats)
        return MIEstimate(
            best.reading.nats,
            best.reading.stderr,
            len(inputs.labels),
            empirical_entropy(inputs.labels),
            best.reading.nats,
            {**here.reading.parts, **{f"at {layer}": each.reading.nats for layer, each in later.items()}},
            flags=_few_images_flags(inputs.labels),
            upper=max(each.upper for each in (here, *later.values())),
            accuracy=best.reading.accuracy,
            by_images=best.curve,
        )

    def _read(self, inputs: EstimatorInputs, images: Images, seed: int) -> _LayerReading:
        clean = encode_clean(inputs, self.batch_size)
        moved = not equal_pixels(images, inputs.images)
        encoded = encode(inputs.encoder, images, self.batch_size) if moved else clean
        panel = Panel(self._readers, unit=_unit(clean))
        reading, curves = panel.read(encoded, inputs.labels, seed), learning_curves(panel, encoded, inputs.labels, seed)
        upper = extrapolated(reading, curves) + _TWO_SIDED * reading.stderr
        return _LayerReading(reading, largest(curves), min(empirical_entropy(inputs.labels), upper))

    def _search_flags(self, found: Found) -> tuple[str, ...]:
        if found.converged:
            return ()
        particulars = f"the second half of the search lowered worst_nats by {found.slope:.3f} nats"
        return (flag(FlagCode.SEARCH_NOT_CONVERGED, particulars),)


def _projected(images: Images, inputs: EstimatorInputs, threat: ThreatModel) -> Images:
    legal = empty_pixels(images.shape, images)
    for part in image_slices(images):
        legal[part] = threat.project(images[part], inputs.images[part])
    return legal


def _few_images_flags(labels: Labels) -> tuple[str, ...]:
    """Return a flag if labels (N,) have so few images a class that classifiers read much too little."""
    classes = len(labels.unique())
    each = len(labels) / classes
    if each >= _ENOUGH_A_CLASS:
        return ()
    wanted = f"{_ENOUGH_A_CLASS * classes:,} images would be {_ENOUGH_A_CLASS} a class"
    return (flag(FlagCode.TOO_FEW_IMAGES, f"{each:.0f} images a class: {wanted}"),)


def _unit(clean: Encoded) -> Tensor:
    """Return the scale (D,) of clean features, by which features under attack are rounded."""
    return deviations(clean.features, correction=0)
