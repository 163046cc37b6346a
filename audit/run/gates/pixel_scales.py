"""Whether a network wants its pixels at another scale: without a normalisation, with one, or with another one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.attack_checks import Check
from audit.adversary.check_rules import RULES
from audit.adversary.passes import Batches, outputs_of
from audit.types import Images, Labels, pixel_extremes

_SCALED = 200  # images evaluated at other scales
_BATCH = 250
_Scale = Callable[[Tensor], Tensor]


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, in pixel units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def apply(self, images: Images) -> Tensor:
        """Return normalised images."""
        mean, std = self._as_maps(images)
        return (images - mean) / std

    def undo(self, images: Tensor) -> Tensor:
        """Return what is normalised to these images."""
        mean, std = self._as_maps(images)
        return images * std + mean

    def fits(self, images: Images) -> bool:
        """Return whether the images have as many channels; one value goes with any number."""
        return len(self.mean) in (1, images.shape[1])

    def __str__(self) -> str:
        return "&".join(f"{name}={','.join(f'{value:.4g}' for value in getattr(self, name))}" for name in self._fields)

    def _as_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        one, other = (torch.tensor(values).view(1, -1, 1, 1).to(images) for values in self)
        return one, other


_CENTRED = Normalisation((0.5,), (0.5,))
_NORMALISATIONS = {
    "ImageNet's normalisation": Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "MNIST's normalisation": Normalisation((0.1307,), (0.3081,)),
    "CIFAR-10's normalisation": Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)),
}


class _Candidate(NamedTuple):
    """Another scale of the pixels, and what it means if more images are correct with it."""

    scale: _Scale
    reason: str


def pixel_scale(network: nn.Module, images: Images, labels: Labels, predictions: Tensor) -> Check:
    """Check the range of the pixels, and the accuracy with pixels at other scales.

    The first images (N, C, H, W) are shifted and stretched as a normalisation does, as undoing one does, and as
    replacing the network's own by another does; `predictions` (N,) are those without any change.
    """
    rule, (low, high) = RULES["pixel_scale"], pixel_extremes(images)
    if not (low >= 0 and high <= 1):  # also for NaN
        return rule.result(passed=False, reason=f"pixels range from {low:.3g} to {high:.3g}")
    some, wanted = images[:_SCALED], labels[:_SCALED]
    correct = int((predictions[:_SCALED] == wanted).sum())
    gains: dict[str, float] = {}
    for candidate in _candidates(network, some):
        logits = Batches(_BATCH).run(partial(_at_scale, network, candidate.scale), some)
        rescaled = int((logits.argmax(1) == wanted).sum())
        # guesses of a network that is never right are no sign that the scale fits
        fits = rescaled >= least_accuracy(logits.shape[1]) * len(some)
        gains.setdefault(candidate.reason, (rescaled - correct) / len(some) if fits else 0.0)
    best = max(gains, key=gains.__getitem__)
    passed = gains[best] <= rule.limit
    return rule.result(passed=passed, figure=max(0.0, gains[best]), reason="" if passed else f"more are correct {best}")


def least_accuracy(classes: int) -> float:
    """Return the accuracy that is clearly above guessing: twice chance, 6/5 of it for three classes or fewer."""
    return (2.0 if classes > 3 else 1.2) / classes


def _candidates(network: nn.Module, images: Images) -> Iterator[_Candidate]:
    known = {name: each for name, each in _NORMALISATIONS.items() if each.fits(images)}
    for name, scale in {"0 to 255": lambda pixels: pixels * 255, "-1 to 1": _CENTRED.apply}.items():
        yield _Candidate(scale, f"with pixels of {name}: set the mean and std of its training")
    for name, each in known.items():
        yield _Candidate(each.apply, f"with pixels of {name}: set the mean and std of its training")
    own = _own_normalisation(network, images)
    if own is not None:
        undone = f"without its normalisation by {own}: the network normalises its images itself, leave mean and std out"
        yield _Candidate(own.undo, undone)
    for name, each in {**known, "a normalisation to -1 to 1": _CENTRED}.items():
        yield _Candidate(each.undo, f"with {name} undone: the network normalises its images twice")
        if own is not None and (each is _CENTRED or len(each.mean) == images.shape[1]):
            replaced = f"with {name}, {each}, in place of its normalisation by {own}"
            yield _Candidate(partial(_replaced, own, each), replaced)


def _replaced(own: Normalisation, other: Normalisation, images: Images) -> Tensor:
    return own.undo(other.apply(images))


def _own_normalisation(network: nn.Module, images: Images) -> Normalisation | None:
    """Return the mean and std that the outermost part of a network with such tensors holds."""
    for part in network.modules():
        found = [getattr(part, name, None) for name in Normalisation._fields]
        if all(isinstance(each, Tensor) and each.is_floating_point() and each.numel() for each in found):
            mean, std = (tuple(each.detach().flatten().tolist()) for each in found if isinstance(each, Tensor))
            own = Normalisation(mean, std)
            if len(mean) == len(std) and own.fits(images):
                return own
    return None


def _at_scale(network: nn.Module, scale: _Scale, images: Images) -> Tensor:
    return outputs_of(network, scale(images))
