"""Models that our recipes trained anywhere: `file:PATH` reads the card that was written beside the weights."""

from dataclasses import replace
from pathlib import Path

from audit.errors import IntegrityError
from model_zoo.architectures import build
from model_zoo.catalogue import card_entry, read_card_file
from model_zoo.prepared import Prepared
from model_zoo.sources.downloads import verify
from model_zoo.sources.hub import build_within
from model_zoo.weights.checkpoints import fit_weights, read_weights
from model_zoo.weights.fitting import most_bytes


def prepare_carded(weights: Path, path: Path) -> Prepared:
    """Read a card and check its weights against it.

    Raises IntegrityError for a card that is none, or for other weights than the card's.
    """
    whose = f"the weights {weights.name}"
    card = read_card_file(path, whose)
    try:
        entry = card_entry(card, f"file:{weights}", "file")
        channels, height, width = (int(side) for side in card["image_shape"])
        num_classes, wanted = int(card["num_classes"]), str(card["sha256"])
        name, arguments = str(card["architecture"]), dict(card["arguments"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the card {path} of {whose} holds a value of the wrong kind: {error}") from error
    return Prepared(
        entry=replace(entry, weights_sha256=verify(weights, wanted), pinned=True),
        build=lambda: build_within(lambda: build(name, arguments), weights),
        fit=lambda network: fit_weights(network, read_weights(weights, most=most_bytes(network))),
        num_classes=num_classes,
        image_shape=(channels, height, width),
    )
