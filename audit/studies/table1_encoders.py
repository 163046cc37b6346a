"""The encoders of Table 1: learned without labels, stored with cards, and loaded again when a run resumes."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from audit.storage import write_atomically
from audit.studies.recipes.model_cards import build_seeded, describe_model
from audit.studies.table1_settings import DataSplits, Table1Request
from audit.training.heads import LayerClassifier
from audit.training.mutual_information import EpochProgress, train_representation
from model_zoo.architectures.paper_encoder import PaperEncoder
from model_zoo.weights.checkpoints import copy_weights, read_weights, write_safetensors

BETAS = {"standard": 0.0, "worst-case": 1.0}
"""The weight of the worst case in the objective (equation 5.2), by the name of the encoder."""


class EncoderStore:
    """The encoders in one folder, for one request and one division of the images."""

    def __init__(self, request: Table1Request, splits: DataSplits, folder: Path) -> None:
        self.request, self.splits, self.folder = request, splits, folder
        self.settings = request.identity(splits)

    def learn(self, name: str, seed: int, progress: EpochProgress) -> nn.Module:
        """Return a frozen encoder: loaded where the folder has it, otherwise learned and stored.

        Training resumes after its last complete epoch.
        """
        stem = self._stem(name, seed)
        weights, encoder = self.folder / "encoders" / f"{stem}.safetensors", self.untrained(seed)
        card = weights.with_suffix(".json")
        if card.exists() and json.loads(card.read_text(encoding="utf-8")).get("settings") == self.settings:
            copy_weights(encoder, read_weights(weights))
        else:
            training, checkpoint = (
                self.request.mutual_information(BETAS[name], seed),
                self.folder / f"{stem}.checkpoint",
            )
            train_representation(encoder, self.splits.train.images, training, progress, checkpoint)
            sha256 = write_safetensors(encoder.state_dict(), weights)
            made = {"mutual_information": training.identity(), "sha256": sha256}
            _write_card(weights, self._card(stem, 0, robust=BETAS[name] > 0) | made)
            checkpoint.unlink(missing_ok=True)
        return encoder.eval().requires_grad_(False)

    def untrained(self, seed: int) -> PaperEncoder:
        """Return an encoder with the initial weights of a seed, on the device of the images."""
        encoder = build_seeded(lambda: PaperEncoder(self._image_shape, self.request.scale.width), seed)
        return encoder.to(self.splits.train.images.device)

    def save_with_head(self, classifier: LayerClassifier, name: str, seed: int, *, robust: bool) -> None:
        """Write an encoder with its linear head: a model whose layer `penultimate` is the representation."""
        parts = {"0": classifier.layer, "1": classifier.head}
        tensors = {f"{place}.{name}": each for place, part in parts.items() for name, each in part.state_dict().items()}
        path = self.folder / "encoders" / f"{self._stem(name, seed)}-{'robust' if robust else 'standard'}-h.safetensors"
        sha256 = write_safetensors(tensors, path)
        card = self._card(path.stem, self.splits.classes, robust=robust or BETAS[name] > 0)
        _write_card(path, card | {"sha256": sha256})

    def _card(self, stem: str, classes: int, *, robust: bool) -> dict[str, Any]:
        """Return a card by which `file:PATH` loads the encoder; 0 classes: without a head."""
        request = self.request
        arguments = {"image_shape": list(self._image_shape), "width": request.scale.width, "num_classes": classes}
        trained_eps = request.dataset_settings.eps if robust else 0.0
        return {
            "id": stem,
            **describe_model("paper-encoder", arguments, "paper-encoder", request.dataset, trained_eps),
            "reference": "Zhu, Zhang & Evans 2020, section 5",
            "recipe": f"rvaudit reproduce table1 --dataset {request.dataset} --scale {request.scale_name}",
            "published": [],
            "settings": self.settings,
        }

    def _stem(self, name: str, seed: int) -> str:
        return f"{self.request.dataset}-{self.request.scale_name}-{name}-seed{seed}"

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.splits.train.images.shape[1:]
        return channels, height, width


def _write_card(weights: Path, card: dict[str, Any]) -> None:
    write_atomically(weights.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
