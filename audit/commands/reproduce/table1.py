"""The study `table1`: representations learned with and without the worst case."""

import json
from pathlib import Path

import click

from audit.commands.options import FOLDER, json_option
from audit.commands.reproduce.shared import PROGRESS_STEPS, DataOptions, data_options
from audit.errors import UnknownNameError


@click.command("table1")
@click.option("--dataset", default="digits", show_default=True, help="digits, mnist, fashion-mnist, svhn or cifar10.")
@click.option("--scale", default="tiny", show_default=True, help="tiny, small, or paper (the authors' settings).")
@click.option("--seeds", type=click.IntRange(1), default=None, help="Number of seeds. [3; 4 at paper scale]")
@data_options
@click.option("--out", type=FOLDER, default=None, help="The folder of the study. [runs/table1-<data set>-<scale>]")
@json_option("the rows as one JSON array")
def table1_command(
    dataset: str, scale: str, seeds: int | None, data: DataOptions, out: Path | None, as_json: bool
) -> int:
    """Learn representations with and without the worst case, train heads on them, and check the paper's claims.

    With --data alone, its last fifth is tested on. Writes rows.csv (one row per seed, table row and head), table1.md
    and the encoders. Re-running resumes.

    Example: rvaudit reproduce table1 --dataset digits --seeds 1
    """
    from audit.commands.display import Display
    from audit.run.loading import device_of
    from audit.studies.table1 import run_table1
    from audit.studies.table1_settings import SCALES, Table1Request
    from reports.studies.table1 import read_table1, write_table1

    if scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    device = device_of(data.device)
    request = Table1Request(
        dataset, SCALES[scale], scale, data.data, data.train_data, data_dir=data.data_dir, offline=data.offline
    )
    folder = out or Path("runs") / f"table1-{dataset}-{scale}"
    with Display(PROGRESS_STEPS, quiet=as_json) as display:
        run_table1(
            request,
            seeds or request.scale.seeds,
            folder,
            device,
            lambda step, done, total: display.channel(step, PROGRESS_STEPS * done // total),
        )
    page = write_table1(folder / "rows.csv", folder / "table1.md")
    if as_json:
        click.echo(json.dumps(read_table1(folder / "rows.csv").to_dict("records"), allow_nan=False))
    else:
        click.echo(page.read_text(encoding="utf-8"))
    return 0
