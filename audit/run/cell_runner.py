"""One cell into one record: the model and its images are loaded, attacked and measured, and what they share is kept.

With `benchmark.py` the only module beside command lines and studies that joins measurements and registry.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from audit.adversary.attack_checks import Check
from audit.adversary.robustness import Robustness, Target, attacked
from audit.certificate.certificate import VERSION as CERTIFICATE_VERSION
from audit.certificate.certificate import CertificateSettings
from audit.certificate.layers import Case, CertificationSettings, Examples, LayerCertificate, certify_layers
from audit.errors import AuditError, EnvironmentFault, UsageError
from audit.information.estimator import CLEAN, Vulnerability
from audit.records import VERSION, AuditRecord, RecordStore
from audit.representation.cache import FeatureStore
from audit.representation.layers import Representation, encode_layers
from audit.run.cell import Cell
from audit.run.failures import failed_id, failure, provenance, with_certificate
from audit.run.intermediate import FOLDER, Parts
from audit.run.layer_audit import LayerAudit, assemble, check_input
from audit.run.sanity_checks import gated, gates
from audit.run.warm_starts import path, runs_before
from audit.storage import digest
from audit.types import Encoded, Images
from model_zoo.entries import ModelEntry, parse_ref
from model_zoo.images.load import NAMED, ImageRequest, ImageSet, check_fit, load_at_most, load_images
from model_zoo.load import LoadedModel, SourceSettings, identify, load_model

_BATCH = 256  # images that go through a network at once
_EXAMPLES = 1000  # training images that heads beside a certificate learn on
_SHARED = ("version", "network", "architecture", "code_sha256", "weights_sha256", "data_sha256")
_DECIDING_OPTIONS = ("arch", "num_classes", "mean", "std", "shape")


@dataclass(frozen=True)
class RunOptions:
    """Where things come from and what may be done: nothing here decides a number."""

    sources: SourceSettings = field(default_factory=SourceSettings)
    data_dir: Path = Path("data")
    device: str = "auto"


@dataclass(frozen=True)
class Watcher:
    """What a run tells while it goes: a stage of a cell, and a record with whether it was already there."""

    stage: Callable[[Cell, str], None] = lambda _cell, _stage: None
    done: Callable[[AuditRecord, bool], None] = lambda _record, _known: None


def device_of(name: str) -> torch.device:
    """Return the device of a name; `auto` takes the GPU where there is one. Raises UsageError, EnvironmentFault."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}; legal: auto, cpu, cuda, cuda:<number>, mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"device {name!r} is not here: {torch.cuda.device_count()} GPUs are; use --device cpu")
    return device


