"""Image networks of transformers: `transformers:<repo or folder>` (extra `transformers`).

A repository or folder holds config.json, preprocessor_config.json and safetensors, or a state dict by torch.save. The
class of the network is looked up by name in the library, code of repositories is never run, and weights are read by our
own readers; the library then gives them its present names.
"""

import json
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.errors import EnvironmentFault, MismatchError, UsageError
from model_zoo.entries import ModelEntry, ModelRef
from model_zoo.model_types import LocatedModel, SourceSettings
from model_zoo.sources.hub import build_within_limit, hub_file
from model_zoo.sources.processors import image_shape, label_names, processing_of
from model_zoo.sources.reference_options import with_labels
from model_zoo.sources.transformers_networks import Architecture, find_architecture, quietly
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

_MAX_CONFIG = 4_000_000
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_OTHER_PARTS = ("text_", "logit_", "classifier", "decoder", "mask_token", "lm_head", "vqa", "qformer", "language_")
_FEATURES = ("image_embeds", "pooler_output", "last_hidden_state")


class _Files(NamedTuple):
    """The files of a model, and the name by which the user knows it."""

    config: Path
    preprocessor: Path
    weights: Path
    tokenizer: Path | None
    name: str
    pinned: bool


def locate_transformers(ref: ModelRef, sources: SourceSettings) -> LocatedModel:
    """Locate the files of a repository or folder and read its configuration.

    Raises EnvironmentFault for missing files or library, UsageError for a configuration of no image network,
    UnknownNameError for an unknown network, and the errors of options.
    """
    files = _files(ref, sources)
    config = _read_json(files.config, files.name)
    made = find_architecture(config, files.name)
    processing = processing_of(_read_json(files.preprocessor, files.name), files.name)
    choice = zero_shot_choice(ref.options, made.features) if made.features else None
    if not made.features and {"head", "classes", "templates"} & set(ref.options):
        raise UsageError(f"{files.name} has a classifier of its own; leave out classes=, templates= and head=")
    digest = sha256(files.config.read_bytes() + files.preprocessor.read_bytes()).hexdigest()[:12]
    entry = ModelEntry(
        ref=f"transformers:{ref.target}",
        name=files.name,
        source="transformers",
        architecture=f"{made.kind.__name__} ({digest})",
        family=str(config.get("model_type", "")),
        reference=files.name,
        weights_sha256=with_choice(weights_sha256(files.weights), choice),
        pinned=files.pinned,
    )
    labels = label_names(config) if made.classes else ()
    return LocatedModel(
        entry=with_labels(entry, ref.options),
        build=lambda: build_within_limit(lambda: _build(made, choice), files.weights),
        copy_weights=lambda network: _fill(network, made, choice, files),
        num_classes=choice.classes if choice else made.classes,
        image_shape=image_shape(processing.preprocessing, made.settings),
        mean=processing.mean,
        std=processing.std,
        preprocessing=processing.preprocessing,
        class_names=choice.names if choice else labels,
    )


def _files(ref: ModelRef, sources: SourceSettings) -> _Files:
    folder = Path(ref.target).expanduser()
    if folder.is_dir():
        weights = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
        if weights is None:
            raise EnvironmentFault(f"{folder} holds no weights; legal names are {', '.join(_WEIGHTS)}")
        tokenizer = folder / "tokenizer.json"
        found = (folder / "config.json", folder / "preprocessor_config.json", weights)
        name = folder.resolve().name
        return _Files(*found, tokenizer if tokenizer.exists() else None, name, pinned=False)
    parts = ref.target.split("/")
    if len(parts) > 2 or not all(part not in ("", ".", "..", "~") for part in parts):
        raise EnvironmentFault(f"folder {ref.target} does not exist; give a folder, or a repository such as org/name")
    local, wanted = sources.cache / "transformers" / ref.target, ["config.json", "preprocessor_config.json"]
    config, preprocessor = (hub_file(ref.target, n, local / n, offline=sources.offline)[0] for n in wanted)
    weights, pinned = hub_file(ref.target, _WEIGHTS[0], local / _WEIGHTS[0], offline=sources.offline)
    tokenizer = local / "tokenizer.json"
    if {"classes", "templates"} & set(ref.options):
        tokenizer, _ = hub_file(ref.target, tokenizer.name, tokenizer, offline=sources.offline)
    return _Files(config, preprocessor, weights, tokenizer if tokenizer.exists() else None, ref.target, pinned)


def _read_json(path: Path, name: str) -> dict[str, Any]:
    if not path.exists():
        raise EnvironmentFault(f"{path} does not exist: {name} does not say how its images are made")
    check_file(path, _MAX_CONFIG)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} of {name} is not JSON: {reason(error)}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path.name} of {name} is not a JSON object")
    return found


