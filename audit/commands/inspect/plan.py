"""The command `plan`: forecast the cost of a benchmark."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, SourceOptions, json_option, source_options
from audit.config.benchmark import BenchmarkConfig

_SIZES = (("GB", 1e9), ("MB", 1e6))


@click.command("plan")
@click.argument("config", type=click.Path(path_type=Path), default=Path("benchmark.yaml"))
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<name of the benchmark>]")
@json_option("one JSON object")
@source_options
def plan_command(config: Path, out: Path | None, as_json: bool, sources: SourceOptions) -> int:
    """Forecast the cost of the benchmark CONFIG: cells, passes, time, memory and disk; completed cells cost nothing.

    The time is rough: it comes from a short calibration on this machine under its present load.

    Example: rvaudit plan benchmark.yaml
    """
    from audit.config.yaml_source import read_config

    benchmark, sources = read_config(config), replace(sources, base=config.parent.resolve())
    print_forecast(benchmark, out or Path("runs") / benchmark.name, sources, as_json=as_json)
    return 0


def print_forecast(benchmark: BenchmarkConfig, folder: Path, sources: SourceOptions, *, as_json: bool) -> None:
    """Print the forecast of a benchmark whose records lie in a folder, of the cells that have none."""
    from audit.records import RecordStore
    from audit.run.evidence.kept import finished
    from audit.run.upkeep.progress import cell_statuses, counts
    from model_zoo.lookup import expand_ref

    store = RecordStore(folder)
    known = finished(store.folder, store.present(), keep=benchmark.keep_images)
    statuses = cell_statuses(benchmark, known, partial(expand_ref, base=sources.base))
    from audit.commands.display import Display
    from audit.commands.resolve import run_options
    from audit.run.upkeep.model_forecasts import estimator_rates, model_forecasts

    with Display(len({each.estimator for each in statuses})) as display:
        rates = estimator_rates(benchmark, statuses, display.channel)
    with Display(len({(each.model, each.dataset) for each in statuses})) as display:
        found = model_forecasts(benchmark, statuses, rates, run_options(sources), display.channel)
    rows = [
        {"model": each.model, "dataset": each.dataset, "cells": each.cells, **each.cost._asdict()} for each in found
    ]
    if as_json:
        click.echo(json.dumps({"cells": counts(statuses), **_totals(rows), "models": rows}, allow_nan=False))
    else:
        _print_plan(counts(statuses), rows)


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of passes, time and disk, and the largest memory."""
    sums = {name: sum(row[name] for row in rows) for name in ("passes", "seconds", "disk")}
    return {**sums, "memory": max((row["memory"] for row in rows), default=0)}


def _print_plan(numbers: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> None:
    from audit.commands.display import print_table

    click.echo(", ".join(f"{count} cells {state}" for state, count in numbers.items()))
    if not rows:
        return
    header = ("model", "data set", "cells", "passes", "time", "memory", "disk")
    print_table(header, [(row["model"], row["dataset"], row["cells"], *_costs(row)) for row in rows])
    passes, time, memory, disk = _costs(_totals(rows))
    click.echo(f"In total about {passes} passes, {time}, {memory} of memory and {disk} on disk.")
    click.echo("A pass is one forward and backward pass of one image. Time is rough, from a short calibration.")


def _costs(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return f"{row['passes']:,.0f}", duration(row["seconds"]), _size(row["memory"]), _size(row["disk"])


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours.

    >>> duration(90), duration(600)
    ('90.0 s', '10.0 min')
    """
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(count: float) -> str:
    for unit, length in _SIZES:
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
