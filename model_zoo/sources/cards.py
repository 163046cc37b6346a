"""Models trained by the package's recipes: `file:PATH` reads the card beside the weights."""

from dataclasses import replace
from pathlib import Path

from audit.errors import IntegrityError
from model_zoo.architectures import build
from model_zoo.catalogue import card_entry, read_card_file
from model_zoo.model_types import LocatedModel
from model_zoo.sources.hub import build_within_limit
from model_zoo.untrusted import verify_sha256
from model_zoo.weights.checkpoints import copy_weights, read_weights
from model_zoo.weights.matching import max_checkpoint_bytes


def locate_carded(weights: Path, path: Path) -> LocatedModel:
    """Read a card and verify the hash of its weights.

    Raises IntegrityError for an invalid card, or for weights with another hash than the card's.
    """
    owner = f"the weights {weights.name}"
    card = read_card_file(path, owner)
    try:
        entry = card_entry(card, f"file:{weights}", "file")
        channels, height, width = (int(side) for side in card["image_shape"])
        num_classes, expected_sha256 = int(card["num_classes"]), str(card["sha256"])
        name, arguments = str(card["architecture"]), dict(card["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the card {path} of {owner} holds a value of the wrong kind: {error}") from error
    return LocatedModel(
        entry=replace(entry, weights_sha256=verify_sha256(weights, expected_sha256), pinned=True),
        build=lambda: build_within_limit(lambda: build(name, arguments), weights),
        copy_weights=lambda network: copy_weights(
            network, read_weights(weights, max_bytes=max_checkpoint_bytes(network))
        ),
        num_classes=num_classes,
        image_shape=(channels, height, width),
    )
