"""Steps shared by all recipes: seeded initial weights, accuracies on held-out images, and cards beside the weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.storage import write_atomically
from audit.types import Images, Labels
from model_zoo.weights.checkpoints import write_safetensors

_Network = TypeVar("_Network", bound=nn.Module)


def build_seeded(build: Callable[[], _Network], seed: int) -> _Network:
    """Return a network whose initial weights are drawn with a seed, leaving torch's global stream unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def published_accuracies(
    network: nn.Module, images: Images, labels: Labels, eps: float, sources: tuple[str, str]
) -> list[dict[str, Any]]:
    """Return natural accuracy and adversarial accuracy (smoke tier, l-inf) on held-out images, as entries of a card.

    `sources` are the description of the images and the formatted radius.
    """
    attack = TIERS["smoke"]
    measured = measure_accuracy(network.requires_grad_(False), images, labels, Linf(eps), attack, seed=0)
    source, radius = sources
    adversarial_source = f"{source}, {attack.name} at l-inf {radius}"
    return [
        {"metric": "natural_accuracy", "value": measured.natural.value, "source": source},
        {"metric": "adversarial_accuracy", "value": measured.adversarial.value, "source": adversarial_source},
    ]


def describe_model(
    architecture: str, arguments: dict[str, Any], family: str, dataset: str, trained_eps: float
) -> dict[str, Any]:
    """Return the keys of a card on architecture and training; `trained_eps` is 0 for standard training."""
    return {
        "architecture": architecture,
        "arguments": arguments,
        "num_classes": arguments["num_classes"],
        "image_shape": list(arguments["image_shape"]),
        "family": family,
        "dataset": dataset,
        "training": "robust" if trained_eps else "standard",
        "trained_norm": "linf" if trained_eps else "",
        "trained_eps": trained_eps,
        "licence": "MIT",
    }


def write_model(network: nn.Module, weights: Path, card: dict[str, Any]) -> dict[str, Any]:
    """Write the weights as safetensors and the card with their hash beside them, and return the card."""
    complete = card | {"sha256": write_safetensors(network.state_dict(), weights)}
    write_atomically(weights.with_suffix(".json"), json.dumps(complete, indent=1) + "\n")
    return complete
