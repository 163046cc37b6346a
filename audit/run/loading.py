"""Load models and images onto one device, and check that they fit each other."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from audit.adversary.memory.batch_size import fitting_batch, fitting_batches
from audit.adversary.memory.limit import fixed_batches
from audit.adversary.memory.stages import stage
from audit.errors import EnvironmentFault, UsageError
from audit.representation.headless import Headless
from audit.run.cell import Cell, InputRules
from audit.run.encoders.head_images import heads_identity, images_after
from audit.run.gates.inputs import MIN_IMAGES, CellInputs, check_inputs
from audit.run.identity import cell_identity
from audit.run.intermediate import Memo
from audit.storage import scratch_in
from audit.types import Images
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

BATCH = 256  # images in one pass, where memory allows
_TRAINING_IMAGES = 1000  # that heads beside a certificate are trained on


@dataclass(frozen=True)
class RunOptions:
    """Sources, data folder, device and batches of a run, and whether it keeps images: nothing here decides a number.

    Without a `batch_size`, batches are as large as memory allows.
    """

    sources: SourceSettings = field(default_factory=SourceSettings)
    data_dir: Path = Path("data")
    device: str = "auto"
    keep_images: bool = False
    batch_size: int | None = None

    def request(self, count: int | None = None, split: str = "test", *, balanced: bool = False) -> ImageRequest:
        """Return the request for the first `count` images of a split, from these folders."""
        return ImageRequest(count, split, self.data_dir, self.sources.offline, balanced)


def batches_for(network: nn.Module, images: Images, options: RunOptions) -> AbstractContextManager[None]:
    """Return a context in which networks take the batches that the options ask for, or that fit these images."""
    return fixed_batches(options.batch_size) if options.batch_size else fitting_batches(network, images)


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
    asked = request or options.request()
    asked = replace(asked, preprocessing=_preprocessing(located, rules), balanced=asked.balanced or rules.balanced)
    images = open_images(dataset, options, asked, at_most=at_most)
    return for_outputs(images, located, options.sources, restrict=rules.restrict_classes)


def _preprocessing(model: LocatedModel | LoadedModel, rules: InputRules) -> Preprocessing | None:
    return model.preprocessing if rules.preprocess else None


def open_model(ref: str, images: ImageSet, options: RunOptions, min_images: int = MIN_IMAGES) -> LoadedModel:
    """Load a classifier onto the device of images, and check that both fit an audit.

    Raises what `load_model`, `check_fit` and `check_inputs` raise.
    """
    model = _load(ref, options, images.images.device, images.class_map)
    check_fit(model, images)
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


class InputCache:
    """Images and model entries that consecutive cells share; the last images of each kind stay loaded."""

    def __init__(self, options: RunOptions, scratch: Path | None = None) -> None:
        self.options, self.device, self.scratch = options, device_of(options.device), scratch
        self._images: Memo[tuple[str, int | None, Preprocessing | None, bool], ImageSet] = Memo(slots=1)
        self._fitted: Memo[tuple[object, ...], ImageSet] = Memo(slots=1)
        self._training: Memo[tuple[str, Preprocessing | None], ImageSet | None] = Memo(slots=1)
        self._following: Memo[tuple[str, int, Preprocessing | None], ImageSet | None] = Memo(slots=1)
        self._located: Memo[str, LocatedModel] = Memo()

    @stage("loading")
    def open(self, cell: Cell) -> CellInputs:
        """Return the inputs of a cell but its network. Raises what images and model entries raise."""
        located, images = self._locate(cell.ref), self.images(cell)
        training = self.training_images(cell) if cell.settings.certificate else None
        sha256 = training.sha256 if training else None
        how, others = applied(images), None if located.num_classes else self.other_images(cell)
        if located.num_classes == 0:
            how["heads"] = heads_identity(others.sha256 if others else "")
        identity = cell_identity(cell, located.entry, images.sha256, sha256, how)
        return CellInputs(cell, located.entry, images, training, identity, others)

    def images(self, cell: Cell) -> ImageSet:
        """Return the test images of a cell, on the device: preprocessed for its model, with labels of its outputs."""
        located = self._locate(cell.ref)
        chosen = _preprocessing(located, cell.rules)
        dataset = dataset_beside(cell.dataset, self.options.sources.base)
        key = (dataset, cell.images, chosen, cell.rules.balanced)
        request = replace(self.options.request(cell.images, balanced=cell.rules.balanced), preprocessing=chosen)
        outputs = (located.entry.name, located.num_classes, located.class_names, cell.rules.restrict_classes)

        def fit() -> ImageSet:
            found = self._images.get(key, lambda: _on_device(load_images(dataset, request), self.device))
            return for_outputs(found, located, self.options.sources, restrict=cell.rules.restrict_classes)

        with scratch_in(self.scratch):
            return self._fitted.get((*key, *outputs), fit)

    def training_images(self, cell: Cell) -> ImageSet | None:
        """Return images to train heads on, on the device; None for a data set without a training split."""
        located = self._locate(cell.ref)
        chosen = _preprocessing(located, cell.rules)
        found = self._training.get((cell.dataset, chosen), lambda: self._load_training(cell.dataset, chosen))
        restrict = cell.rules.restrict_classes
        return for_outputs(found, located, self.options.sources, restrict=restrict) if found else None

    def other_images(self, cell: Cell) -> ImageSet | None:
        """Return images of a cell's data set that it does not audit, to train an encoder's heads on; None without any.

        They are those of `training_images`, else those that follow the audited ones.
        """
        training, count = self.training_images(cell), cell.images
        if training is not None or count is None or cell.rules.balanced:  # which takes images from the whole set
            return training
        dataset, chosen = (
            dataset_beside(cell.dataset, self.options.sources.base),
            _preprocessing(self._locate(cell.ref), cell.rules),
        )

        def following() -> ImageSet | None:
            request = replace(self.options.request(count + _TRAINING_IMAGES), preprocessing=chosen)
            found = images_after(load_at_most(dataset, request), count)
            return found and _on_device(found, self.device)

        return self._following.get((dataset, count, chosen), following)

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


def model_bytes(ref: str, dataset: str, options: RunOptions) -> int:
    """Return the memory in bytes of a model and one batch, estimated without reading weights; 0 if it is unavailable.

    The network is built on the meta device, where tensors take no memory. One that cannot be built or run there is
    built on the CPU with random weights.
    """
    for device in ("meta", "cpu"):
        try:
            network, shape = build_skeleton(ref, options.sources, device)
            size = shape or open_images(dataset, options, options.request(1)).images.shape[1:]
            image = torch.zeros(1, *size, device=device)
            return batch_bytes(network, image, options.batch_size or min(BATCH, fitting_batch(network, image)))
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
    if model.num_classes == 0:
        model = replace(model, network=Headless(model.network).eval())
    model.network.to(device)
    return model


def _on_device(images: ImageSet, device: torch.device) -> ImageSet:
    return replace(images, images=images.images.to(device), labels=images.labels.to(device))


def _bytes(output: object) -> int:
    return output.numel() * output.element_size() if isinstance(output, Tensor) else 0
