"""Load models and images onto one device, and check that they fit each other."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from audit.adversary.passes import outputs_of
from audit.errors import EnvironmentFault, MismatchError, UsageError
from audit.run.cell import Cell, InputRules
from audit.run.identity import cell_identity
from audit.run.intermediate import Memo
from audit.storage import digest
from audit.types import Images, Labels
from model_zoo.entries import ModelEntry
from model_zoo.fitting import applied, for_outputs
from model_zoo.images.classes import ClassMap
from model_zoo.images.datasets import (
    ImageRequest,
    ImageSet,
    check_fit,
    check_shape,
    load_at_most,
    load_images,
)
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.load import LoadedModel, SourceSettings, build_skeleton, load_model, locate
from model_zoo.lookup import WITH_TRAINING_SPLIT
from model_zoo.model_types import ChosenOutputs, LocatedModel
from model_zoo.relative import dataset_beside

MIN_IMAGES = 50  # fewer give errors too large for an audit to mean anything
_TRAINING_IMAGES = 1000  # that heads beside a certificate are trained on


@dataclass(frozen=True)
class RunOptions:
    """Sources, data folder and device of a run, and whether it keeps images: nothing here decides a number."""

    sources: SourceSettings = field(default_factory=SourceSettings)
    data_dir: Path = Path("data")
    device: str = "auto"
    keep_images: bool = False

    def request(self, count: int | None = None, split: str = "test", *, balanced: bool = False) -> ImageRequest:
        """Return the request for the first `count` images of a split, from these folders."""
        return ImageRequest(count, split, self.data_dir, self.sources.offline, balanced)


def device_of(name: str) -> torch.device:
    """Return the device of a name; `auto` is the GPU if there is one. Raises UsageError, EnvironmentFault."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; legal: auto, cpu, cuda, cuda:<number>, mps") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise EnvironmentFault(f"device {name!r} does not exist: this machine has {count} GPUs; use --device cpu")
    return device


def open_images(
    dataset: str, options: RunOptions, request: ImageRequest | None = None, *, at_most: bool = False
) -> ImageSet:
    """Load images as they are onto the device of the options; without a request all test images.

    With `at_most`, a data set with fewer images than requested gives all it has. Raises what `load_images` raises.
    """
    load = load_at_most if at_most else load_images
    found = load(dataset_beside(dataset, options.sources.base), request or options.request())
    return _on_device(found, device_of(options.device))


def open_images_for(
    ref: str,
    dataset: str,
    options: RunOptions,
    request: ImageRequest | None = None,
    rules: InputRules | None = None,
    *,
    at_most: bool = False,
) -> ImageSet:
    """Load images for a model onto the device: through its preprocessing, with labels that number its outputs.

    Raises what `open_images` and `locate` raise, and MismatchError for classes that the model's outputs do not tell.
    """
    rules, located = rules or InputRules(), locate(ref, options.sources)
    asked = replace(request or options.request(), preprocessing=_preprocessing(located, rules))
    images = open_images(dataset, options, asked, at_most=at_most)
    return for_outputs(images, located, options.sources, restrict=rules.restrict_classes)


def _preprocessing(model: LocatedModel | LoadedModel, rules: InputRules) -> Preprocessing | None:
    return model.preprocessing if rules.preprocess else None


def open_model(ref: str, images: ImageSet, options: RunOptions, min_images: int = MIN_IMAGES) -> LoadedModel:
    """Load a model onto the device of images, and check that both fit an audit.

    Raises what `load_model` and `check_inputs` raise.
    """
    model = _load(ref, options, images.images.device, images.class_map)
    check_inputs(model, images, min_images)
    return model


def open_representation(ref: str, images: ImageSet, options: RunOptions) -> LoadedModel:
    """Load a model, with or without a classifier, onto the device of images, and check that it takes them.

    Raises what `load_model` and `check_fit` raise.
    """
    model = _load(ref, options, images.images.device, images.class_map)
    if model.num_classes:
        check_fit(model, images)
    else:
        check_shape(model, images)
    return model


def check_inputs(model: LoadedModel, images: ImageSet, min_images: int = MIN_IMAGES) -> None:
    """Check that a model fits a set of images on its device; raises as `check_fit` and `check_network_inputs`."""
    check_fit(model, images)
    check_network_inputs(model.network, images.images, images.labels, min_images)


def check_network_inputs(network: nn.Module, images: Images, labels: Labels, min_images: int = MIN_IMAGES) -> None:
    """Check that a network takes images (N, C, H, W) in [0, 1] and returns logits (N, K) for their labels (N,).

    Raises MismatchError for other shapes, types and labels, UsageError for other pixels or too few images.
    """
    if images.dim() != 4 or not images.is_floating_point() or len(images) == 0:
        raise MismatchError(f"images are {_described(images)}, not floats of the shape (N, C, H, W)")
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise MismatchError(f"labels are {_described(labels)}, not int64 of the shape (N,)")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        message = f"images range from {low:.6g} to {high:.6g}, not within [0, 1]"
        raise UsageError(f"{message}: put the normalisation inside the network")
    if len(images) < min_images:
        raise UsageError(f"{len(images)} images are too few: an audit needs at least {min_images}")
    if len(images) != len(labels):
        raise MismatchError(f"{len(images)} images, but {len(labels)} labels")
    with torch.no_grad():
        outputs = outputs_of(network, images[:2])
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise MismatchError("the network does not return logits of the shape (N, K) for two or more classes")
    first, last = int(labels.min()), int(labels.max())
    if first < 0 or last >= outputs.shape[1]:
        raise MismatchError(f"labels range from {first} to {last}, but the network has {outputs.shape[1]} outputs")


