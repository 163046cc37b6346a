"""The study `theorem-3.2`: bounds, exact curve and estimates on a Gaussian mixture."""

from pathlib import Path

import click

from audit.commands.options import FOLDER
from audit.commands.reproduce.shared import print_paths


@click.command("theorem-3.2")
@click.option("--samples", type=int, default=1000, show_default=True, help="Number of samples for each seed.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds.")
@click.option(
    "--shift", "shifts", type=float, multiple=True, help="In deviations of the mixture. Repeatable. [nine values]"
)
@click.option("--out", type=FOLDER, default=Path("runs/theorem-3.2"), show_default=True, help="The folder of rows.")
def theorem_3_2_command(samples: int, seeds: int, shifts: tuple[float, ...], out: Path) -> None:
    """Theorem 3.2 on a Gaussian mixture: corrected bounds, exact curve and estimates (about two minutes).

    Example: rvaudit reproduce theorem-3.2 --shift 1 --seeds 1
    """
    from audit.commands.display import Display
    from audit.studies.theorem32 import Sweep, theorem32
    from reports.figures.mixture_figure import draw

    sweep = Sweep(shifts or Sweep().shifts, samples, tuple(range(seeds)))
    with Display(len(sweep.shifts) * len(sweep.mixtures)) as display:
        theorem32(sweep, out, display.channel)
    print_paths(out / "theorem32.csv", *draw(out))
