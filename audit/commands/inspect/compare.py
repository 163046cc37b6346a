"""The command `compare`: paired differences between two runs."""

import json
from pathlib import Path

import click

from audit.commands.options import FOLDER, json_option


@click.command("compare")
@click.argument("runs", metavar="RUN RUN", nargs=2, type=FOLDER)
@json_option("one JSON object")
def compare_command(runs: tuple[Path, Path], as_json: bool) -> int:
    """Pair the cells of two run folders, and print the differences of the second from the first.

    Cells are paired by model, data set, layer, threat model and estimator; differences are over the common seeds, with
    95 % intervals. Entries of the cells' identities that differ are named as possible reasons.

    Example: rvaudit compare runs/first runs/second
    """
    from audit.commands.display import plain, print_table
    from audit.records import read_records
    from reports.tables.comparison import compare

    found = compare(read_records(runs[0]), read_records(runs[1]))
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return 0
    print_table(found.HEADER, found.shown())
    for line in found.sentences():
        click.echo(plain(line))
    return 0