class Workbench:
    """One model, one set of images and the accuracies measured with them, kept while consecutive cells share them."""

    def __init__(self, options: RunOptions, watcher: Watcher, folder: Path | None = None) -> None:
        self.options, self.watcher = options, watcher
        self.device = device_of(options.device)
        self.parts = Parts(folder, self.device)
        self._images: dict[tuple[str, int | None], ImageSet] = {}
        self._training: dict[str, ImageSet] = {}
        self._entries: dict[str, ModelEntry] = {}
        self._model: tuple[str, LoadedModel] | None = None
        self._certificates: dict[str, LayerCertificate] = {}
        self._attacked: dict[str, Robustness] = {}
        self._gated: dict[str, tuple[Check, ...]] = {}
        self._layer: tuple[str, LayerAudit] | None = None
        self._layers: set[str] = set()
        self._followers: Counter[str] = Counter()
        self._searched: dict[str, dict[int, Vulnerability]] = {}

    def cell_id(self, cell: Cell) -> str:
        """Return the hash of what decides the cell's numbers; of its name where that cannot be found out."""
        try:
            return digest(self._identity(cell))
        except Exception:  # the record of the failure will say it
            return failed_id(cell)

    def follow(self, cells: Sequence[Cell]) -> None:
        """Keep the worst-case images of those cells that others of these follow, until the last of them is done."""
        self._searched.clear()
        self._layers = {cell.layer for cell in cells}
        self._followers = Counter(self.cell_id(cell.after) for cell in cells if cell.after)

    def record(self, cell: Cell, store: RecordStore) -> AuditRecord:
        """Return the cell's record, measured and stored where it is not there yet."""
        try:
            known = store.read(self.cell_id(cell))
        except AuditError as error:
            return self.keep(failure(cell, error), cell, store)
        if known is None or not known.valid:  # what failed is tried again
            known = self.keep(self.compute(cell), cell, store)
        else:
            self.watcher.done(known, True)
        self._release(cell)
        return known

    def keep(self, record: AuditRecord, cell: Cell, store: RecordStore) -> AuditRecord:
        """Store a new record, in the place of that of an earlier failure."""
        store.write(record)
        if record.valid:
            store.path(failed_id(cell)).unlink(missing_ok=True)
            self.parts.forget(record.cell_id)
        self.watcher.done(record, False)
        return record

    def compute(self, cell: Cell) -> AuditRecord:
        """Measure a cell; whatever goes wrong becomes a record that says so."""
        started = time.monotonic()
        try:
            self.watcher.stage(cell, "loading")
            images, entry = self._image_set(cell), self._entry(cell.ref)
            identity = self._identity(cell)
            record = self._measure(cell, images)
        except Exception as error:  # a foreign network may raise anything, and must not stop the others
            seen = [check._asdict() for found in self._gated.values() for check in found]
            return replace(failure(cell, error), checks=tuple(seen) if self._holds(cell.ref) else ())
        named = _labelled(record, cell, entry, replace(self._loaded(cell.ref).entry, ref=cell.ref))
        details = {
            **named.details, "identity": identity, "provenance": provenance(self.device), "data_sha256": images.sha256
        }  # fmt: skip
        return replace(named, cell_id=digest(identity), seconds=time.monotonic() - started, details=details)

    def _identity(self, cell: Cell) -> dict[str, Any]:
        found = _identity(cell, self._image_set(cell), self._entry(cell.ref))
        if not cell.settings.certificate:
            return found
        training = self._training_set(cell)
        return {**found, "examples_sha256": training.sha256 if training else None}

    def _measure(self, cell: Cell, images: ImageSet) -> AuditRecord:
        model = self._loaded(cell.ref)
        check_fit(model, images)
        pixels, labels = images.images, images.labels
        check_input(model.network, pixels, labels)
        shut = self._gates(cell, model, images)
        self.watcher.stage(cell, "attacking")
        robustness = self._robustness(cell, model, images)
        self.watcher.stage(cell, "estimating information")
        starts = self._starts(cell)
        measured = self._audit(cell).under(cell.threat, starts)
        record = gated(assemble(robustness, measured, cell.layer, cell.threat, cell.settings), shut)
        if not cell.settings.certificate:
            return record
        return with_certificate(record, self._certified(cell, model, images))

    def _audit(self, cell: Cell) -> LayerAudit:
        model, images = self._loaded(cell.ref), self._image_set(cell)
        key = f"{cell.ref} {images.sha256} {cell.layer} {cell.settings}"
        if self._layer is None or self._layer[0] != key:
            clean = self._clean(cell)
            asked = LayerAudit(model.network, images.images, images.labels, cell.layer, cell.settings, clean)
            self._layer = (key, asked)
        self._layer[1].keep = partial(self._estimate, cell)
        return self._layer[1]

    def _clean(self, cell: Cell) -> Encoded | None:
        """Return what the cell's layer says of the clean images: read with all layers of its group in one pass, once.

        Estimators and seeds share it, and a resumed run has it back. None without a run folder.
        """
        if self.parts.run is None or not self.parts.run.is_dir():
            return None
        store = FeatureStore(self.parts.run / FOLDER / "features")  # mapped: only what is read below takes memory
        shared = _part(self._identity(cell), "features")
        shared |= {"reduce": cell.settings.reduce, "computed_on": self.device.type}
        network, pixels = self._loaded(cell.ref).network, self._image_set(cell).images

        def read(layers: Sequence[str]) -> Iterator[dict[str, Encoded]]:
            encoders = [Representation(network, layer, cell.settings.reduce) for layer in layers]
            return encode_layers(encoders, pixels, _BATCH)

        for layers in ({*self._layers, cell.layer}, {cell.layer}):
            try:
                found = store.get_all({layer: shared | {"layer": layer} for layer in sorted(layers)}, read)
                return Encoded(*(part.to(self.device) for part in found[cell.layer]))
            except Exception:  # of another layer, whose own record says it; else the measurement says it
                continue
        return None

    def _starts(self, cell: Cell) -> dict[int, Images]:
        """Return each seed's worst-case images of the cell that this one follows; none where it cannot be followed.

        Nor where no image was worth moving in the smaller ball: then the larger one is searched from scratch. What no
        search can merge at a later layer none will merge here.
        """
        if cell.after is None or not self._can_follow(cell, cell.after):
            return {}
        found, same = self._followed(cell.after), cell.layer == cell.after.layer
        return {seed: run.start for seed, run in found.items() if not (same and run.served == CLEAN)}

    def _followed(self, cell: Cell) -> dict[int, Vulnerability]:
        known = self.cell_id(cell)
        found = self._searched.get(known, {})
        if len(found) < len(cell.settings.seeds):  # its record was there already, or is another process's
            try:
                starts = self._starts(cell)  # first: it makes the audits of cells further back
                runs = self._audit(cell).searched(cell.threat, starts)
            except EnvironmentFault:  # would pass, and leave a number under an identity that says otherwise
                raise
            except AuditError:  # the record of that cell says why
                return {}
            found = dict(zip(cell.settings.seeds, runs, strict=True))
            self._searched[known] = found
        return found

    def _release(self, cell: Cell) -> None:
        """Let go of the images that a cell which is done has followed, if no other one will."""
        if cell.after is not None:
            known = self.cell_id(cell.after)
            self._followers[known] -= 1
            if self._followers[known] <= 0:
                self._searched.pop(known, None)

    def _can_follow(self, cell: Cell, after: Cell) -> bool:
        few = self._image_set(cell).images[:2]
        return runs_before(self._loaded(cell.ref).network, cell.layer, after.layer, few)

    def _gates(self, cell: Cell, model: LoadedModel, images: ImageSet) -> tuple[Check, ...]:
        """What makes the network unfit to be ranked belongs to it and its images: layers and threat models share it."""
        if images.sha256 not in self._gated:
            told = model.entry.published if model.entry.dataset == cell.dataset else ()
            published = next((number.value for number in told if number.metric == "natural_accuracy"), None)
            self._gated[images.sha256] = gates(model.network, images.images, images.labels, published)
        return self._gated[images.sha256]

    def _certified(self, cell: Cell, model: LoadedModel, images: ImageSet) -> LayerCertificate:
        """A certificate belongs to a layer and a threat model: estimators share it."""
        key = f"{images.sha256} {cell.layer} {cell.threat} {cell.settings.attack} {cell.settings.seeds[0]}"
        if key not in self._certificates:
            self.watcher.stage(cell, "certifying")
            case = Case(model.network, images.images, images.labels, len(images.classes), examples=self._examples(cell))
            ask = CertificationSettings(CertificateSettings(seed=cell.settings.seeds[0]), cell.settings.attack)
            made = _part(self._identity(cell), "certificate", "layer", "norm", "eps", "examples_sha256")
            made |= {"attack": repr(ask.attack), "seed": ask.certificate.seed, "method": CERTIFICATE_VERSION}
            self._certificates[key] = self.parts.get(
                made, lambda: certify_layers(case, [cell.layer], [cell.threat], ask)[0].row
            )
        return self._certificates[key]

    def _examples(self, cell: Cell) -> Examples | None:
        training = self._training_set(cell)
        if training is None:
            return None
        return Examples(training.images.to(self.device), training.labels.to(self.device))

    def _training_set(self, cell: Cell) -> ImageSet | None:
        """Images of the training split to train heads on; sets without one have the network's own head only."""
        if cell.dataset not in NAMED:
            return None
        if cell.dataset not in self._training:
            options = self.options
            asked = ImageRequest(_EXAMPLES, "train", data_dir=options.data_dir, offline=options.sources.offline)
            self._training = {cell.dataset: load_at_most(cell.dataset, asked)}
        return self._training[cell.dataset]

    def _robustness(self, cell: Cell, model: LoadedModel, images: ImageSet) -> Robustness:
        """What attacks found belongs to a model and a threat model: layers share them."""
        key = f"{images.sha256} {cell.threat} {cell.settings.attack} {cell.settings.seeds[0]}"
        if key not in self._attacked:
            attack, seed = cell.settings.attack, cell.settings.seeds[0]
            target = Target(model.network, images.images, images.labels)
            made = _part(self._identity(cell), "attack", "norm", "eps") | {"attack": repr(attack), "seed": seed}
            self._attacked[key] = self.parts.get(made, lambda: _told(attacked(target, cell.threat, attack, seed)))
        return self._attacked[key]

    def _estimate(self, cell: Cell, seed: int, case: str, compute: Callable[[], Any]) -> Any:
        """Return one seed's estimate: the normal case belongs to all threat models, the worst to its cell alone."""
        identity = self._identity(cell)
        if case == "worst":
            known = digest(identity)
            followed = self._followers[known] > 0
            part = {"part": "worst", "cell": known, "seed": seed}
            found = self.parts.get(part, compute, "" if followed else known)
            if followed:
                self._searched.setdefault(known, {})[seed] = found
            return found
        settings = identity["settings"]
        made = _part(identity, "normal", "layer") | {"estimator": settings["estimator"], "reduce": settings["reduce"]}
        return self.parts.get(made | {"seed": seed}, compute)

    def _image_set(self, cell: Cell) -> ImageSet:
        """The cell's images, moved to the device once."""
        key = (cell.dataset, cell.images)
        if key not in self._images:
            request = ImageRequest(
                count=cell.images, data_dir=self.options.data_dir, offline=self.options.sources.offline
            )
            found = load_images(cell.dataset, request)
            pixels, labels = found.images.to(self.device), found.labels.to(self.device)
            self._images = {key: replace(found, images=pixels, labels=labels)}
        return self._images[key]

    def _entry(self, ref: str) -> ModelEntry:
        if ref not in self._entries:
            self._entries[ref] = identify(ref, self.options.sources)
        return self._entries[ref]

    def _holds(self, ref: str) -> bool:
        return self._model is not None and self._model[0] == ref

    def _loaded(self, ref: str) -> LoadedModel:
        if self._model is None or self._model[0] != ref:
            self._attacked.clear()
            self._certificates.clear()
            self._gated.clear()
            model = load_model(ref, self.options.sources)
            model.network.to(self.device)
            self._model = (ref, model)
        return self._model[1]


