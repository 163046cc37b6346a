"""Image towers of open_clip: `open_clip:<name>/<pretrained>`, `<name>/<file>` or a folder (extra `clip`).

Architectures and metadata are the library's; weights are read by our own readers. A file may hold a whole CLIP, or the
image tower alone with or without the prefix `visual.`, as robust fine-tuning (FARE, TeCoA) writes it.

Source: Schlarmann et al. 2024, "Robust CLIP" (FARE); Mao et al. 2023, "Understanding Zero-Shot Adversarial Robustness
for Large-Scale Models" (TeCoA).
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.errors import AuditError, EnvironmentFault, MismatchError, UnknownNameError, UsageError
from model_zoo.entries import ModelEntry, ModelRef
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.model_types import LocatedModel, SourceSettings
from model_zoo.sources.downloads import Download, fetch
from model_zoo.sources.hub import build_within_limit, hub_file
from model_zoo.sources.reference_options import with_labels
from model_zoo.sources.zero_shot import (
    EncodeTexts,
    ZeroShot,
    ZeroShotChoice,
    described,
    scale_of,
    text_matrix,
    with_choice,
    zero_shot_choice,
)
from model_zoo.untrusted import check_file, printable, reason
from model_zoo.weights.checkpoints import Weights, copy_weights, read_weights
from model_zoo.weights.matching import max_checkpoint_bytes
from model_zoo.weights.shards import weights_sha256

_CONFIG, _WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_MAX_CONFIG = 1_000_000
_VISUAL, _FOLDER = "visual.", "open_clip"
_FITS = {"shortest": "shorter", "squash": "exact", "longest": "inside"}
_SIGLIP = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}


class _Tower(NamedTuple):
    """An image tower: settings of the pair, how images are made, the weights, and whether their hash is published."""

    settings: Mapping[str, Any]
    images: Mapping[str, Any]
    weights: Path
    name: str
    architecture: str
    pinned: bool

    @property
    def features(self) -> int:
        return int(self.settings["embed_dim"])

    @property
    def digest(self) -> str:
        stated = json.dumps([self.settings, self.images], sort_keys=True, default=str)
        return sha256(stated.encode()).hexdigest()[:12]


def locate_open_clip(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate the weights and the settings of an image tower.

    Raises EnvironmentFault for missing files or library, UnknownNameError for an unknown name or tag, UsageError for
    settings that are not legal, and the errors of options.
    """
    tower = _in_folder(Path(ref.target)) if Path(ref.target).is_dir() else _by_name(ref, sources)
    try:
        side, embed = tower.settings["vision_cfg"].get("image_size", 224), tower.features
        preprocessing = _preprocessing(tower.images, side)
        mean, std = (tuple(float(value) for value in tower.images[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the settings of {tower.name} hold a value of the wrong kind: {printable(error)}") from error
    choice = zero_shot_choice(ref.options, embed)
    entry = ModelEntry(
        ref=f"open_clip:{ref.target}",
        name=tower.name,
        source="open_clip",
        architecture=f"{tower.architecture} ({tower.digest})",
        family="clip",
        reference=tower.name,
        weights_sha256=with_choice(weights_sha256(tower.weights), choice),
        pinned=tower.pinned,
    )
    return LocatedModel(
        entry=with_labels(entry, ref.options),
        build=lambda: _build_safely(tower, choice),
        copy_weights=lambda network: _fill(network, tower, choice),
        num_classes=choice.classes if choice else 0,
        image_shape=preprocessing.shape,
        mean=mean,
        std=std,
        preprocessing=preprocessing,
        class_names=choice.names if choice else (),
    )


def _library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return import_module("open_clip")
        except ImportError as error:
            message = "open_clip: references need open_clip_torch, which is not installed"
            raise EnvironmentFault(f"{message}; pip install 'rvaudit[clip]'") from error


def _in_folder(folder: Path) -> _Tower:
    """Return the tower of a folder in the layout of open_clip's hub repositories."""
    path = folder / _CONFIG
    weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if weights is None or not path.exists():
        missing = _CONFIG if weights else _WEIGHTS[0]
        raise EnvironmentFault(f"{folder} holds no {missing}; give a folder in open_clip's layout, or <name>/<file>")
    check_file(path, _MAX_CONFIG)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        settings, images = dict(held["model_cfg"]), dict(held.get("preprocess_cfg", {}))
        known = isinstance(settings["vision_cfg"], dict) and int(settings["embed_dim"]) > 0
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} is not a configuration of open_clip ({reason(error)})") from error
    if not known:
        raise UsageError(f"{path} is not a configuration of open_clip: vision_cfg and embed_dim are missing")
    name = folder.resolve().name
    return _Tower(settings, {**_defaults(), **images}, weights, name, _FOLDER, pinned=False)


def _by_name(ref: ModelRef, sources: SourceSettings) -> _Tower:
    library = _library()
    name, _, chosen = ref.target.partition("/")
    settings = library.get_model_config(name)
    if settings is None:
        raise UnknownNameError("open_clip model", name, library.list_models())
    file = Path(chosen)
    if chosen and (file.exists() or file.suffix in (".pt", ".pth", ".bin", ".safetensors", ".ckpt")):
        if not file.exists():
            raise EnvironmentFault(f"weights file {file} does not exist")
        images = {**_defaults(), **(_SIGLIP if "siglip" in name.lower() else {})}
        return _Tower(settings, images, file, file.stem, name, pinned=False)
    stated = library.get_pretrained_cfg(name, chosen)
    if not stated:
        raise UnknownNameError(f"open_clip weights of {name}", chosen, library.list_pretrained_tags_by_model(name))
    weights, pinned = _pretrained(stated, name, chosen, sources)
    if stated.get("quick_gelu"):
        settings = {**settings, "quick_gelu": True}
    return _Tower(settings, {**_defaults(), **stated}, weights, f"{name}/{chosen}", name, pinned)


def _pretrained(stated: Mapping[str, Any], name: str, tag: str, sources: SourceSettings) -> tuple[Path, bool]:
    """Return the weights of a tag, in the cache or from the hub, and whether their hash is published."""
    hub, folder = str(stated.get("hf_hub") or ""), sources.cache / "open_clip" / name
    for suffix in (".safetensors", ".pt", ".bin"):
        if (local := folder / f"{tag}{suffix}").exists():
            return local, False
    if hub:
        repo, _, filename = hub.rpartition("/")
        local = folder / f"{tag}{Path(filename).suffix or '.safetensors'}"
        return hub_file(repo, filename or _WEIGHTS[0], local, offline=sources.offline)
    url = str(stated.get("url") or "")
    return fetch(Download(url=url), folder / f"{tag}.pt", offline=sources.offline), False


def _defaults() -> dict[str, Any]:
    """Return how open_clip makes images where nothing else is said: CLIP's mean, deviation and bicubic resize."""
    constants = _library().constants
    mean, std = constants.OPENAI_DATASET_MEAN, constants.OPENAI_DATASET_STD
    return {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}


def _preprocessing(images: Mapping[str, Any], side: Any) -> Preprocessing:
    mode, size = str(images["resize_mode"]), images.get("size", side)
    if mode not in _FITS:
        raise UnknownNameError("resize_mode", mode, _FITS)
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    fit = "cover" if mode == "shortest" and height != width else _FITS[mode]
    interpolation = str(images["interpolation"]) if images["interpolation"] != "random" else "bicubic"
    return Preprocessing(
        resize=(height,) if fit == "shorter" else (height, width),
        crop=() if fit == "exact" else (height, width),
        interpolation="bicubic" if fit == "cover" else interpolation,
        fit=fit,
        fill=(float(images["fill_color"]) / 255,) * 3 if fit == "inside" else (),
    )


def _build_safely(tower: _Tower, choice: ZeroShotChoice | None) -> nn.Module:
    """Build a tower; one whose settings are of unknown origin may not be much larger than its weights."""
    if tower.architecture != _FOLDER:
        return _build(tower, choice)
    return build_within_limit(lambda: _build(tower, choice), tower.weights)


def _build(tower: _Tower, choice: ZeroShotChoice | None) -> nn.Module:
    model = _library().model
    settings = {**tower.settings["vision_cfg"], "timm_model_pretrained": False}
    quick = bool(tower.settings.get("quick_gelu", False))
    try:
        visual: nn.Module = model._build_vision_tower(tower.features, settings, quick)
    except AuditError:
        raise
    except Exception as error:  # untrusted settings can fail in any line of a constructor
        raise MismatchError(f"open_clip cannot build the image tower of {tower.name}: {reason(error)}") from error
    return ZeroShot(visual, tower.features, choice.classes) if choice else visual


def _fill(network: nn.Module, tower: _Tower, choice: ZeroShotChoice | None) -> tuple[str, ...]:
    """Copy weights into a tower, and the zero-shot head beside it; return the notes on both."""
    weights = read_weights(tower.weights, max_bytes=max_checkpoint_bytes(network))
    if choice is None:
        return copy_weights(network, _visual_part(weights))
    assert isinstance(network, ZeroShot)
    notes = copy_weights(network.visual, _visual_part(weights))
    matrix = text_matrix(_text_encoder(tower, weights), choice) if choice.matrix is None else choice.matrix
    network.fill(matrix, scale_of(weights.tensors))
    return (*notes, *described(choice))


def _visual_part(weights: Weights) -> Weights:
    """Return the tensors of the image tower: those below `visual.`, or all where none is."""
    # wrappers may stand before the prefix, as in module.visual.conv1.weight
    prefixes = {f".{name}".partition(f".{_VISUAL}")[0] for name in weights.tensors if f".{_VISUAL}" in f".{name}"}
    if len(prefixes) != 1:
        return weights
    prefix = f"{prefixes.pop()}.{_VISUAL}"[1:]
    held = {name.removeprefix(prefix): each for name, each in weights.tensors.items() if name.startswith(prefix)}
    note = f"took the {len(held)} tensors of the image tower below {prefix!r}"
    return replace(weights, tensors=held, notes=(*weights.notes, note))


def _text_encoder(tower: _Tower, weights: Weights) -> EncodeTexts:
    """Return the text tower beside an image tower as a map from texts to features (T, D)."""
    model, settings = _library().model, dict(tower.settings["text_cfg"])
    if settings.get("hf_model_name") or settings.get("hf_tokenizer_name") or "siglip" in tower.name.lower():
        message = f"the tokenizer of {tower.name} is not part of open_clip"
        raise UsageError(f"{message}; give head=, a saved matrix of its text features, in place of classes=")
    text = model._build_text_tower(tower.features, settings, bool(tower.settings.get("quick_gelu", False)))
    known = set(text.state_dict())
    held = {name.removeprefix("text."): each for name, each in weights.tensors.items() if not name.startswith(_VISUAL)}
    try:
        copy_weights(text, replace(weights, tensors={name: held[name] for name in known & set(held)}, prefix=None))
    except MismatchError as error:
        message = f"the weights of {tower.name} hold no text tower"
        raise MismatchError(f"{message}; give head=, a saved matrix of text features, in place of classes=") from error
    text.eval().requires_grad_(False)
    tokenizer = _library().tokenizer.SimpleTokenizer(
        context_length=settings.get("context_length", 77), **settings.get("tokenizer_kwargs", {})
    )

    def encode(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            features: Tensor = text(tokenizer(list(texts)))
        return features

    return encode
