"""Accuracies of one encoder's layers, which cells of one layer and threat model share."""

from audit.adversary.label_attack import LabelAttack
from audit.adversary.threat import ThreatModel
from audit.representation.layers import Reduction, Representation
from audit.run.encoders.head_images import head_plan
from audit.run.encoders.heads import AuditedImages, EncoderAccuracy, measure_encoder
from audit.run.gates.inputs import CellInputs
from audit.run.identity import partial_identity
from audit.run.intermediate import IntermediateResults, Memo
from model_zoo.model_types import LoadedModel

_Key = tuple[str, str, Reduction, ThreatModel, LabelAttack, int]


class EncoderResults:
    """Accuracies of the best heads found on the layers of one encoder."""

    def __init__(self, model: LoadedModel, intermediate: IntermediateResults) -> None:
        self._model, self._intermediate = model, intermediate
        self._accuracies: Memo[_Key, EncoderAccuracy] = Memo()

    def accuracy(self, inputs: CellInputs) -> EncoderAccuracy | None:
        """Return the accuracies of a cell's layer under its attack; None for a classifier."""
        if self._model.num_classes:
            return None
        cell, images = inputs.cell, inputs.images
        settings, seed = cell.settings, cell.settings.seeds[0]
        names = ("layer", "norm", "eps", "heads")
        part = partial_identity(inputs.identity, "encoder attack", *names)
        part |= {"attack": repr(settings.attack), "seed": seed, "reduce": settings.reduce}

        def compute() -> EncoderAccuracy:
            layer = Representation(self._model.network, cell.layer, settings.reduce)
            plan = head_plan(images, inputs.others, seed)
            audited = AuditedImages(images.images, images.labels, images.label_count, plan)
            return measure_encoder(layer, audited, cell.threat, settings.attack, seed)

        key = (images.sha256, cell.layer, settings.reduce, cell.threat, settings.attack, seed)
        return self._accuracies.get(key, lambda: self._intermediate.get(part, compute))
