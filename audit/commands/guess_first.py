"""`rvaudit reproduce guess-first`: the second paper's table, with what an adaptive attack makes of each number."""

from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER


@click.command("guess-first")
@click.option("--dataset", default="digits", show_default=True, help="digits, mnist or fashion-mnist.")
@click.option("--data", default="", help="Its images without splits, such as parquet:PATH; the last fifth is held out.")
@click.option("--data-dir", type=FOLDER, default=Path("data"), show_default=True, help="Where data sets lie.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--epochs", type=click.IntRange(1, 200), default=40, show_default=True, help="The paper takes 200.")
@click.option("--count", type=click.IntRange(1), default=None, help="How many held-out images, from the first. [all]")
@click.option("--attack-images", type=click.IntRange(1), default=500, show_default=True,
              help="How many of them the adaptive attack takes.")  # fmt: skip
@click.option("--slow-images", type=click.IntRange(1), default=200, show_default=True,
              help="How many of these C&W, Square by itself and the information take.")  # fmt: skip
@click.option("--out", type=FOLDER, default=None, help="Where rows, page and figure go. [runs/guess-first]")
def guess_first_command(dataset: str, data: str, out: Path | None, count: int | None, **request: Any) -> int:
    """Train the six models of "Guess First", attack and audit them, and set the paper's figures beside.

    The folder gets <dataset>.csv as rows come, <dataset>.md, and the figure. The same command goes on where a run was
    stopped.
    """
    from audit.commands.display import Display
    from audit.studies.attack_table import TableSettings
    from audit.studies.guess_first import GuessFirstSettings, run_guess_first
    from reports.studies.guess_first import write_guess_first
    from reports.studies.guess_first_paper import published

    published(dataset)  # a set that the paper's tables cannot stand beside is refused before hours are spent
    table = TableSettings(attack_images=request["attack_images"], slow_images=request["slow_images"])
    settings = GuessFirstSettings(
        dataset, data, request["seeds"], request["epochs"], count, out or Path("runs/guess-first"), table,
        data_dir=request["data_dir"],
    )  # fmt: skip
    with Display(settings.steps) as display:
        path = run_guess_first(settings, display.channel)
    for written in (path, *write_guess_first(path)):
        click.echo(str(written))
    return 0
