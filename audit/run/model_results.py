"""Results of one model that its cells share: sanity checks, attacks, certificates, layers."""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from audit.adversary.attack_checks import Check
from audit.adversary.label_attack import LabelAttack
from audit.adversary.memory.stages import stage
from audit.adversary.robustness import Robustness, TargetModel, evaluate_robustness
from audit.adversary.threat import ThreatModel
from audit.certificate.layers import CertificationInputs, CertificationSettings, HeadTrainingData, certify_layers
from audit.certificate.results import LayerCertificate
from audit.certificate.settings import CERTIFICATE_VERSION, LEDGER_VERSION, CertificateSettings
from audit.config.settings import AuditSettings
from audit.representation.cache import ActivationCache
from audit.representation.layers import Representation, encode_layers
from audit.run.cell import DEFAULT_RULES, Cell
from audit.run.encoders.results import EncoderResults
from audit.run.gates.inputs import CellInputs
from audit.run.identity import partial_identity
from audit.run.intermediate import IntermediateResults, Memo
from audit.run.layer_audit import LayerAudit, Reuse
from audit.run.loading import BATCH, InputCache
from audit.run.sanity_checks import sanity_checks
from audit.types import Encoded
from model_zoo.load import LoadedModel


class ModelResults:
    """One loaded model and the results that its cells share."""

    def __init__(self, model: LoadedModel, intermediate: IntermediateResults) -> None:
        self.model, self._intermediate = model, intermediate
        self.encoder = EncoderResults(model, intermediate)
        self._sanity: Memo[str, tuple[Check, ...]] = Memo()
        self._attacks: Memo[tuple[str, ThreatModel, LabelAttack, int], Robustness] = Memo()
        self._certificates: Memo[tuple[str, str, ThreatModel, LabelAttack, int, bool], LayerCertificate] = Memo()
        self._layers: Memo[tuple[str, str, AuditSettings], LayerAudit] = Memo(slots=1)

    @classmethod
    @stage("loading")
    def load(cls, cell: Cell, inputs: InputCache, intermediate: IntermediateResults) -> "ModelResults":
        """Load the model of a cell, after the memory of the last one is free."""
        gc.collect()  # a layer audit and its encoder refer to each other
        class_map = inputs.images(cell).class_map if cell.rules.restrict_classes else None
        return cls(inputs.model(cell.ref, class_map), intermediate)

    @property
    def all_sanity_checks(self) -> tuple[Check, ...]:
        """The sanity checks made so far, on any images."""
        return tuple(check for checks in self._sanity for check in checks)

    def sanity_checks(self, inputs: CellInputs) -> tuple[Check, ...]:
        """Return the sanity checks of the network on these images: layers and threat models share them."""
        network, images, entry = self.model.network, inputs.images, self.model.entry
        as_published = entry.published_on == inputs.cell.dataset and inputs.cell.rules == DEFAULT_RULES
        numbers = entry.published if as_published else ()
        published = next((number.value for number in numbers if number.metric == "natural_accuracy"), None)
        return self._sanity.get(images.sha256, lambda: sanity_checks(network, images.images, images.labels, published))

    def accuracies(self, inputs: CellInputs) -> Robustness | None:
        """Return the accuracies of the network, or of heads on the layer of an encoder; None if these have none."""
        heads = self.encoder.accuracy(inputs)
        return heads.robustness if heads else self.robustness(inputs)

    def robustness(self, inputs: CellInputs) -> Robustness:
        """Return the accuracies under the cell's attack: layers and estimators share them."""
        cell, images = inputs.cell, inputs.images
        attack, seed = cell.settings.attack, cell.settings.seeds[0]
        part = partial_identity(inputs.identity, "attack", "norm", "eps") | {"attack": repr(attack), "seed": seed}

        def compute() -> Robustness:
            target = TargetModel(self.model.network, images.images, images.labels)
            return evaluate_robustness(target, cell.threat, attack, seed)

        key = (images.sha256, cell.threat, attack, seed)
        return self._attacks.get(key, lambda: self._intermediate.get(part, compute))

    def certificate(self, inputs: CellInputs, on_start: Callable[[], None]) -> LayerCertificate:
        """Return the certificate of a layer under a threat model: estimators share it."""
        cell, images, training = inputs.cell, inputs.images, inputs.training
        seed = cell.settings.seeds[0]
        settings = CertificationSettings(
            CertificateSettings(seed=seed), cell.settings.attack, ledger=cell.settings.ledger
        )
        part = partial_identity(inputs.identity, "certificate", "layer", "norm", "eps", "examples_sha256")
        part |= {"attack": repr(settings.attack), "seed": seed, "method": CERTIFICATE_VERSION}
        part |= {"ledger": LEDGER_VERSION} if settings.ledger else {}

        def compute() -> LayerCertificate:
            data = HeadTrainingData(training.images, training.labels) if training else None
            network, classes = self.model.network, images.label_count
            headless = self.model.num_classes == 0
            certified = CertificationInputs(network, images.images, images.labels, classes, headless, data)
            return certify_layers(certified, [cell.layer], [cell.threat], settings)[0].row

        def stored() -> LayerCertificate:
            on_start()
            with stage("certificate"):
                return self._intermediate.get(part, compute)

        return self._certificates.get(
            (images.sha256, cell.layer, cell.threat, settings.attack, seed, settings.ledger), stored
        )

    def layer_audit(self, inputs: CellInputs, layers: frozenset[str]) -> LayerAudit:
        """Return the audit of the cell's layer, kept for the next threat models; `layers` are encoded in one pass."""
        cell, images = inputs.cell, inputs.images
        settings = cell.settings
        part = partial_identity(inputs.identity, "normal", "layer")
        part |= {name: inputs.identity["settings"][name] for name in ("estimator", "reduce")}
        part |= {"later": list(cell.later)} if cell.later else {}

        def normal(seed: int, compute: Callable[[], Any], /) -> Any:
            return self._intermediate.get(part | {"seed": seed}, compute)

        def create() -> LayerAudit:
            with stage("clean features"):
                reuse = Reuse(self._clean_features(inputs, layers), normal, cell.later)
            return LayerAudit(self.model.network, images.images, images.labels, cell.layer, settings, reuse)

        return self._layers.get((images.sha256, cell.layer, settings), create)

    def _clean_features(self, inputs: CellInputs, layers: frozenset[str]) -> Encoded | None:
        """Return the encoded clean images of the cell's layer; None without a run folder.

        All layers of a group are encoded in one pass and kept in the folder, for other estimators, seeds and runs.
        """
        if self._intermediate.folder is None:
            return None
        cache = ActivationCache(self._intermediate.folder / "features")  # mapped: only what is read takes memory
        cell, pixels = inputs.cell, inputs.images.images
        part = partial_identity(inputs.identity, "features")
        part |= {"reduce": cell.settings.reduce, "computed_on": pixels.device.type}

        def read(missing: Sequence[str]) -> Iterator[dict[str, Encoded]]:
            encoders = [Representation(self.model.network, layer, cell.settings.reduce) for layer in missing]
            return encode_layers(encoders, pixels, BATCH)

        for wanted in (layers | {cell.layer}, {cell.layer}):
            try:
                found = cache.get_all({layer: part | {"layer": layer} for layer in sorted(wanted)}, read)
                return Encoded(*(tensor.to(pixels.device) for tensor in found[cell.layer]))
            except Exception:  # of another layer, reported in its own record; else raised again by the estimate
                continue
        return None
