"""The command `validate`: find every fault of a benchmark file."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from audit.commands.options import SourceOptions, json_option, source_options
from audit.config.validation import Finding, Lookups, Request, to_rows, validate


@click.command("validate")
@click.argument("config", type=click.Path(path_type=Path), default=Path("benchmark.yaml"))
@click.option("--schema", is_flag=True, help="Check keys, values, names, files and hashes only; load no model.")
@json_option("the faults as one JSON array")
@source_options
def validate_command(config: Path, schema: bool, as_json: bool, sources: SourceOptions) -> int:
    """Find every fault of the benchmark file CONFIG, each with its line and column.

    Keys, values, names (with nearest matches), files and hashes are checked without torch. If keys and values are
    legal, every model is then loaded, downloaded where it is missing, and each layer is computed on two images.

    Exit code 0 without a fault, else the largest of: 2 the file is wrong, 3 something is missing, 4 refused, 5 a hash
    differs.

    Example: rvaudit validate benchmark.yaml --schema
    """
    from model_zoo.lookup import check_dataset, check_model
    from reports.text import plain_text

    def attempt(request: Request) -> Iterator[Finding]:
        from audit.commands.resolve import run_options
        from audit.run.upkeep.trial import try_model

        yield from try_model(request, run_options(replace(sources, base=config.parent.resolve())))

    def model(ref: str) -> None:
        check_model(ref, config.parent)

    def dataset(ref: str) -> None:
        check_dataset(ref, config.parent)

    verdict = validate(config, Lookups(model, dataset, None if schema else attempt))
    if as_json:
        click.echo(json.dumps(to_rows(verdict)))
        return verdict.exit_code
    for line in verdict.lines:
        click.echo(plain_text(line))
    faults = {0: "no fault", 1: "1 fault"}.get(len(verdict.faults), f"{len(verdict.faults)} faults")
    click.echo(faults if verdict.tried else f"{faults}; models were not loaded, layers not checked", err=True)
    return verdict.exit_code
