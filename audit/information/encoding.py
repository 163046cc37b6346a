"""Encoded images: encoding in batches, seeded splits, and the entropy terms of predicted classes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.memory.counting import count_passes
from audit.adversary.memory.limit import allowed
from audit.errors import InvalidModelError, UsageError
from audit.information.estimator import EstimatorInputs
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, image_slices


class Splits(NamedTuple):
    """Disjoint sets of images (or indices): for training, for validation (early stopping), and held out."""

    train: Images
    validation: Images
    test: Images

    def map(self, function: Callable[[Tensor], Tensor]) -> "Splits":
        """Return the splits with a function applied to each."""
        return Splits(*(function(part) for part in self))


class EncodedSplits(NamedTuple):
    """The encodings of each of the `Splits`."""

    train: Encoded
    validation: Encoded
    test: Encoded


class Division(NamedTuple):
    """Another division of the images of `Splits` into parts of the same sizes: `order` (N,) numbers them through."""

    order: Tensor
    sizes: list[int]

    @classmethod
    def draw(cls, images: Splits, seed: int, number: int) -> "Division":
        """Return the random division of this number; number 0 is the given one."""
        sizes, device = [len(part) for part in images], images.train.device
        if number == 0:
            return cls(torch.arange(sum(sizes), device=device), sizes)
        generator = keyed_generator(seed, Purpose.CRITIC_SPLIT, number)
        return cls(torch.randperm(sum(sizes), generator=generator).to(device), sizes)

    def of(self, images: Splits) -> Splits:
        """Return images in this division."""
        return Splits(*torch.cat([*images])[self.order].split(self.sizes))

    def undone(self, images: Splits) -> Splits:
        """Return images of this division in the one that it was drawn from."""
        return Splits(*torch.cat([*images])[self.order.argsort()].split(self.sizes))

    def encoded(self, encoded: EncodedSplits) -> EncodedSplits:
        """Return encodings in this division."""
        parts = (self.of(Splits(*each)) for each in zip(*encoded, strict=True))
        return EncodedSplits(*(Encoded(*part) for part in zip(*parts, strict=True)))


def split_indices(count: int, seed: int, train: float = 0.5, validation: float = 0.2) -> Splits:
    """Return seeded, disjoint indices; raises UsageError if a part would hold fewer than ten images."""
    first, second = int(train * count), int((train + validation) * count)
    if min(first, second - first, count - second) < 10:
        raise UsageError(
            f"{count} images are too few: training, validation and held-out sets need 10 each, so 50 in all"
        )
    order = torch.randperm(count, generator=keyed_generator(seed, Purpose.CRITIC_SPLIT))
    return Splits(order[:first], order[first:second], order[second:])


def split_images(images: Images, seed: int, train: float = 0.5, validation: float = 0.2) -> Splits:
    """Return a seeded, disjoint split of images (N, C, H, W); errors as in `split_indices`."""
    parts = split_indices(len(images), seed, train, validation)
    return parts.map(lambda index: images[index.to(images.device)])


def encode(encoder: Encoder, images: Images, batch_size: int) -> Encoded:
    """Return the encoding of all images; raises InvalidModelError if a feature is not finite."""
    return _check_finite(_encode(encoder, images, batch_size))


@torch.no_grad()
def _encode(encoder: Encoder, images: Images, batch_size: int) -> Encoded:
    parts = []
    for batch in image_slices(images, allowed(batch_size)):
        parts.append(encoder(images[batch]))
        count_passes(len(images[batch]))
    return Encoded(*(torch.cat(each) for each in zip(*parts, strict=True)))


def encode_clean(inputs: EstimatorInputs, batch_size: int) -> Encoded:
    """Return the encoding of the clean images, cached or computed; errors as in `encode`."""
    if inputs.clean is None:
        return encode(inputs.encoder, inputs.images, batch_size)
    return _check_finite(inputs.clean)


def clean_features(inputs: EstimatorInputs, batch_size: int) -> Features:
    """Return the features (N, D) of the clean images, in which masked ones are infinite in every image.

    Errors as in `encode` for any other feature that is not finite.
    """
    clean = _encode(inputs.encoder, inputs.images, batch_size) if inputs.clean is None else inputs.clean
    masked = _masked(clean.features)
    _check_finite(clean._replace(features=clean.features[:, ~masked]) if bool(masked.any()) else clean)
    return clean.features


def _masked(features: Features) -> Tensor:
    """Return which features (D,) are masked: infinite, and equal in all images, as logits of classes left out."""
    return features.isinf().all(0) & (features == features[:1]).all(0)


def _check_finite(encoded: Encoded) -> Encoded:
    features = encoded.features
    bad = int((~features.isfinite()).any(1).sum())
    if bad:
        masked = _masked(features).nonzero()[:, 0].tolist()
        named = ", ".join(map(str, masked[:5])) + (", ..." if len(masked) > 5 else "")
        why = f": features {named} are infinite in all of them, as masked classes are" if masked else ""
        raise InvalidModelError(f"the representation is not finite for {bad} of {len(features)} images{why}")
    return encoded


def encode_splits(encoder: Encoder, images: Splits, batch_size: int) -> EncodedSplits:
    """Return the encoding of each split; errors as in `encode`."""
    return EncodedSplits(*(encode(encoder, part, batch_size) for part in images))


def label_surprise(log_probs: Tensor) -> Tensor:
    """Return -ln of the frequency of each image's predicted class (N,); the mean is their entropy H(argmax) in nats.

    `log_probs` is (N, K); with K = 0 the terms are zero.

    Source: the plug-in entropy estimate, which is biased downwards.
    """
    if log_probs.shape[1] == 0:
        return log_probs.new_zeros(len(log_probs))
    predicted = log_probs.argmax(1)
    return -(predicted.bincount()[predicted].to(log_probs) / len(predicted)).log()
