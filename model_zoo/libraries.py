"""Adapters of timm, torchvision.models and robustbench, imported inside functions because imports take seconds.

No other module imports these libraries. They provide architectures and metadata; their functions that read weights are
never called.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from audit.errors import AuditError, EnvironmentFault, MismatchError, UnknownNameError
from model_zoo.entries import PretrainedFacts
from model_zoo.images.preprocessing import Preprocessing, from_crop_fraction
from model_zoo.untrusted import printable

# Entries whose constructor downloads weights, and the entry of the same architecture that is built instead.
_SAME_ARCHITECTURE = {"Standard_R50": "Salman2020Do_R50"}
_SAME_ARCHITECTURE_THREAT = "Linf"
# The names of timm's checkpoint filters, one in a module.
_TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the deprecation warnings of third-party modules while they are imported or built."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _timm() -> Any:
    with _without_warnings():
        return import_module("timm")


def _torchvision_models() -> Any:
    with _without_warnings():
        return import_module("torchvision.models")


def _robustbench_models() -> Any:
    """Return robustbench's table of models; raises EnvironmentFault where it is not installed."""
    try:  # the `autoattack` that it imports is called pyautoattack
        with _without_warnings():
            state = import_module("pyautoattack.state")
            sys.modules.setdefault("autoattack", import_module("pyautoattack"))
            sys.modules.setdefault("autoattack.state", state)
            return import_module("robustbench.model_zoo.models").model_dicts
    except ImportError as error:
        message = "robustbench: references need robustbench, which is not installed; pip install 'rvaudit[robustbench]'"
        raise EnvironmentFault(message) from error


def timm_names() -> list[tuple[str, str]]:
    """Return the name, as `<architecture>.<tag>`, and the family of every timm model with pretrained weights."""
    timm = _timm()
    return [(name, _timm_family(timm, name.partition(".")[0])) for name in timm.list_pretrained()]


def _timm_family(timm: Any, architecture: str) -> str:
    module: str = timm.models.model_entrypoint(architecture).__module__
    return module.rpartition(".")[2]


def timm_facts(name: str) -> PretrainedFacts:
    """Return the metadata of a pretrained timm name; raises UnknownNameError."""
    timm = _timm()
    with _without_warnings():
        # timm would fetch and unpickle a name such as hf-hub:org/repo, so only registered names pass.
        config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None:
        raise UnknownNameError("timm model", name, [*timm.list_pretrained(), *timm.list_models()])
    return PretrainedFacts(
        name=f"{config.architecture}.{config.tag}" if config.tag else config.architecture,
        family=_timm_family(timm, config.architecture),
        num_classes=config.num_classes,
        image_shape=tuple(config.input_size),
        mean=tuple(config.mean),
        std=tuple(config.std),
        url=config.url or "",
        hub_repo=config.hf_hub_id or "",
        hub_file=_safetensors_name(config.hf_hub_filename or ""),
        tag=config.tag or "",
        licence=config.license or "",
        reference=config.paper_ids or config.origin_url or "",
        fixed_size=config.fixed_input_size,
        preprocessing=from_crop_fraction(tuple(config.input_size), vars(config)),
    )


def _safetensors_name(filename: str) -> str:
    """Return the name of the safetensors counterpart of a pickled file on the hub."""
    if filename in ("", "pytorch_model.bin"):
        return "model.safetensors"
    return filename.replace("open_clip_pytorch_model", "open_clip_model").removesuffix(".bin") + ".safetensors"