@dataclass(frozen=True, eq=False)
class CellInputs:
    """A cell with the entry of its model, its images on the device, and its identity."""

    cell: Cell
    entry: ModelEntry
    images: ImageSet
    training: ImageSet | None
    identity: dict[str, Any]

    @property
    def cell_id(self) -> str:
        """The digest of the identity."""
        return digest(self.identity)


class InputCache:
    """Images and model entries that consecutive cells share; the last images of each kind stay loaded."""

    def __init__(self, options: RunOptions) -> None:
        self.options, self.device = options, device_of(options.device)
        self._images: Memo[tuple[str, int | None, Preprocessing | None], ImageSet] = Memo(slots=1)
        self._fitted: Memo[tuple[object, ...], ImageSet] = Memo(slots=1)
        self._training: Memo[tuple[str, Preprocessing | None], ImageSet | None] = Memo(slots=1)
        self._located: Memo[str, LocatedModel] = Memo()

    def open(self, cell: Cell) -> CellInputs:
        """Return the inputs of a cell but its network. Raises what images and model entries raise."""
        located, images = self._locate(cell.ref), self.images(cell)
        training = self.training_images(cell) if cell.settings.certificate else None
        sha256 = training.sha256 if training else None
        identity = cell_identity(cell, located.entry, images.sha256, sha256, applied(images))
        return CellInputs(cell, located.entry, images, training, identity)

    def images(self, cell: Cell) -> ImageSet:
        """Return the test images of a cell, on the device: preprocessed for its model, with labels of its outputs."""
        located = self._locate(cell.ref)
        chosen = _preprocessing(located, cell.rules)
        dataset = dataset_beside(cell.dataset, self.options.sources.base)
        key = (dataset, cell.images, chosen)
        request = replace(self.options.request(cell.images), preprocessing=chosen)
        outputs = (located.entry.name, located.num_classes, located.class_names, cell.rules.restrict_classes)

        def fit() -> ImageSet:
            found = self._images.get(key, lambda: _on_device(load_images(dataset, request), self.device))
            return for_outputs(found, located, self.options.sources, restrict=cell.rules.restrict_classes)

        return self._fitted.get((*key, *outputs), fit)

    def training_images(self, cell: Cell) -> ImageSet | None:
        """Return images to train heads on, on the device; None for a data set without a training split."""
        located = self._locate(cell.ref)
        chosen = _preprocessing(located, cell.rules)
        found = self._training.get((cell.dataset, chosen), lambda: self._load_training(cell.dataset, chosen))
        restrict = cell.rules.restrict_classes
        return for_outputs(found, located, self.options.sources, restrict=restrict) if found else None

    def entry(self, ref: str) -> ModelEntry:
        """Return the entry of a model, without its network."""
        return self._locate(ref).entry

    def model(self, ref: str, class_map: ClassMap | None = None) -> LoadedModel:
        """Load a model onto the device, reduced to the outputs of a restricted class map."""
        return _load(ref, self.options, self.device, class_map)

    def _locate(self, ref: str) -> LocatedModel:
        return self._located.get(ref, lambda: locate(ref, self.options.sources))

    def _load_training(self, dataset: str, chosen: Preprocessing | None) -> ImageSet | None:
        if dataset not in WITH_TRAINING_SPLIT:
            return None
        request = replace(self.options.request(_TRAINING_IMAGES, "train"), preprocessing=chosen)
        return _on_device(load_at_most(dataset, request), self.device)


def model_bytes(ref: str, dataset: str, options: RunOptions, batch: int = 256) -> int:
    """Return the memory in bytes of a model and one batch, estimated without reading weights; 0 if it is unavailable.

    The network is built on the meta device, where tensors take no memory. One that cannot be built or run there is
    built on the CPU with random weights.
    """
    for device in ("meta", "cpu"):
        try:
            network, shape = build_skeleton(ref, options.sources, device)
            size = shape or open_images(dataset, options, options.request(1)).images.shape[1:]
            return batch_bytes(network, torch.zeros(1, *size, device=device), batch)
        except Exception:  # a network of others may raise anything
            continue
    return 0


@torch.no_grad()
def batch_bytes(network: nn.Module, images: Images, batch: int) -> int:
    """Return a lower bound in bytes of the memory of one batch of images (N, C, H, W) with gradients.

    Counted are weights, images, and the outputs of all innermost modules with their gradients.
    """
    sizes: list[int] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(_bytes(output)))
        for module in network.modules()
        if not any(True for _ in module.children())
    ]
    try:
        network(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    weights = sum(_bytes(tensor) for tensor in network.state_dict().values())
    return weights + batch * (2 * sum(sizes) + 4 * _bytes(images[:1]))


def _load(ref: str, options: RunOptions, device: torch.device, class_map: ClassMap | None = None) -> LoadedModel:
    model = load_model(ref, options.sources)
    if class_map and class_map.restricted:
        network = ChosenOutputs(model.network, class_map.outputs).eval()
        model = replace(model, network=network, num_classes=len(class_map.outputs), class_names=())
    model.network.to(device)
    return model


def _on_device(images: ImageSet, device: torch.device) -> ImageSet:
    return replace(images, images=images.images.to(device), labels=images.labels.to(device))


def _bytes(output: object) -> int:
    return output.numel() * output.element_size() if isinstance(output, Tensor) else 0


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of the shape {tuple(tensor.shape)}"
