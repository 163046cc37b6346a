"""The study `figure3`: information and vulnerability of single channels."""

from pathlib import Path

import click

from audit.commands.options import FOLDER, SourceOptions, source_options
from audit.commands.reproduce.shared import preset_argument, print_paths


@click.command("figure3")
@preset_argument
@click.option("--out", type=FOLDER, default=Path("runs/figure3"), show_default=True, help="The folder of rows.")
@source_options
def figure3_command(preset: Path | None, out: Path, sources: SourceOptions) -> None:
    """Figure 3: information and vulnerability of a second convolution's channels, standard against robust.

    PRESET is a benchmark file that names models, layers and radii. [the bundled digits networks]

    Example: rvaudit reproduce figure3
    """
    from audit.attribution.single_features import FeatureSettings
    from audit.commands.display import Display
    from audit.commands.resolve import run_options
    from audit.studies.figure3 import figure3, figure3_cells
    from reports.figures.feature_figure import draw

    cells = figure3_cells(preset)
    with Display(len(cells)) as display:
        figure3(cells, out, FeatureSettings(), run_options(sources), display.channel)
    print_paths(out / "figure3.csv", *draw(out))