def timm_build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return a timm architecture with random weights; raises MismatchError for arguments it does not take."""
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        raise UnknownNameError("timm model", name, timm.list_models())
    try:
        with _without_warnings():
            network: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except AuditError:
        raise
    except Exception as error:  # untrusted options can fail in any line of a constructor
        options = printable(dict(arguments), 300)
        raise MismatchError(f"timm cannot build {name!r} with {options}: {printable(error, 300)}") from error
    return network


def apply_timm_filter(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return tensors renamed by the checkpoint filter of a timm architecture, None where it has none."""
    module = sys.modules.get(type(network).__module__)
    found = (getattr(module, name, None) for name in _TIMM_FILTERS)
    rename: Callable[..., dict[str, Tensor]] | None = next(filter(None, found), None)
    if rename is None or not type(network).__module__.startswith("timm."):
        return None
    arguments = (dict(tensors), network)[: len(signature(rename).parameters)]  # some filters take no network
    try:
        with _without_warnings():
            return dict(rename(*arguments))
    except (KeyError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError):
        return None  # the filter is for other layouts; the caller reports the mismatch


def torchvision_names() -> list[tuple[str, PretrainedFacts]]:
    """Return every torchvision model with weights, as `<arch>/<weights>` and its metadata."""
    models = _torchvision_models()
    found = []
    for name in models.list_models(module=models):
        for weights in _classifier_weights(models, name):
            found.append((f"{name}/{weights.name}", _torchvision_metadata(models, name, weights)))
    return found


def torchvision_facts(name: str, weights_name: str = "") -> tuple[str, PretrainedFacts]:
    """Return the name and metadata of weights of a torchvision model; the default weights where none are named.

    Raises UnknownNameError for an architecture or weights that do not exist.
    """
    models = _torchvision_models()
    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError("torchvision model", name, names)
    legal = {weights.name: weights for weights in _classifier_weights(models, name)}
    if weights_name and weights_name not in legal:
        raise UnknownNameError(f"weights of torchvision's {name}", weights_name, legal)
    weights = legal[weights_name] if weights_name else models.get_model_weights(name).DEFAULT
    return weights.name, _torchvision_metadata(models, name, weights)


def _classifier_weights(models: Any, name: str) -> list[Any]:
    """Return the weights of a torchvision model that include a classifier (one VGG entry has none)."""
    return [weights for weights in models.get_model_weights(name) if weights.meta["categories"]]


def _torchvision_metadata(models: Any, name: str, weights: Any) -> PretrainedFacts:
    preset = weights.transforms()
    size, mode = int(preset.crop_size[0]), preset.interpolation.value
    metrics = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return PretrainedFacts(
        name=name,
        family=models.get_model_builder(name).__module__.rpartition(".")[2],
        num_classes=len(weights.meta["categories"]),
        image_shape=(3, size, size),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        url=weights.url,
        licence=weights.meta.get("license", ""),
        reference=weights.meta.get("recipe", ""),
        accuracy=metrics["acc@1"] / 100 if "acc@1" in metrics else None,
        preprocessing=Preprocessing(resize=tuple(preset.resize_size), crop=(size, size), interpolation=mode),
    )


