"""Evaluate benchmark cells and store their records; consecutive cells share a model, its attacks and searches."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from audit.adversary.attack_checks import Check
from audit.adversary.memory.stages import costs_since_last
from audit.adversary.robustness import Robustness
from audit.adversary.staged.outcome import Accuracy, AttackOutcome
from audit.certificate.results import CurvePoint, LayerCertificate
from audit.errors import AuditError, EnvironmentFault
from audit.flags import FlagCode, flag
from audit.information.estimator import CLEAN, MIEstimate, Origin, Vulnerability
from audit.proportion import Proportion
from audit.records import AuditRecord, RecordStore
from audit.run.assembly import AuditedNetwork, AuditParts, assemble
from audit.run.cell import Cell, sources
from audit.run.encoders.heads import EncoderAccuracy, HeadAccuracy
from audit.run.evidence.collect import kept_images
from audit.run.evidence.kept import ImageKeeper, KeptImages
from audit.run.failures import failure
from audit.run.gates.inputs import CellInputs, check_inputs
from audit.run.identity import failure_id
from audit.run.intermediate import IntermediateResults, Memo, types_by_name
from audit.run.layer_audit import LayerResult, SearchStarts
from audit.run.loading import InputCache, RunOptions, batches_for
from audit.run.model_results import ModelResults
from audit.run.upkeep.pass_meter import PassMeter, expected_passes
from audit.run.warm_starts import SearchResults, runs_before
from audit.storage import scratch_in
from audit.types import Images
from model_zoo.entries import ModelEntry

STORED_TYPES = types_by_name(
    (
        Robustness,
        Accuracy,
        Proportion,
        AttackOutcome,
        Check,
        Vulnerability,
        MIEstimate,
        Origin,
        LayerCertificate,
        CurvePoint,
        EncoderAccuracy,
        HeadAccuracy,
    )
)
OnStage = Callable[[Cell, str], None]


class CellRunner:
    """Evaluates cells one after the other; a model and its results are kept until a cell of another model comes."""

    def __init__(self, options: RunOptions, folder: Path | None = None, on_stage: OnStage | None = None) -> None:
        self.inputs = InputCache(options, folder)
        self.intermediate = IntermediateResults(folder, self.inputs.device, STORED_TYPES)
        self._report: OnStage = on_stage or (lambda _cell, _stage: None)
        self._models: Memo[tuple[str, str], ModelResults] = Memo(slots=1)
        self._searches = SearchResults()
        self._layers: frozenset[str] = frozenset()
        self._keeper = ImageKeeper(folder, keep=options.keep_images)

    def cell_id(self, cell: Cell) -> str:
        """Return the digest of a cell's identity; the id of its failure if the identity cannot be determined."""
        try:
            return self.inputs.open(cell).cell_id
        except Exception:  # reported in the record of the failure
            return failure_id(cell)

    def begin_group(self, cells: Sequence[Cell]) -> None:
        """Keep worst cases of these cells that others of them start from, until the last of those is finished."""
        self._searches = SearchResults(self.cell_id(source) for cell in cells for source in sources(cell))
        self._layers = frozenset(cell.layer for cell in cells)

    def stored(self, cell: Cell, store: RecordStore) -> AuditRecord | None:
        """Return the cell's record if there is a valid one, with images where they are to be kept.

        Raises IntegrityError for a file that is no record.
        """
        record = store.read(self.cell_id(cell))
        return record if record is not None and record.valid and self._keeper.satisfied(record) else None

    def record(self, cell: Cell, store: RecordStore) -> tuple[AuditRecord, bool]:
        """Return the cell's record, and whether it was there; if not, evaluate the cell and store the record."""
        try:
            found = self.stored(cell, store)
        except AuditError as error:
            record = failure(cell, error)
        else:
            record = found or replace(self.compute(cell), timing=costs_since_last())
            for source in sources(cell):
                self._searches.release(self.cell_id(source))
            if found:
                return record, True
        self.save(record, cell, store)
        return record, False

    def save(self, record: AuditRecord, cell: Cell, store: RecordStore) -> None:
        """Store a new record; a valid one replaces the record of an earlier failure."""
        store.write(record)
        if record.valid:
            store.path(failure_id(cell)).unlink(missing_ok=True)
            self.intermediate.clear(record.cell_id)

    def compute(self, cell: Cell) -> AuditRecord:
        """Evaluate a cell; any exception becomes the record of a failure."""
        started = time.monotonic()
        try:
            self._report(cell, "loading")
            self._keeper.check()
            return self._evaluate(self.inputs.open(cell), started)
        except Exception as error:  # a network of others may raise anything, and must not stop the other cells
            checks = self._model(cell).all_sanity_checks if _network_of(cell) in self._models else ()
            return failure(cell, error, checks)

    def _evaluate(self, inputs: CellInputs, started: float) -> AuditRecord:
        cell, results = inputs.cell, self._model(inputs.cell)
        check_inputs(results.model, inputs.images)
        cell.settings.estimator.check_labels(inputs.images.labels)
        with _metered(inputs, results, self.inputs, self._report) as begin:
            results.sanity_checks(inputs)  # first: the record of a later failure states them
            begin("attacking")
            robustness = results.accuracies(inputs)
            begin("estimating information")
            starts = self._starts(inputs)  # first: it audits the layers of earlier cells
            cache = self._searches.cache(inputs.cell_id, self.intermediate)
            result = results.layer_audit(inputs, self._layers).under(cell.threat, starts, cache)
            begun = partial(begin, "certifying")
            certificate = results.certificate(inputs, begun) if cell.settings.certificate else None
            record = assemble(_parts(inputs, results, result, certificate, started))
            return self._keeper.beside(record, partial(_kept, inputs, robustness, result))

    def _model(self, cell: Cell) -> ModelResults:
        return self._models.get(_network_of(cell), lambda: ModelResults.load(cell, self.inputs, self.intermediate))

    def _starts(self, inputs: CellInputs) -> SearchStarts:
        """Return the adversarial images of the attack on the label, and each seed's images of other searches.

        If the clean images were the worst case in a smaller ball, the larger ball is searched from scratch. If they
        were at a later layer, they stay the warm start: images that cannot be merged there cannot be merged here. There
        is no warm start if the order of the layers does not allow it.
        """
        cell, results, few = inputs.cell, self._model(inputs.cell), inputs.images.images[:2]
        robustness, forward = results.accuracies(inputs), cell.settings.estimator.reads_later_layers
        begun, earlier = dict[int, Images](), dict[int, Images]()
        for source in sources(cell):
            same = source.layer == cell.layer
            if forward and not same:
                earlier = {seed: run.all_adversarial for seed, run in self._worst_cases(source).items()}
            elif runs_before(results.model.network, cell.layer, source.layer, few):
                found = self._worst_cases(source)
                begun = {s: run.all_adversarial for s, run in found.items() if not (same and run.origin == CLEAN)}
        return SearchStarts(begun, robustness.accuracy.outcome.images if robustness else None, earlier)

    def _worst_cases(self, cell: Cell) -> dict[int, Vulnerability]:
        """Return the worst cases of an earlier cell, searched again if this process does not have them."""
        inputs = self.inputs.open(cell)
        found = self._searches.get(inputs.cell_id)
        if len(found) == len(cell.settings.seeds):
            return found
        try:
            starts = self._starts(inputs)
            audit = self._model(cell).layer_audit(inputs, self._layers)
            runs = audit.searched(cell.threat, starts, self._searches.cache(inputs.cell_id, self.intermediate))
        except EnvironmentFault:  # may pass: a search without its warm start would contradict the cell's identity
            raise
        except AuditError:  # reported in the record of that cell
            return {}
        self._searches.add(inputs.cell_id, dict(zip(cell.settings.seeds, runs, strict=True)))
        return self._searches.get(inputs.cell_id)