class _Tower(nn.Module):
    """A network of transformers reduced to the features that a zero-shot head reads."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.network(images)
        features: Tensor = next(outputs[name] for name in _FEATURES if outputs.get(name) is not None)
        return features


def _build(made: Architecture, choice: ZeroShotChoice | None) -> nn.Module:
    with quietly():
        network = made.kind(made.settings)
    return ZeroShot(_Tower(network), made.features, choice.classes) if choice else network


def _fill(network: nn.Module, made: Architecture, choice: ZeroShotChoice | None, files: _Files) -> tuple[str, ...]:
    """Copy weights into a network, and the zero-shot head beside it; return the notes on both."""
    weights = read_weights(files.weights, max_bytes=10 * max_checkpoint_bytes(network))
    if choice is None:
        return _copy(network, made, weights)
    assert isinstance(network, ZeroShot)
    notes = _copy(network.visual.network, made, weights)  # type: ignore[arg-type]
    matrix = text_matrix(_text_encoder(made, weights, files), choice) if choice.matrix is None else choice.matrix
    if matrix.shape[1] != network.head.in_features:
        raise MismatchError(f"texts of {files.name} have {matrix.shape[1]} features, images {network.head.in_features}")
    network.fill(matrix, scale_of(weights.tensors))
    return (*notes, *described(choice))


def _copy(network: nn.Module, made: Architecture, weights: Weights) -> tuple[str, ...]:
    """Copy weights under the names that the library gives them; parts of other networks beside them are left out."""
    named, told = _with_present_names(type(network), made.settings, weights)
    missing = set(told["missing_keys"])
    notes = list(weights.notes)
    if missing and all(".pooler." in f".{key}" for key in missing) and getattr(network, "pooler", None) is not None:
        for each in (network, named):
            each.register_module("pooler", None)
        missing, note = set(), "the pooler is not in the weights and is left out: the output is last_hidden_state"
        notes.append(note)
    left = sorted(told["unexpected_keys"])
    if wrong := [key for key in left if not any(part in key for part in _OTHER_PARTS)]:
        raise MismatchError(_mismatch(made, wrong, "unknown to the network"))
    if missing or told["mismatched_keys"]:
        wrong = sorted(missing) or [str(key[0]) for key in told["mismatched_keys"]]
        raise MismatchError(_mismatch(made, wrong, "missing" if missing else "of another shape"))
    if left:
        notes.append(f"{len(left)} tensors of other parts are not used: {', '.join(map(printable, left[:3]))}")
    return copy_weights(network, replace(weights, tensors=dict(named.state_dict()), notes=tuple(notes)))


def _with_present_names(kind: Any, settings: Any, weights: Weights) -> tuple[Any, Any]:
    """Return a network that the library has given weights under their present names, and what was missing or left."""
    given = {"state_dict": dict(weights.tensors), "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quietly(), torch.random.fork_rng(devices=[]):
        try:
            network, told = kind.from_pretrained(None, config=settings, **given)
        except Exception as error:  # the library's conversions raise many types
            raise MismatchError(f"weights and config.json do not fit {kind.__name__}: {reason(error)}") from error
    return network, told


def _mismatch(made: Architecture, names: list[str], what: str) -> str:
    shown = ", ".join(map(printable, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"weights and config.json do not fit {made.kind.__name__}: {what}: {shown}"


def _text_encoder(made: Architecture, weights: Weights, files: _Files) -> EncodeTexts:
    """Return the text tower beside an image tower as a map from texts to features."""
    if files.tokenizer is None:
        message = f"class names need tokenizer.json beside the weights of {files.name}"
        raise EnvironmentFault(f"{message}; else give head=, a saved matrix")
    check_file(files.tokenizer, 64 << 20)
    tokenizer = import_module("tokenizers").Tokenizer.from_file(str(files.tokenizer))
    with quietly() as library:
        name = made.kind.__name__.replace("Vision", "Text")
        kind = getattr(library, name, None)
        settings = getattr(made.whole, "text_config", None)
        if kind is None or settings is None:
            raise UsageError(f"{files.name} has no text tower; give head=, a saved matrix, in place of classes=")
    tower, told = _with_present_names(kind, settings, weights)
    if missing := sorted(told["missing_keys"]):
        raise MismatchError(f"the weights of {files.name} hold no text tower (missing: {printable(missing[0])})")
    longest, padded = settings.max_position_embeddings, "siglip" in made.kind.__name__.lower()

    def encode(texts: Any) -> Tensor:
        features = []
        for text in texts:  # one by one: no padding, no mask
            ids = tokenizer.encode(text).ids[:longest]
            ids += [settings.pad_token_id] * (longest - len(ids)) if padded else []
            outputs = tower.eval()(torch.tensor([ids]))
            features.append(outputs["text_embeds"] if "text_embeds" in outputs else outputs["pooler_output"])
        return torch.cat(features)

    return encode
