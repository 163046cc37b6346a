"""The command `export`: write a leaderboard as csv, parquet or safetensors."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from audit.commands.options import FILE, FOLDER, json_option
from audit.errors import UsageError


@click.command("export")
@click.argument("run", type=FOLDER)
@click.argument("out", type=FILE)
@json_option("one JSON object")
def export_command(run: Path, out: Path, as_json: bool) -> int:
    """Write the leaderboard of the run folder RUN as OUT, a .csv, .parquet or .safetensors file.

    safetensors holds every numeric column as float64 with NaN for missing values, and text columns as JSON in its
    header.
    """
    import pandas as pd

    from audit.commands.display import print_facts
    from audit.records import read_records
    from audit.storage import write_atomically
    from reports.tables.comparison import to_safetensors
    from reports.tables.ranking import leaderboard, to_csv, to_parquet
    from reports.tables.table import to_frame

    writers: dict[str, Callable[[pd.DataFrame], str | bytes]] = {
        ".csv": to_csv,
        ".parquet": to_parquet,
        ".safetensors": to_safetensors,
    }
    if out.suffix not in writers:
        raise UsageError(f"{out.name!r} must end in one of {', '.join(writers)}: the suffix selects the format")
    table = leaderboard(to_frame(read_records(run)))
    write_atomically(out, writers[out.suffix](table))
    facts = {"path": str(out), "rows": len(table), "columns": len(table.columns)}
    if as_json:
        click.echo(json.dumps(facts))
    else:
        print_facts(facts)
    return 0
