"""The commands on what is there: `compare` two runs, `export` one, `convert` a checkpoint, ask the `doctor`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER
from audit.errors import UsageError

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("compare")
@click.argument("runs", metavar="RUN RUN", nargs=2, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def compare_command(runs: tuple[Path, Path], as_json: bool) -> int:
    """Pair the cells of two run folders and tell by how much the second differs from the first.

    Cells are paired by model, data set, layer, threat and estimator; differences are over the seeds both have, with
    95 % intervals. Names which parts of the cells' identities differ, for they may explain it.
    """
    from audit.records import read_records
    from reports.tables.comparison import compare

    found = compare(read_records(runs[0]), read_records(runs[1]))
    if as_json:
        click.echo(json.dumps(found.to_dict(), allow_nan=False))
        return 0
    from audit.commands.display import plain, print_table

    print_table(found.HEADER, found.shown())
    for line in found.sentences():
        click.echo(plain(line))
    return 0


@click.command("export")
@click.argument("run", type=FOLDER)
@click.argument("out", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def export_command(run: Path, out: Path, as_json: bool) -> int:
    """Write the leaderboard of the run folder RUN as OUT, a .csv, .parquet or .safetensors file.

    safetensors holds every column of numbers as float64, missing as NaN, and the columns of text as JSON in its header.
    """
    from audit.records import read_records
    from audit.storage import write_atomically
    from reports.tables.comparison import to_safetensors
    from reports.tables.ranking import leaderboard, to_csv, to_parquet
    from reports.tables.table import to_frame

    writers: dict[str, Callable[[Any], str | bytes]] = {
        ".csv": to_csv, ".parquet": to_parquet, ".safetensors": to_safetensors,
    }  # fmt: skip
    if out.suffix not in writers:
        raise UsageError(f"{out.name!r} ends in none of {', '.join(writers)}: its ending says what is written")
    table = leaderboard(to_frame(read_records(run)))
    write_atomically(out, writers[out.suffix](table))
    _say({"path": str(out), "rows": len(table), "columns": len(table.columns)}, as_json)
    return 0


@click.command("convert")
@click.argument("checkpoint", type=_FILE)
@click.argument("out", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def convert_command(checkpoint: Path, out: Path, as_json: bool) -> int:
    """Write the tensors of CHECKPOINT as OUT.safetensors, running nothing that is in it.

    Exit code 3 for a file that is broken or not there, 4 for one that would run code.
    """
    from hashlib import sha256

    import safetensors.torch

    from audit.storage import write_atomically
    from model_zoo.weights.checkpoints import read_weights

    if out.suffix != ".safetensors":
        raise UsageError(f"{out.name!r} must end in .safetensors")
    if out.exists():
        raise UsageError(f"{out} is there already: choose another name, or remove it")
    weights = read_weights(checkpoint)
    # tensors may share memory, which the format does not know
    data = safetensors.torch.save({name: tensor.clone().contiguous() for name, tensor in weights.tensors.items()})
    write_atomically(out, data)
    told = {"path": str(out), "tensors": len(weights.tensors), "sha256": sha256(data).hexdigest()}
    _say({**told, "from_sha256": weights.sha256, "unwrapped": "; ".join(weights.notes)}, as_json)
    return 0


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, nothing else.")
def doctor_command(as_json: bool) -> int:
    """Look for what this machine lacks: versions, devices, the cache folder, room on the disk, optional parts.

    Exit code 3 where something is missing that every run needs.
    """
    from audit.run.upkeep.environment import BAD, examine
    from model_zoo.prepared import default_cache

    found = examine(default_cache(), Path.cwd())
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found]))
    else:
        from audit.commands.display import print_table

        print_table(("what", "state", "found"), found)
    return 3 if any(finding.state == BAD for finding in found) else 0


def _say(told: dict[str, Any], as_json: bool) -> None:
    from audit.commands.display import plain

    click.echo(json.dumps(told) if as_json else ", ".join(plain(f"{name} {value}") for name, value in told.items()))