@contextmanager
def _metered(
    inputs: CellInputs, results: ModelResults, cache: InputCache, report: OnStage
) -> Iterator[Callable[[str], None]]:
    """Give a function that begins a stage; the work inside is reported with its passes, in batches that fit.

    Images of searches that do not fit into memory are put into the run folder.
    """
    images, meter = inputs.images.images, PassMeter(partial(report, inputs.cell))
    expected = expected_passes(inputs.cell.settings, len(images), inputs.cell.threat.norm)
    limit = batches_for(results.model.network, images, cache.options)
    with limit, scratch_in(cache.scratch), meter.counting(expected):
        meter.stage("checking the network")
        yield meter.stage


def _kept(inputs: CellInputs, robustness: Robustness | None, result: LayerResult) -> KeptImages:
    found = dict(zip(inputs.cell.settings.seeds, result.per_seed, strict=True))
    return kept_images(inputs.images.images, inputs.images.labels, robustness, found)


def _parts(
    inputs: CellInputs, results: ModelResults, result: LayerResult, certificate: LayerCertificate | None, started: float
) -> AuditParts:
    """Return the parts of a cell's record, of which the model's results are known by now."""
    cell, heads, robustness = inputs.cell, results.encoder.accuracy(inputs), results.accuracies(inputs)
    if heads:  # they classify by the features of the layer alone
        result = result._replace(determines_logits=robustness is not None)
    return AuditParts(
        network=audited_network(cell, inputs.entry, results.model.entry, inputs.images.described()),
        layer=cell.layer,
        threat=cell.threat,
        settings=cell.settings,
        robustness=robustness,
        heads=heads,
        result=result,
        sanity_checks=results.sanity_checks(inputs),
        certificate=certificate,
        identity=inputs.identity,
        device=inputs.images.images.device,
        seconds=time.monotonic() - started,
    )


def _network_of(cell: Cell) -> tuple[str, str]:
    """Return what decides the network of a cell: the model, and the data set that its outputs are reduced to."""
    return cell.ref, cell.dataset if cell.rules.restrict_classes else ""


def audited_network(
    cell: Cell, pinned: ModelEntry, loaded: ModelEntry, applied: Mapping[str, Any] | None = None
) -> AuditedNetwork:
    """Return what a record states of the network; trust without a check becomes a flag.

    `applied` is what was done to images and labels, which the record shows.
    """
    flags = []
    if not pinned.pinned:
        particulars = "the hash of the weights was recorded, not compared with a published one"
        flags.append(flag(FlagCode.UNPINNED, particulars))
    if loaded.code_trusted:
        flags.append(flag(FlagCode.CODE_TRUSTED, "user code built the network"))
    notes = {"reference": loaded.reference, "licence": loaded.licence, "recorded_ref": cell.ref}
    return AuditedNetwork(
        model=cell.name or loaded.name,
        source=loaded.source,
        family=loaded.family or loaded.architecture or "unknown",
        dataset=cell.dataset,
        weights_sha256=pinned.weights_sha256,
        training=loaded.training,
        trained_eps=loaded.trained_eps,
        weights_pinned=pinned.pinned,
        code_trusted=loaded.code_trusted,
        flags=tuple(flags),
        details={
            "renames": list(loaded.renames),
            "notes": notes,
            "published": [asdict(number) for number in loaded.published],
            **(applied or {}),
        },
    )
