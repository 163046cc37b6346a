"""The command `run`: run or resume a benchmark file."""

from dataclasses import dataclass, replace
from pathlib import Path

import click

from audit.commands.options import (
    FOLDER,
    ExecutorOptions,
    SourceOptions,
    executor_options,
    fail_under_option,
    grouped_options,
    json_option,
    keep_images_option,
    source_options,
)


@dataclass(frozen=True)
class ResultOptions:
    """The run folder, what it keeps beside records, and what exit code low accuracies give."""

    out: Path | None
    keep_images: bool
    fail_under: float | None


@click.command("run")
@click.argument("config", type=click.Path(path_type=Path), default=Path("benchmark.yaml"))
@grouped_options(
    "results",
    ResultOptions,
    click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<name of the benchmark>]"),
    keep_images_option,
    fail_under_option,
)
@json_option("the records as one JSON array")
@executor_options
@source_options
def run_command(
    config: Path, results: ResultOptions, as_json: bool, executor: ExecutorOptions, sources: SourceOptions
) -> int:
    """Run the benchmark file CONFIG, or resume it: completed cells of its run folder are skipped.

    Several processes, on this machine or on machines that share the folder, may run the same CONFIG at once.

    Example: rvaudit run benchmark.yaml --jobs 2
    """
    from audit.config.yaml_source import read_config

    benchmark = read_config(config)
    if results.keep_images:
        benchmark = benchmark.model_copy(update={"keep_images": True})
    from audit.commands.execution import below, publish, run_benchmark  # loads torch: faults of the request come first

    folder, sources = results.out or Path("runs") / benchmark.name, replace(sources, base=config.parent.resolve())
    records = run_benchmark(benchmark, config.read_text(encoding="utf-8"), folder, sources, executor)
    publish(records, folder, as_json=as_json)
    return below(records, results.fail_under) if all(record.valid for record in records) else 1
