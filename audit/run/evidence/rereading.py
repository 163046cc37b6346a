"""Re-read the images kept beside records: inside the ball, and giving the accuracies and the nats of the record."""

from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.label_attack import margin
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import ThreatModel, threat_model
from audit.errors import AuditError, IntegrityError
from audit.records import AuditRecord
from audit.representation.headless import Headless
from audit.run.assembly import provenance
from audit.run.cell import Cell
from audit.run.evidence.kept import KeptImages, read_images
from audit.run.gates.inputs import CellInputs
from audit.run.intermediate import Memo
from audit.run.layer_audit import LayerAudit, Reuse
from audit.run.loading import InputCache, RunOptions
from audit.storage import digest
from audit.types import Images, equal_pixels, standard_torch_state
from model_zoo.load import LoadedModel

_ROUNDING = 1e-6  # by how much rounding may take an image out of its ball, and of the radius
_TIE = 1e-4  # of the largest logit: margins that another order of sums may turn
_SAME_NATS = 1e-3  # on one device, where only the order of sums differs
_BATCH = 256


class Reading(NamedTuple):
    """What re-reading the images of a record found: sentences on what is `wrong`, and on what was not `unread`."""

    wrong: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


class Rereader:
    """Re-reads the kept images of records; the last model stays loaded for the next record."""

    def __init__(self, folder: Path, options: RunOptions) -> None:
        self._folder, self._inputs = folder, InputCache(options)
        self._models: Memo[tuple[str, str], LoadedModel] = Memo(slots=1)

    @standard_torch_state()
    def read(self, record: AuditRecord, cell: Cell | None) -> Reading:
        """Return what a record's images show; `cell` is that of the run's benchmark, None if it has none.

        Hash, pixel range and ball are always checked; accuracies and nats need the model and the data set, and the
        estimator must be able to read given images without a new fit.
        """
        try:
            kept = _on_device(read_images(self._folder, record), self._inputs.device)
        except IntegrityError as error:
            return Reading((str(error),))
        wrong = tuple(_outside(kept, threat_model(record.norm, record.eps)))
        if wrong or cell is None:
            return Reading(wrong, () if wrong else ("accuracies and nats: it is no cell of the benchmark",))
        try:
            inputs = self._inputs.open(cell)
            network = self._model(inputs).network
        except AuditError as error:  # such as weights that are not on this machine
            return Reading(unread=(f"accuracies and nats: {next(iter(str(error).splitlines()), '')}",))
        try:
            return _changed(record, inputs, kept) or self._measured(record, cell, network, kept)
        except AuditError as error:
            return Reading((f"its images cannot be read again: {error}",))

    def _measured(self, record: AuditRecord, cell: Cell, network: nn.Module, kept: KeptImages) -> Reading:
        if any(check.get("id") == "determinism" and check.get("passed") is False for check in record.checks):
            return Reading(unread=("accuracies and nats: the outputs of the network are random",))
        later = Reuse(later=cell.later)
        audit = LayerAudit(network, kept.clean, kept.labels, cell.layer, cell.settings, later)
        nats = self._nats(record, audit, kept)
        if isinstance(network, Headless):
            return Reading(nats.wrong, (*nats.unread, "accuracies: the heads would have to be trained again"))
        return Reading((*_accuracies(record, network, kept), *nats.wrong), nats.unread)

    def _nats(self, record: AuditRecord, audit: LayerAudit, kept: KeptImages) -> Reading:
        same, wrong = provenance(self._inputs.device) == record.details.get("provenance"), []
        for row in record.details["per_seed"]:
            found = audit.settings.estimator.read_worst(audit.inputs, kept.worst[row["seed"]], row["seed"])
            if found is None:
                return Reading(unread=(f"nats: {record.estimator} would have to be fitted again",))
            allowed = _SAME_NATS + (0.0 if same else 3 * sqrt(2) * row["worst_nats_se"])
            if not abs(found.nats - row["worst_nats"]) <= allowed:
                wrong.append(f"worst_nats of seed {row['seed']} is {row['worst_nats']}, its images give {found.nats}")
        return Reading(tuple(wrong))

    def _model(self, inputs: CellInputs) -> LoadedModel:
        cell, restricted = inputs.cell, inputs.cell.rules.restrict_classes
        class_map = inputs.images.class_map if restricted else None
        key = cell.ref, cell.dataset if restricted else ""
        return self._models.get(key, lambda: self._inputs.model(cell.ref, class_map))


def _on_device(kept: KeptImages, device: torch.device) -> KeptImages:
    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(array).to(device)

    worst = {seed: tensor(images) for seed, images in kept.worst.items()}
    return KeptImages(tensor(kept.clean), tensor(kept.labels), tensor(kept.adversarial), worst)


def _named(kept: KeptImages) -> dict[str, Images]:
    worst = {f"worst-case images of seed {seed}": images for seed, images in kept.worst.items()}
    return {"adversarial images": kept.adversarial, **worst}


def _outside(kept: KeptImages, threat: ThreatModel) -> Iterator[str]:
    """Yield which images leave the pixel range or the ball around the clean ones."""
    low, high = threat.pixel_range
    allowed = threat.eps * (1 + _ROUNDING) + _ROUNDING
    for name, images in {"clean images": kept.clean, **_named(kept)}.items():
        if illegal := int((~((images >= low) & (images <= high))).flatten(1).any(1).sum()):
            yield f"{illegal} of {len(images)} {name} leave the pixel range [{low:g}, {high:g}]"
    for name, images in _named(kept).items():
        distance = threat.distance(images, kept.clean)
        if illegal := int((~(distance <= allowed)).sum()):
            farthest = float(distance.nan_to_num(nan=torch.inf).max())
            yield f"{illegal} of {len(images)} {name} leave the ball: {farthest:.6g} from clean, eps {threat.eps:.6g}"


def _changed(record: AuditRecord, inputs: CellInputs, kept: KeptImages) -> Reading | None:
    """Return that model, images or settings are not those of the record; None if they are."""
    identity = record.details["identity"]
    if digest(_without_versions(inputs.identity)) != digest(_without_versions(identity)):
        return Reading((f"weights, images or settings differ: the cell is now {inputs.cell_id}",))
    if inputs.cell_id != digest(identity):
        return Reading(unread=("accuracies and nats: this version of rvaudit measures by another method",))
    if not equal_pixels(kept.clean, inputs.images.images) or not torch.equal(kept.labels, inputs.images.labels):
        return Reading(("the clean images or labels are not those of the data set",))
    return None


def _without_versions(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without the versions of methods."""
    plain = {name: value for name, value in identity.items() if name != "version"}
    return {name: _without_versions(value) if isinstance(value, dict) else value for name, value in plain.items()}


def _accuracies(record: AuditRecord, network: nn.Module, kept: KeptImages) -> Iterator[str]:
    """Yield accuracies that differ by more than the images whose margin is a tie up to rounding."""
    for name, images in (("natural_accuracy", kept.clean), ("adversarial_accuracy", kept.adversarial)):
        found = logits_of(network, images, _BATCH)
        margins = margin(found, kept.labels)
        ties = int((margins.abs() <= _TIE * found.abs().amax()).sum())
        stated, correct = getattr(record, name) * record.images, int((margins > 0).sum())
        if abs(stated - correct) > ties + _ROUNDING * record.images:
            yield f"{name} is {getattr(record, name)}, its images give {correct}/{record.images}"