def _told(found: Robustness) -> Robustness:
    """Leave out the adversarial images: no record reads them, and they are most of what an attack leaves."""
    siege = found.accuracy.siege
    return found._replace(accuracy=found.accuracy._replace(siege=siege._replace(images=siege.images[:0].clone())))


def _part(identity: dict[str, Any], part: str, *names: str) -> dict[str, Any]:
    """Return what decides a part of a cell: the network and its images, and what is named of the cell's identity."""
    return {"part": part, **{name: identity[name] for name in (*_SHARED, *names)}}


def _identity(cell: Cell, images: ImageSet, entry: ModelEntry) -> dict[str, Any]:
    """Everything that decides the cell's numbers, and nothing that does not."""
    settings = asdict(cell.settings)
    settings["estimator"]["name"] = cell.settings.estimator.name
    for bound in cell.settings.estimator.memory_only:
        del settings["estimator"][bound]
    settings |= {"seeds": list(cell.settings.seeds)}  # a list, as JSON reads it back
    del settings["attack"]["fast"]  # decides cost only
    settings["attack"]["version"] = cell.settings.attack.version_in(cell.threat.norm)
    if settings["certificate"]:
        settings["certificate"] = CERTIFICATE_VERSION
    else:
        del settings["certificate"]  # one measurement more changes no other
    for name in ("stages", "borrowed"):
        settings["attack"][name] = list(settings["attack"][name])
    for stage in settings["attack"]["stages"]:
        del stage["pgd"]["batch_size"]  # bounds memory only
    followed = {"after": path(cell)} if cell.after else {}
    return {
        **followed,
        "version": VERSION,
        "network": _network_identity(cell.ref),
        "architecture": entry.architecture,
        "code_sha256": entry.code_sha256,
        "weights_sha256": entry.weights_sha256,
        "data_sha256": images.sha256,
        "layer": cell.layer,
        "norm": cell.threat.norm,
        "eps": cell.threat.eps,
        "settings": settings,
    }


