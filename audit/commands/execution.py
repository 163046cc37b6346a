"""Run a benchmark, calibrate its estimators and publish its reports. Loads torch: import it inside functions."""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from audit.calibration.calibrate import Extent, applicable_channels, calibration_key, settings_key
from audit.commands.display import Display, plain, print_table
from audit.commands.options import ExecutorOptions, SourceOptions
from audit.commands.resolve import run_options
from audit.config.benchmark import BenchmarkConfig
from audit.errors import EnvironmentFault, UsageError
from audit.information.estimator import Estimator
from audit.records import (
    AuditRecord,
    CalibrationRow,
    is_calibrated,
    read_calibration,
    write_calibration,
)
from audit.run.cell import Cell, expand
from audit.run.loading import RunOptions
from audit.run.run_loop import Executor, Watcher, claim, run
from audit.run.upkeep.timing import store_seconds, timed
from model_zoo.model_types import default_cache
from reports.publish import are_current, digest_of_inputs, mark_current, write_figures, write_html
from reports.tables.closing import closing_table
from reports.tables.leftovers import leftover_sentences
from reports.tables.ranking import write_leaderboard
from reports.tables.table import to_rows
from reports.text import format_eps


def run_benchmark(
    config: BenchmarkConfig, text: str, folder: Path, sources: SourceOptions, executor: ExecutorOptions
) -> list[AuditRecord]:
    """Run or resume a benchmark in a folder, calibrate the estimators used, and return the records of all cells.

    `text` is the YAML that the folder keeps. Raises UsageError where the folder holds a run of another benchmark.
    """
    from audit.run.processes import cores, divides

    base = sources.base if isinstance(sources.base, Path) else None
    cells = expand(config, base)
    claim(folder, config, text, base)
    options = replace(run_options(sources), keep_images=config.keep_images)
    records = run_cells(cells, folder, options, executor_of(executor, options))
    processes = executor.jobs or (cores() if divides(cells, options) else 1)
    with timed(folder, "calibration"):
        _calibrate_briefly(config, records, folder, processes)
    return records


def run_cells(
    cells: Sequence[Cell], folder: Path, options: RunOptions, executor: Executor | None = None
) -> list[AuditRecord]:
    """Compute cells with a progress bar, and return their records."""
    before = time.process_time()  # of imports, mostly
    computed = list[AuditRecord]()
    with Display(len(cells)) as display:

        def done(record: AuditRecord, known: bool) -> None:
            display.done(record, known)
            computed.extend([] if known else [record])

        watcher = Watcher(lambda cell, stage: display.stage(cell.name or cell.ref, stage), done)
        records = run(cells, folder, options, watcher, executor)
    store_seconds(folder, "start-up", before)
    if not computed:
        click.echo(f"Note: nothing was to do: {folder} holds all {len(records)} cells already", err=True)
    return records


def executor_of(chosen: ExecutorOptions, options: RunOptions) -> Executor:
    """Return the executor of a run; raises UsageError."""
    if chosen.executor == "ray":
        if chosen.jobs:
            message = f"--jobs {chosen.jobs} is for --executor local; with ray it is --workers {chosen.jobs}"
            raise UsageError(message)
        from audit.run.ray_cluster import RayCluster

        return RayCluster(chosen.address, chosen.workers, chosen.gpus_per_cell)
    from audit.run.processes import FittingProcesses

    return FittingProcesses(options, chosen.jobs)


def calibrate_into(
    estimators: Sequence[Estimator], folder: Path, extent: Extent, processes: int
) -> list[CalibrationRow]:
    """Calibrate estimators with a progress bar, store the rows in a folder, and return them.

    The same settings give the same rows on the same channels, so these are kept for all later runs.
    """
    from audit.run.upkeep.calibrations import calibrate_all

    cache, keys = default_cache(), [calibration_key(each, extent) for each in estimators]
    found = {key: read_calibration(cache, key) for key in keys if is_calibrated(cache, key)}
    missing = {key: each for key, each in zip(keys, estimators, strict=True) if key not in found}
    if missing:
        names, left = list(missing), list(missing.values())
        with Display(sum(len(applicable_channels(each, extent)) for each in left)) as display:
            for number, rows in calibrate_all(left, extent, processes, display.channel):
                found[names[number]] = rows
                with suppress(EnvironmentFault):  # the cache folder is not writable
                    write_calibration(cache, names[number], rows)
    for each, key in zip(estimators, keys, strict=True):
        write_calibration(folder, settings_key(each), found[key])
    return [row for key in keys for row in found[key]]


def _calibrate_briefly(config: BenchmarkConfig, records: Sequence[AuditRecord], folder: Path, processes: int) -> None:
    """Store a brief calibration of every estimator with a valid record, unless the folder has one of any extent."""
    used = {record.estimator for record in records if record.valid}
    estimators = [settings.estimator for settings in config.settings() if settings.estimator.name in used]
    new = [each for each in estimators if not is_calibrated(folder, settings_key(each))]
    calibrate_into(new, folder, "brief", processes)


def publish(records: Sequence[AuditRecord], folder: Path, *, as_json: bool) -> None:
    """Write the reports of a run folder that are not current, print failures, and the records or a summary of them."""
    failures = {f"{plain(record.model)}: {plain(record.reason)}": None for record in records if not record.valid}
    for failure in failures:  # once, however many cells of the model failed
        click.echo(f"Error: {failure}", err=True)
    digest = digest_of_inputs(folder)
    if not are_current(folder, digest):
        for name, write in (("leaderboard", write_leaderboard), ("figures", write_figures), ("page", write_html)):
            with timed(folder, name):
                write(folder)
        mark_current(folder, digest)
    for sentence in leftover_sentences([folder]):
        click.echo(f"Note: {sentence}", err=True)
    if as_json:
        click.echo(json.dumps(to_rows(records), allow_nan=False))
    else:
        _print_summary(records, folder)


def _print_summary(records: Sequence[AuditRecord], folder: Path) -> None:
    found = closing_table(records)
    if not found.rows:
        return
    print_table(found.header, found.rows)
    for note in found.notes:
        click.echo(note)
    click.echo(f"{folder / 'report.html'}  {folder / 'leaderboard.csv'}  {folder / 'figures'}")


def below(records: Sequence[AuditRecord], limit: float | None) -> int:
    """Return 1 if a valid record's adversarial accuracy is below `--fail-under`, after naming the models; else 0."""
    failing = [] if limit is None else [record for record in records if _is_below(record, limit)]
    for record in {(record.model, record.norm, record.eps): record for record in failing}.values():
        measured = f"{plain(record.model)}: adversarial accuracy {record.adversarial_accuracy:.4f}"
        threat = f"{record.norm} {format_eps(record.eps)}"
        click.echo(f"{measured} ({threat}) is below --fail-under {limit:g}", err=True)
    return 1 if failing else 0


def _is_below(record: AuditRecord, limit: float) -> bool:
    accuracy = record.adversarial_accuracy
    return record.valid and accuracy is not None and accuracy < limit
