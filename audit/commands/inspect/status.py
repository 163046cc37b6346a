"""The command `status`: progress of a run."""

import json
from functools import partial
from pathlib import Path

import click

from audit.commands.options import FOLDER, json_option


@click.command("status")
@click.argument("run", type=FOLDER)
@json_option("one JSON array of cells")
def status_command(run: Path, as_json: bool) -> int:
    """Count the done, failed and unfinished cells of the run folder RUN; exit code 1 where one failed.

    Example: rvaudit status runs/digits
    """
    from audit.run.upkeep.progress import FAILED, counts, run_statuses
    from audit.run.upkeep.start_folders import start_folders
    from model_zoo.lookup import expand_ref
    from reports.tables.leftovers import leftover_sentences
    from reports.text import format_eps, plain_text

    found = run_statuses(run, partial(expand_ref, base=start_folders(run)))
    numbers = counts(found)
    if as_json:
        click.echo(json.dumps([each._asdict() for each in found]))
        return 1 if numbers[FAILED] else 0
    for each in found:
        if each.state == FAILED:
            click.echo(plain_text(f"failed: {each.model}, {each.layer}, {format_eps(each.eps)}: {each.reason}"))
    click.echo(f"{len(found)} cells: " + ", ".join(f"{count} {state}" for state, count in numbers.items()))
    for sentence in leftover_sentences([run]):
        click.echo(sentence)
    return 1 if numbers[FAILED] else 0