def _network_identity(ref: str) -> str | dict[str, str]:
    """The same weights make another network with another normalisation; a file's path and labels decide nothing."""
    parsed = parse_ref(ref)
    if parsed.source != "file":
        return ref
    return {name: parsed.options[name] for name in _DECIDING_OPTIONS if name in parsed.options}


def _labelled(record: AuditRecord, cell: Cell, pinned: ModelEntry, loaded: ModelEntry) -> AuditRecord:
    """Fill in who was audited; trust that was only taken on faith becomes a flag."""
    flags = list(record.flags)
    if not pinned.pinned:
        flags.append("unpinned: the hash of the weights was recorded, not compared with a published one")
    if loaded.code_trusted:
        flags.append("code_trusted: user code built the network")
    notes = {"reference": loaded.reference, "licence": loaded.licence, "recorded_ref": loaded.ref}
    published = [asdict(number) for number in loaded.published]
    return replace(
        record,
        model=cell.name or loaded.name,
        source=loaded.source,
        family=loaded.family or loaded.architecture or "unknown",
        training=loaded.training,
        trained_eps=loaded.trained_eps,
        dataset=cell.dataset,
        weights_sha256=pinned.weights_sha256,
        weights_pinned=pinned.pinned,
        code_trusted=loaded.code_trusted,
        flags=tuple(flags),
        details={**record.details, "renames": list(loaded.renames), "notes": notes, "published": published},
    )
