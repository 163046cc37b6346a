"""The stages of loading a model, shared by every source: settings, the located model, the loaded model."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs
import torch
from torch import Tensor, nn

from audit.errors import InvalidModelError, MismatchError
from model_zoo.entries import ModelEntry
from model_zoo.images.preprocessing import Preprocessing

ImageShape = tuple[int, int, int]


def default_cache() -> Path:
    """Return the folder of downloaded weights: RVAUDIT_CACHE, else the user's cache folder."""
    return Path(os.environ.get("RVAUDIT_CACHE") or platformdirs.user_cache_dir("rvaudit"))


@dataclass(frozen=True)
class SourceSettings:
    """Permissions and folders of model loading.

    `trust_code` allows `file:` references to run a Python factory; `offline` forbids network access; `model_dir` is a
    folder in RobustBench's layout (`<dataset>/<threat>/<id>.pt`), ./models by default; `base` is the folder of the file
    that names the references, in which relative paths are looked for that do not exist as they stand; folders of a
    tuple come first.
    """

    trust_code: bool = False
    offline: bool = False
    cache_dir: Path | None = None
    model_dir: Path | None = None
    base: Path | tuple[Path, ...] | None = None

    @property
    def cache(self) -> Path:
        """The folder of downloaded weights."""
        return self.cache_dir or default_cache()


@dataclass(frozen=True)
class LoadedModel:
    """A frozen network in eval mode that takes images in [0, 1] of shape (N, *image_shape).

    `image_shape` is None where a `file:` reference does not state it; `num_classes` is 0 for a network without a
    classifier. `preprocessing` is the resize and crop of its images, None where it is not known; `class_names` are
    the names of the outputs, () where they are not known.
    """

    network: nn.Module
    num_classes: int
    image_shape: ImageShape | None
    entry: ModelEntry
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LocatedModel:
    """A model whose files exist and are hashed: `build` returns the network with random weights.

    `build_single` builds it with one output for two classes, where it has such a form. `copy_weights` reads the files
    into the network and returns the notes on renames; `mean` and `std` are empty where
    the network normalises its images itself.
    """

    entry: ModelEntry
    build: Callable[[], nn.Module]
    copy_weights: Callable[[nn.Module], tuple[str, ...]]
    num_classes: int
    image_shape: ImageShape | None = None
    mean: tuple[float, ...] = field(default=())
    std: tuple[float, ...] = field(default=())
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    build_single: Callable[[], nn.Module] | None = None


class Normalized(nn.Module):
    """A network preceded by its normalisation: images (N, C, H, W) in [0, 1] -> network output."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's output for normalised images."""
        outputs: Tensor = self.network((images - self.mean) / self.std)
        return outputs


class ChosenOutputs(nn.Module):
    """A network reduced to some of its outputs: images (N, C, H, W) -> scores (N, len(outputs)) in their order."""

    outputs: Tensor

    def __init__(self, network: nn.Module, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's scores of the chosen outputs."""
        scores: Tensor = self.network(images)
        return scores[:, self.outputs]


def _described(outputs: object) -> str:
    """Return the type of an output that is no tensor, with the first keys of a mapping."""
    keys = f" with {', '.join(str(key) for key in list(outputs)[:6])}" if isinstance(outputs, Mapping) else ""
    return type(outputs).__name__ + keys


def check_outputs(network: nn.Module, num_classes: int, shape: ImageShape, name: str) -> None:
    """Check the output of a network for one blank image, on the network's device.

    Raises MismatchError where it does not accept images of this shape or does not return (1, num_classes) scores,
    InvalidModelError where the scores are not finite.
    """
    size = "x".join(map(str, shape))
    device = next((tensor.device for tensor in network.state_dict().values()), None)
    try:
        with torch.no_grad():
            scores = network(torch.zeros(1, *shape, device=device))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise MismatchError(f"{name} does not take images of shape {size}: {reason}") from error
    found = tuple(scores.shape) if isinstance(scores, Tensor) else _described(scores)
    if found != (1, num_classes):
        count = f"{found[1]} outputs" if isinstance(found, tuple) and len(found) == 2 else f"an output {found}"
        raise MismatchError(f"{name} has {count} for one image, but {num_classes} classes were expected")
    if not torch.isfinite(scores).all():
        raise InvalidModelError(f"{name} returns scores that are not finite for a blank image of shape {size}")
