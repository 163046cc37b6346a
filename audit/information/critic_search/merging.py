"""First stage of the worst-case search of `mine`: images are moved to one class, or to the mean features."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from audit.adversary.passes import deviations, input_gradient
from audit.adversary.threat import ThreatModel
from audit.information.encoding import Splits, encode
from audit.information.estimator import WarmStart
from audit.information.feature_merging import BatchGradient, Descent, step_sizes
from audit.information.settings import WorstCaseSearch
from audit.types import Encoded, Encoder, Images

MERGED = "merged into"  # kind of origin; its value is the target class
LONGER = 4  # times the step of rounds
_TRIAL_CLASSES, _TRIAL_IMAGES = 10, 50
_TRIAL_ROUNDS = ((2, 4), (4, 1))  # steps of each round of a trial, and the number of classes left after it


class Adversary(NamedTuple):
    """A threat model, and the settings of the worst-case search inside it."""

    threat: ThreatModel
    search: WorstCaseSearch


@dataclass
class CountingEncoder:
    """An encoder that counts forward+backward passes of single images; a forward pass alone counts as half."""

    encoder: Encoder
    batch_size: int
    passes: float = field(default=0.0, init=False)

    def encode(self, images: Images) -> Encoded:
        """Return the encoding of images (N, C, H, W), without gradients."""
        self.passes += 0.5 * len(images)
        return encode(self.encoder, images, self.batch_size)


class MergeTarget(NamedTuple):
    """The class that images are moved to; without log-probabilities, the mean of the standardised features."""

    label: int | None
    mean: Tensor
    deviation: Tensor


@dataclass
class Merging:
    """Projected descent of all images towards one class, or without log-probabilities towards the mean features."""

    network: CountingEncoder
    clean: Splits
    adversary: Adversary
    warm_start: WarmStart

    def run(self, start: Splits, steps: int) -> Splits:
        """Return the images after `steps` steps towards the target, four times as large as later ones."""
        self.network.passes += steps * sum(map(len, self.clean))
        pairs = zip(start, self.clean, strict=True)
        return Splits(*(self._descend(images, clean, self.target, steps) for images, clean in pairs))

    @cached_property
    def target(self) -> MergeTarget:
        """The target of all images.

        The most frequent class among the warm start's predictions; else the class of another seed's worst case; else
        the one of the ten most likely classes that a trial reaches best.
        """
        clean = self.network.encode(self.clean.train)
        smallest = min(1e-12, 1e-6 * float(clean.features.abs().max())) or 1e-12
        mean, deviation = clean.features.mean(0), deviations(clean.features).clamp_min(smallest)
        classes = clean.log_probs.shape[1]
        if not classes:
            return MergeTarget(None, mean, deviation)
        images, origin = self.warm_start.images, self.warm_start.origin
        if images is not None:
            predicted = self.network.encode(images).log_probs.argmax(1)
            return MergeTarget(int(predicted.bincount().argmax()), mean, deviation)
        if origin is not None and origin.kind == MERGED and origin.value is not None:
            return MergeTarget(int(origin.value), mean, deviation)
        likely = clean.log_probs.mean(0).topk(min(_TRIAL_CLASSES, classes)).indices.tolist()
        return MergeTarget(self._most_reachable(likely, mean, deviation), mean, deviation)

    def _most_reachable(self, labels: list[int], mean: Tensor, deviation: Tensor) -> int:
        """Return the class that a few images reach best, in rounds that keep the best classes only."""
        clean = self.clean.train[:_TRIAL_IMAGES]
        moved = dict.fromkeys(labels, clean)
        for steps, left in _TRIAL_ROUNDS:
            self.network.passes += steps * len(moved) * len(clean)
            moved = {
                label: self._descend(images, clean, MergeTarget(label, mean, deviation), steps)
                for label, images in moved.items()
            }
            share = {
                label: float(self.network.encode(images).log_probs[:, label].exp().mean())
                for label, images in moved.items()
            }
            moved = {label: moved[label] for label in sorted(moved, key=lambda label: -share[label])[:left]}
        return next(iter(moved))

    def _descend(self, start: Images, clean: Images, target: MergeTarget, steps: int) -> Images:
        threat, search = self.adversary
        sizes = step_sizes(LONGER * threat.eps * search.relative_step, steps)

        def next_gradient() -> BatchGradient:
            return lambda images, _batch: _merge_gradient(self.network.encoder, images, target)

        return Descent(clean, threat, sizes, self.network.batch_size).run(start, next_gradient)


def _merge_gradient(encoder: Encoder, images: Images, target: MergeTarget) -> Tensor:
    leaf = images.detach().requires_grad_()
    encoded = encoder(leaf)
    if target.label is not None:
        distance = -encoded.log_probs[:, target.label].sum()
    else:
        distance = ((encoded.features - target.mean) / target.deviation).square().sum()
    return input_gradient(distance, leaf)
