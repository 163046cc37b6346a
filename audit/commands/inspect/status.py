"""The command `status`: progress of a run."""

import json
from functools import partial
from pathlib import Path

import click

from audit.commands.options import FOLDER, json_option


@click.command("status")
@click.argument("run", type=FOLDER)
@click.option("--timing", is_flag=True, help="Show instead where the CPU time and the passes of the run went.")
@json_option("one JSON array of cells, or of stages with --timing")
def status_command(run: Path, timing: bool, as_json: bool) -> int:
    """Count the done, failed and unfinished cells of the run folder RUN; exit code 1 where one failed.

    With --timing, costs that records share, such as those of an attack, are in the first record that needed them.

    Example: rvaudit status runs/digits
    """
    if timing:
        _show_timing(run, as_json=as_json)
        return 0
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


def _show_timing(run: Path, *, as_json: bool) -> None:
    """Print CPU seconds, their share, images passed and passes needed of every stage."""
    from audit.commands.display import print_table
    from audit.records import read_records
    from audit.run.upkeep.timing import stage_totals

    found = stage_totals(run, read_records(run))
    if as_json:
        click.echo(json.dumps([each._asdict() for each in found]))
        return
    whole = sum(each.seconds for each in found) or 1.0
    rows = [
        (
            each.stage,
            f"{each.seconds:.1f}",
            f"{each.seconds / whole:.1%}",
            f"{each.passed:,.0f}" if each.passed else "",
            "" if each.needed is None else f"{each.needed:,.0f}",
            each.records or "",
        )
        for each in found
    ]
    print_table(("stage", "CPU seconds", "share", "images passed", "passes needed", "records"), rows)
    click.echo(f"{whole:.1f} CPU seconds in all")
