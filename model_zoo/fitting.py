"""Images and labels of a data set as one model receives them: its preprocessing, and the numbers of its outputs."""

from typing import Any

from audit.errors import MismatchError
from model_zoo.images.classes import Outputs
from model_zoo.images.datasets import ImageSet, check_shape, with_outputs
from model_zoo.model_types import LoadedModel, LocatedModel, SourceSettings


def for_outputs(
    images: ImageSet, model: LocatedModel | LoadedModel, sources: SourceSettings, *, restrict: bool
) -> ImageSet:
    """Return images with labels that number a model's outputs; as they are for a model without a classifier.

    With `restrict` the labels keep the data set's numbers, for a network reduced to these outputs. Raises
    MismatchError for classes that the outputs do not tell, and before that what loading the model and `check_shape`
    raise: the model's reference may state a wrong number of outputs, or the data set may be for another model.
    """
    if model.num_classes == 0:
        return images
    outputs = Outputs(model.entry.name, model.num_classes, model.class_names)
    try:
        return with_outputs(images, outputs, restrict=restrict)
    except MismatchError:
        from model_zoo.load import load_model  # after the readers of images, which do not need it

        check_shape(load_model(model.entry.ref, sources), images)
        raise


def applied(images: ImageSet) -> dict[str, Any]:
    """Return what a cell's identity states of its images and outputs; nothing where they are taken as they are."""
    found: dict[str, Any] = {"preprocessing": images.preprocessing.described()} if images.preprocessing else {}
    if images.class_map and images.class_map.restricted:
        found["competing_outputs"] = list(images.class_map.outputs)
    return found