def torchvision_build(name: str, num_classes: int, size: int | None, *, pretrained: bool = False) -> nn.Module:
    """Return a torchvision architecture with random weights; `size` is the image side where the architecture fixes it.

    `pretrained` selects the variant of torchvision's own weights. Raises UnknownNameError, MismatchError.
    """
    models = _torchvision_models()
    names = models.list_models(module=models)
    if name not in names:
        raise UnknownNameError("torchvision model", name, names)
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if size is not None and name.startswith("vit_"):
        arguments["image_size"] = size
    if name in ("inception_v3", "googlenet"):
        arguments |= {"init_weights": False} | ({"transform_input": True, "aux_logits": True} if pretrained else {})
    try:
        with _without_warnings():
            network: nn.Module = models.get_model(name, weights=None, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise MismatchError(f"torchvision cannot build {name!r} with {arguments}: {error}") from error
    return network


def robustbench_preprocessing(dataset: str, threat: str, name: str) -> Preprocessing | None:
    """Return the resize and crop that RobustBench evaluates an ImageNet entry with, None for other data sets."""
    if dataset != "imagenet":
        return None
    if registered := robustbench_timm_name(dataset, threat, name):
        return timm_facts(registered).preprocessing
    named = _robustbench_entry(dataset, threat, name)["preprocessing"]
    table: dict[str, Preprocessing] = {
        "Res256Crop224": Preprocessing(resize=(256,), crop=(224, 224)),
        "BicubicRes256Crop224": Preprocessing(resize=(256,), crop=(224, 224), interpolation="bicubic"),
        "Crop288": Preprocessing(crop=(288, 288)),
        "Res224": Preprocessing(resize=(224, 224), fit="exact"),
    }
    return table.get(named)


def robustbench_image_ids() -> list[str]:
    """Return the paths `<wnid>/<file>` of the 5,000 ImageNet images that RobustBench evaluates on, in its order.

    Raises EnvironmentFault where robustbench is not installed.
    """
    package = find_spec("robustbench")
    if package is None or package.origin is None:
        raise EnvironmentFault("imagenet:robustbench-5k needs robustbench's list; pip install 'rvaudit[robustbench]'")
    listed = Path(package.origin).parent / "helper_files" / "imagenet_test_image_ids.txt"
    return listed.read_text(encoding="utf-8").split()


def imagenet_names(outputs: int) -> list[tuple[str, str]]:
    """Return wnid and description of every class of the ImageNet subset that has this many classes; [] for none."""
    with _without_warnings():
        data = import_module("timm.data")
        subset = data.infer_imagenet_subset({"num_classes": outputs})
        info = data.ImageNetInfo(subset) if subset else None
    if info is None:
        return []
    return [(info.index_to_label_name(place), info.index_to_description(place)) for place in range(info.num_classes())]


def timm_resize(size: tuple[int, ...], crop: tuple[int, ...], interpolation: str, fill: tuple[float, ...]) -> list[Any]:
    """Return timm's transforms of Pillow images for sizes that torchvision has no resize for.

    With `fill` the whole image is fitted inside the size and padded to the crop with this colour in [0, 1]; without,
    it covers the size.
    """
    with _without_warnings():
        transforms = import_module("timm.data.transforms")
    if not fill:
        return [transforms.ResizeKeepRatio(size, interpolation=interpolation)]
    colour = [round(255 * value) for value in fill]
    fitted = transforms.ResizeKeepRatio(size, interpolation=interpolation, longest=1.0)
    return [fitted, transforms.CenterCropOrPad(crop, fill=colour)]


def robustbench_drive_ids(dataset: str, threat: str, name: str) -> list[str]:
    """Return the Google Drive ids of an entry's files, [] where robustbench lists none."""
    found = _robustbench_entry(dataset, threat, name).get("gdrive_id") or []
    return list(found) if isinstance(found, list) else [found]


def robustbench_timm_name(dataset: str, threat: str, name: str) -> str:
    """Return the timm name that robustbench registered for an entry, '' where it has none."""
    _robustbench_models()
    registered = f"{name.lower().replace('-', '_')}_{dataset.lower()}_{threat.lower()}"
    return registered if _timm().is_model(registered) else ""


def robustbench_build(dataset: str, threat: str, name: str) -> nn.Module:
    """Return the architecture of a RobustBench entry with random weights.

    Raises EnvironmentFault where its constructor needs a GPU and this machine has none.
    """
    if registered := robustbench_timm_name(dataset, threat, name):
        return timm_build(registered, {})
    if name in _SAME_ARCHITECTURE and dataset == "imagenet":
        threat, name = _SAME_ARCHITECTURE_THREAT, _SAME_ARCHITECTURE[name]
    try:
        with _without_warnings():
            network: nn.Module = _robustbench_entry(dataset, threat, name)["model"]()
    except (RuntimeError, AssertionError) as error:
        if "CUDA" not in str(error) and "NVIDIA" not in str(error):
            raise
        message = f"robustbench's {name} moves to a GPU in its constructor, and this machine has none"
        raise EnvironmentFault(f"{message}; audit it on a machine with CUDA") from error
    return network


def _robustbench_entry(dataset: str, threat: str, name: str) -> Mapping[str, Any]:
    table = {d.value: {t.value: ms for t, ms in threats.items()} for d, threats in _robustbench_models().items()}
    entry: Mapping[str, Any] = table[dataset][threat][name]
    return entry
