"""The study `guess-first`: the tables of "Guess First", with an adaptive attack beside the paper's numbers."""

from dataclasses import dataclass
from pathlib import Path

import click

from audit.commands.options import FOLDER, count_option, data_dir_option, grouped_options


@dataclass(frozen=True)
class GuessFirstOptions:
    """Data, training and sizes of the study."""

    dataset: str
    data: str
    data_dir: Path
    seeds: int
    epochs: int
    count: int | None
    attack_images: int
    slow_images: int


@click.command("guess-first")
@grouped_options(
    "chosen",
    GuessFirstOptions,
    click.option("--dataset", default="digits", show_default=True, help="digits, mnist or fashion-mnist."),
    click.option(
        "--data", default="", help="Its images without splits, such as parquet:PATH; the last fifth is held out."
    ),
    data_dir_option,
    click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds."),
    click.option(
        "--epochs", type=click.IntRange(1, 200), default=40, show_default=True, help="Epochs; the paper trains for 200."
    ),
    count_option("Held-out images, from the first. [all]"),
    click.option(
        "--attack-images",
        type=click.IntRange(1),
        default=500,
        show_default=True,
        help="Held-out images of the adaptive attack.",
    ),
    click.option(
        "--slow-images",
        type=click.IntRange(1),
        default=200,
        show_default=True,
        help="Held-out images of C&W, of Square by itself and of the information.",
    ),
)
@click.option("--out", type=FOLDER, default=None, help="The folder of rows, page and figure. [runs/guess-first]")
def guess_first_command(chosen: GuessFirstOptions, out: Path | None) -> int:
    """Train the six models of "Guess First", attack and audit them, and print the paper's numbers beside.

    Writes <dataset>.csv (rows as they come), <dataset>.md and the figure. Re-running resumes.

    Example: rvaudit reproduce guess-first --dataset digits --seeds 1 --epochs 10 --images 300
    """
    from audit.commands.display import Display
    from audit.studies.attack_table import AttackTableSettings
    from audit.studies.guess_first import GuessFirstSettings, run_guess_first
    from reports.studies.guess_first import write_guess_first
    from reports.studies.guess_first_paper import published

    published(chosen.dataset)  # a data set without published tables is refused before hours are spent
    settings = GuessFirstSettings(
        chosen.dataset,
        chosen.data,
        chosen.seeds,
        chosen.epochs,
        chosen.count,
        out or Path("runs/guess-first"),
        AttackTableSettings(attack_images=chosen.attack_images, slow_images=chosen.slow_images),
        data_dir=chosen.data_dir,
    )
    with Display(settings.steps) as display:
        path = run_guess_first(settings, display.channel)
    for written in (path, *write_guess_first(path)):
        click.echo(str(written))
    return 0
