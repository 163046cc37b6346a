"""The commands around a run: `validate` a benchmark file, `plan` it, the `status` of a run folder; who computes it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, run_options, source_options
from audit.errors import AuditError, UsageError

_CONFIG = click.Path(path_type=Path)
_BATCH = 256
_WORTH = 3000  # images of all cells: fewer are done before another process has started
_PROCESS_BYTES = 0.6e9  # of a process with torch, before it has loaded a model


def executor_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say who computes the cells of a run."""
    options: list[Callable[[Callable[..., Any]], Callable[..., Any]]] = [
        click.option(
            "--executor",
            type=click.Choice(["local", "ray"]),
            default="local",
            show_default=True,
            help="On this machine, or on a Ray cluster, cells that share a search together.",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(1),
            default=None,
            help="Processes that share the models of a local run. [one a core; 1 on a GPU, or for a short run]",
        ),
        click.option("--address", default=None, help="The Ray cluster. [one on this machine]"),
        click.option("--workers", type=click.IntRange(1), default=None, help="Processes of Ray on this machine."),
        click.option("--gpus-per-cell", type=click.FloatRange(0), default=0.0, show_default=True, help="Such as 0.25."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def run_cells(cells: list[Any], folder: Path, where: dict[str, Any]) -> list[Any]:
    """Compute cells as the executor's and the source options say, and return their records; raises UsageError."""
    from audit.commands.display import Display
    from audit.run.cell_runner import Watcher
    from audit.run.run_loop import run

    options, count = run_options(where), where.get("jobs")
    if where.get("executor") == "ray" and count:
        raise UsageError(f"--jobs {count} is for --executor local; with ray it is --workers {count}")
    with Display(len(cells)) as display:
        watcher = Watcher(lambda cell, stage: display.stage(cell.name or cell.ref, stage), display.done)
        if where.get("executor") == "ray":
            from audit.run.ray_cluster import Cluster, run_on_ray

            cluster = Cluster(where["address"], where["workers"], where["gpus_per_cell"])
            return run_on_ray(cells, folder, options, watcher, cluster)
        count = min(count or _fitting_jobs(cells, where), len({(cell.ref, cell.dataset) for cell in cells}))
        if count > 1:
            from audit.run.processes import Jobs, run_in_jobs

            return run_in_jobs(cells, folder, options, watcher, Jobs(count))
        return run(cells, folder, options, watcher)


def _fitting_jobs(cells: list[Any], where: dict[str, Any]) -> int:
    """Return how many processes are worth starting: one a core, as far as half of the free memory holds them."""
    from audit.run.cell_runner import device_of
    from audit.run.processes import cores, free_bytes

    images = sum(cell.images or _WORTH for cell in cells)
    if images < _WORTH or device_of(where["device"]).type != "cpu":
        return 1
    models = {(cell.ref, cell.dataset): cell for cell in cells}
    if len(models) < 2 or cores() < 2:
        return 1
    largest = max(_model_bytes(cell, where) for cell in models.values())
    return max(1, min(cores(), int(free_bytes() / 2 / (_PROCESS_BYTES + largest))))


def _model_bytes(cell: Any, where: dict[str, Any]) -> int:
    """Return what a batch of a model takes; 0 where it cannot be loaded, which its records will tell."""
    from audit.config.validation import Request
    from audit.run.upkeep.forecast import batch_bytes
    from model_zoo.load import load_model

    try:
        images = _first_images(Request(cell.ref, cell.dataset, 1, (), ""), where)
        return batch_bytes(load_model(cell.ref, run_options(where).sources).network, images.images, _BATCH)
    except Exception:  # a foreign network may raise anything
        return 0


@click.command("validate")
@click.argument("config", type=_CONFIG, default=Path("benchmark.yaml"))
@click.option("--schema", is_flag=True, help="Keys, values, names, files and hashes only: load no model.")
@click.option("--json", "as_json", is_flag=True, help="Print the faults as one JSON array, nothing else.")
@source_options
def validate_command(config: Path, schema: bool, as_json: bool, **where: Any) -> int:
    """Find every fault of the benchmark file CONFIG, each with its line and column.

    Keys and values, names with their nearest matches, files and hashes; then every model is loaded, fetched where it
    is not here, and its layers are looked at on two images. Nothing of that needs torch before the keys are right.

    Exit code: 0 none, else the gravest: 2 the file is wrong, 3 something is not here, 4 refused, 5 another hash.
    """
    from audit.config.validation import Lookups, to_rows, validate
    from model_zoo.lookup import check_dataset, check_model

    verdict = validate(config, Lookups(check_model, check_dataset, None if schema else _attempts(where)))
    if as_json:
        click.echo(json.dumps(to_rows(verdict)))
        return verdict.exit_code
    from reports.text import plain_text

    for line in verdict.lines:
        click.echo(plain_text(line))
    click.echo(_summary(len(verdict.faults), verdict.tried), err=True)
    return verdict.exit_code


def _summary(faults: int, tried: bool) -> str:
    found = {0: "no fault", 1: "1 fault"}.get(faults, f"{faults} faults")
    return found if tried else f"{found}; models were not loaded, layers not looked at"


def _attempts(where: dict[str, Any]) -> Any:
    """Return how one model is tried, a closure so that torch waits until the first is."""

    def attempt(request: Any) -> Iterator[Any]:
        from audit.config.validation import Finding
        from model_zoo.lookup import expand_ref

        try:
            refs = expand_ref(request.ref)
        except AuditError as error:
            yield Finding("ref", error)
            return
        try:
            images = _first_images(request, where)
        except AuditError as error:
            yield Finding("images" if _only_the_count(request, where) else "dataset", error)
            return
        seen: set[str] = set()
        for ref in refs:
            for finding in _tried(ref, request, images, where):
                if (told := f"{finding.part} {finding.error}") not in seen:
                    seen.add(told)
                    yield finding

    return attempt


def _first_images(request: Any, where: dict[str, Any]) -> Any:
    from model_zoo.images.load import ImageRequest, load_images

    options = run_options(where)
    asked = ImageRequest(request.images, data_dir=options.data_dir, offline=options.sources.offline)
    return load_images(request.dataset, asked)


def _only_the_count(request: Any, where: dict[str, Any]) -> bool:
    """Return whether a single image of the set could be had: then too many were asked for."""
    try:
        _first_images(request._replace(images=1), where)
    except AuditError:
        return False
    return request.images is not None


def _tried(ref: str, request: Any, images: Any, where: dict[str, Any]) -> Iterator[Any]:
    """Yield what is wrong with one model, its fit to the images, and each of its layers."""
    from audit.config.validation import Finding
    from audit.representation.layers import Representation
    from model_zoo.images.load import check_fit
    from model_zoo.load import load_model

    try:
        loaded = load_model(ref, run_options(where).sources)
        check_fit(loaded, images)
    except Exception as error:  # a foreign network may raise anything
        yield Finding("ref", _ours(error))
        return
    for number, layer in enumerate(request.layers):
        try:
            Representation(loaded.network, layer, request.reduce)(images.images[:2])
        except Exception as error:
            yield Finding(number, _ours(error))


def _ours(error: Exception) -> AuditError:
    if isinstance(error, AuditError):
        return error
    first = next(iter(str(error).splitlines()), "")
    return UsageError(f"{type(error).__name__}: {first}".removesuffix(": "))


@click.command("status")
@click.argument("run", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array of cells, nothing else.")
def status_command(run: Path, as_json: bool) -> int:
    """Tell which cells of the run folder RUN are done, failed or to do; exit code 1 where one failed."""
    from audit.run.upkeep.progress import FAILED, counts, run_standings
    from model_zoo.lookup import expand_ref

    found = run_standings(run, expand_ref)
    numbers = counts(found)
    if as_json:
        click.echo(json.dumps([each._asdict() for each in found]))
        return 1 if numbers[FAILED] else 0
    from reports.text import format_eps, plain_text

    for each in found:
        if each.state == FAILED:
            click.echo(plain_text(f"failed: {each.model}, {each.layer}, {format_eps(each.eps)}: {each.reason}"))
    click.echo(f"{len(found)} cells: " + ", ".join(f"{count} {state}" for state, count in numbers.items()))
    return 1 if numbers[FAILED] else 0


@click.command("plan")
@click.argument("config", type=_CONFIG, default=Path("benchmark.yaml"))
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<name of the benchmark>]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@source_options
def plan_command(config: Path, out: Path | None, as_json: bool, **where: Any) -> int:
    """Forecast what the benchmark CONFIG costs: cells, passes, time, memory and disk; finished cells cost nothing.

    Time is rough: it is from a short calibration on this machine as busy as it is now.
    """
    from audit.config.yaml_source import read_config
    from audit.records import RecordStore
    from audit.run.upkeep.progress import counts, standings
    from model_zoo.lookup import expand_ref

    benchmark = read_config(config)
    folder = out or Path("runs") / benchmark.name
    found = standings(benchmark, RecordStore(folder), expand_ref)
    rows = _forecasts(benchmark, found, where)
    if as_json:
        click.echo(json.dumps({"cells": counts(found), **_totals(rows), "models": rows}, allow_nan=False))
    else:
        _print_plan(counts(found), rows)
    return 0


def _forecasts(benchmark: Any, found: list[Any], where: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the forecast of every model with cells to do, in the order of the run."""
    from audit.commands.display import Display
    from audit.run.upkeep.progress import DONE

    todo = [each for each in found if each.state != DONE]
    models = list(dict.fromkeys((each.model, each.dataset) for each in todo))
    if not models:
        return []
    rates = _rates(benchmark, todo)
    rows = []
    with Display(len(models)) as display:
        for number, (ref, dataset) in enumerate(models):
            display.channel(f"timing {ref}", number)
            mine = [each for each in todo if (each.model, each.dataset) == (ref, dataset)]
            rows.append({"model": ref, "dataset": dataset, **_forecast_one(benchmark, mine, rates, where)})
    return rows


def _rates(benchmark: Any, todo: list[Any]) -> dict[str, Any]:
    """Return what each estimator costs, by its name, calibrated on a small model that comes with the package."""
    from dataclasses import replace

    from audit.adversary.threat import threat_model
    from audit.commands.display import Display
    from audit.run.upkeep.forecast import SIZES, Sample, calibrate
    from model_zoo.images.load import ImageRequest, load_images
    from model_zoo.load import load_model

    images = load_images("digits", ImageRequest(SIZES[-1]))
    sample = Sample(load_model("bundled:digits-vgg-standard").network, images.images, images.labels)
    used = {each.estimator for each in todo}
    found: dict[str, Any] = {}
    with Display(len(used)) as display:
        for settings in benchmark.settings():
            if settings.estimator.name in used:
                display.channel(f"calibrating {settings.estimator.name}", len(found))
                one = replace(settings, seeds=settings.seeds[:1], certificate=False)
                found[settings.estimator.name] = calibrate(sample, threat_model("linf", 0.2), one)
    return found


def _forecast_one(benchmark: Any, mine: list[Any], rates: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    from audit.config.validation import Request
    from audit.run.cell_runner import device_of
    from audit.run.upkeep.forecast import Work, batch_bytes, forecast, seconds_per_pass
    from model_zoo.images.load import check_fit
    from model_zoo.load import load_model

    ref, dataset = mine[0].model, mine[0].dataset
    options = run_options(where)
    device = device_of(options.device)
    images = _first_images(Request(ref, dataset, mine[0].images, (), ""), where)
    loaded = load_model(ref, options.sources)
    check_fit(loaded, images)
    network, pixels = loaded.network.to(device), images.images[:64].to(device)
    work = Work(
        len(images.images), len(benchmark.seeds), len({(each.norm, each.eps) for each in mine}),
        tuple(rates[each.estimator] for each in mine),
    )  # fmt: skip
    cost = forecast(work, seconds_per_pass(network, pixels), batch_bytes(network, pixels, _BATCH))
    return {"cells": len(mine), **cost._asdict()}


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Passes, time and disk add up; the largest memory counts."""
    added = {name: sum(row[name] for row in rows) for name in ("passes", "seconds", "disk")}
    return {**added, "memory": max((row["memory"] for row in rows), default=0)}


def _print_plan(numbers: dict[str, int], rows: list[dict[str, Any]]) -> None:
    from audit.commands.display import print_table

    click.echo(", ".join(f"{count} cells {state}" for state, count in numbers.items()))
    if not rows:
        return
    header = ("model", "data set", "cells", "passes", "time", "memory", "disk")
    print_table(header, [(row["model"], row["dataset"], row["cells"], *_costs(row)) for row in rows])
    all_costs = dict(zip(header[3:], _costs(_totals(rows)), strict=True))
    click.echo("In all about " + ", ".join(f"{name} {cost}" for name, cost in all_costs.items()) + ".")
    click.echo("Passes are forward and backward of one image. Time is rough, from a short calibration.")


def _costs(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return f"{row['passes']:,.0f}", duration(row["seconds"]), _size(row["memory"]), _size(row["disk"])


def duration(seconds: float) -> str:
    """Return a duration as people say it: seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(count: float) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
