"""Probes as opponents of images: descent of images on what several probes read of their labels."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.passes import Batches, input_gradient
from audit.adversary.threat import ThreatModel
from audit.information.probing.members import Readers
from audit.information.probing.neighbours import NeighbourProbe
from audit.information.probing.probes import fit_hidden, fit_linear
from audit.types import Encoded, Encoder, Images, Labels, copied_pixels, empty_pixels, image_slices, is_large

Opponent = Callable[[Encoded], Tensor]
"""Maps the encoding of images to log-probabilities (N, K)."""

KINDS = ("linear", "hidden", "neighbours", "own")
"""The members of the panel that have gradients."""


def fit_opponent(kind: str, encoded: Encoded, labels: Labels, readers: Readers) -> Opponent:
    """Return an opponent of a kind, fitted on an encoding with labels 0 to K - 1."""
    features, classes = encoded.features, int(labels.max()) + 1
    if kind == "own":
        return lambda images: images.log_probs
    if kind == "neighbours":
        neighbours = NeighbourProbe(features, labels, classes, readers.panel)
        return lambda images: neighbours(images.features)
    probe = {"linear": fit_linear, "hidden": fit_hidden}[kind](features, labels, classes, readers.probes)
    return lambda images: probe(images.features).log_softmax(1)


class Field(NamedTuple):
    """Where images may move: the encoder, clean images (N, C, H, W), labels (N,) from 0 to K - 1, ball, batch size."""

    encoder: Encoder
    clean: Images
    labels: Labels
    threat: ThreatModel
    batch_size: int


@dataclass(frozen=True)
class FieldDescent(ABC):
    """Projected descent of images on a value that their encodings have."""

    field: Field

    @abstractmethod
    def value(self, encoded: Encoded, index: Tensor) -> Tensor:
        """Return the value (N,) of images with these indices (N,)."""

    def prepare(self) -> None:  # noqa: B027 - most descents need no preparation
        """Prepare a step of all images."""

    def run(self, start: Images, sizes: Sequence[float], share: Tensor | None = None) -> Images:
        """Return images (N, C, H, W) after projected steps of these sizes, of which each image takes a share (N,)."""
        clean, threat = self.field.clean, self.field.threat
        images, buffer = copied_pixels(start), empty_pixels(start.shape, start)
        # bounds take as much memory as the images: for many of them they are computed again in every step
        bounds = (clean,) if is_large(start) else threat.step_bounds(clean)
        index = torch.arange(len(start), device=start.device)
        batches = Batches(self.field.batch_size)
        for size in sizes:
            self.prepare()
            batches.run(partial(self._step, size), images, buffer, index, *bounds)
            if share is not None:
                # a ball is convex: part of the way from one legal image to another is legal, up to rounding
                shares = share.to(images)[:, None, None, None]
                for part in image_slices(images):
                    between = torch.lerp(images[part], buffer[part], shares[part])
                    buffer[part] = threat.project(between, clean[part])
            images, buffer = buffer, images
        return images

    def _step(self, size: float, images: Images, buffer: Images, index: Tensor, *bounds: Tensor) -> Tensor:
        if len(bounds) == 1:  # the clean images alone
            bounds = self.field.threat.step_bounds(bounds[0])
        leaf = images.detach().requires_grad_()
        gradient = input_gradient(self.value(self.field.encoder(leaf), index).sum(), leaf)
        self.field.threat.step_into(buffer, images, (gradient, size), *bounds)
        return index


@dataclass(frozen=True)
class MergeDescent(FieldDescent):
    """Descent of images on the squared distance of their features from the mean (D,) of the clean ones.

    Each feature is measured in clean standard deviations (D,), and constant ones are left out.
    """

    mean: Tensor
    deviation: Tensor

    def value(self, encoded: Encoded, index: Tensor) -> Tensor:  # noqa: ARG002
        """Return the squared distance (N,)."""
        varying = self.deviation > 0
        distances = (encoded.features - self.mean)[:, varying] / self.deviation[varying]
        return distances.square().sum(1)


@dataclass(frozen=True)
class ProbeDescent(FieldDescent):
    """Descent of images on the mean of max(0, ln p(y | z) - ln p(y)) over opponents.

    The hinge stops images where the posterior is the prior. Beyond that they would tell their class again, by being
    where it is unlikely.
    """

    opponents: Sequence[Opponent]
    hinge: bool = True

    def value(self, encoded: Encoded, index: Tensor) -> Tensor:
        """Return the value (N,) of images with these indices, in nats."""
        labels = self.field.labels
        shares = labels.bincount()[labels[index]].to(encoded.features) / len(labels)
        told = [opponent(encoded).gather(1, labels[index][:, None])[:, 0] - shares.log() for opponent in self.opponents]
        return torch.stack([each.clamp_min(0) if self.hinge else each for each in told]).mean(0)
