"""The inputs of a cell, and whether networks and images fit each other: shapes, types, pixels, labels, numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audit.adversary.memory.stages import stage
from audit.adversary.passes import outputs_of
from audit.errors import MismatchError, UsageError
from audit.run.cell import Cell
from audit.storage import digest
from audit.types import Images, Labels, pixel_extremes
from model_zoo.entries import ModelEntry
from model_zoo.images.datasets import ImageSet, check_fit, check_shape
from model_zoo.model_types import LoadedModel

MIN_IMAGES = 50  # fewer give errors too large for an audit to mean anything


@dataclass(frozen=True, eq=False)
class CellInputs:
    """A cell with the entry of its model, its images on the device, and its identity.

    `others` are images to train the heads of an encoder on.
    """

    cell: Cell
    entry: ModelEntry
    images: ImageSet
    training: ImageSet | None
    identity: dict[str, Any]
    others: ImageSet | None = None

    @property
    def cell_id(self) -> str:
        """The digest of the identity."""
        return digest(self.identity)


@stage("gates")
def check_inputs(model: LoadedModel, images: ImageSet, min_images: int = MIN_IMAGES) -> None:
    """Check that a model, with or without a classifier, fits a set of images on its device.

    Raises as `check_fit` and `check_network_inputs`; for an encoder as `check_shape` and `check_encoder_inputs`.
    """
    if model.num_classes:
        check_fit(model, images)
        check_network_inputs(model.network, images.images, images.labels, min_images)
    else:
        check_shape(model, images)
        check_encoder_inputs(model.network, images.images, images.labels, min_images)


def check_network_inputs(network: nn.Module, images: Images, labels: Labels, min_images: int = MIN_IMAGES) -> None:
    """Check that a network takes images (N, C, H, W) in [0, 1] and returns logits (N, K) for their labels (N,).

    Raises MismatchError for other shapes, types and labels, UsageError for other pixels or too few images.
    """
    _check_images(images, labels, min_images)
    with torch.no_grad():
        outputs = outputs_of(network, images[:2])
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise MismatchError("the network does not return logits of the shape (N, K) for two or more classes")
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or last >= outputs.shape[1]:
        raise MismatchError(f"labels range from {first} to {last}, but the network has {outputs.shape[1]} outputs")


def check_encoder_inputs(network: nn.Module, images: Images, labels: Labels, min_images: int = MIN_IMAGES) -> None:
    """Check that an encoder takes images (N, C, H, W) in [0, 1] and returns features (N, ...), one row an image.

    Raises MismatchError for other shapes and types, UsageError for other pixels or too few images.
    """
    _check_images(images, labels, min_images)
    with torch.no_grad():
        features = outputs_of(network, images[:2])
    if not isinstance(features, Tensor) or not features.is_floating_point() or features.dim() < 2:
        found = _described(features) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise MismatchError(f"the encoder returns {found}, not features of the shape (N, D) or (N, ...)")
    if len(features) != len(images[:2]):
        raise MismatchError(f"the encoder returns {_described(features)} for {len(images[:2])} images: one row each")


def _check_images(images: Images, labels: Labels, min_images: int) -> None:
    if images.dim() != 4 or not images.is_floating_point() or len(images) == 0:
        raise MismatchError(f"images are {_described(images)}, not floats of the shape (N, C, H, W)")
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise MismatchError(f"labels are {_described(labels)}, not int64 of the shape (N,)")
    low, high = pixel_extremes(images)
    if not (low >= 0 and high <= 1):
        message = f"images range from {low:.6g} to {high:.6g}, not within [0, 1]"
        raise UsageError(f"{message}: put the normalisation inside the network: rvaudit.wrap(model, mean, std)")
    if len(images) < min_images:
        raise UsageError(f"{len(images)} images are too few: an audit needs at least {min_images}")
    if len(images) != len(labels):
        raise MismatchError(f"{len(images)} images, but {len(labels)} labels")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of the shape {tuple(tensor.shape)}"
