"""The studies `figure4` and `figure5`: saliency maps of layers and of single features."""

from pathlib import Path

import click

from audit.commands.options import FOLDER, SourceOptions, source_options
from audit.commands.reproduce.shared import preset_argument, print_paths

_LAYER_IMAGES, _FEATURE_IMAGES = (0, 1, 2), (0, 1)  # images whose maps are drawn


@click.command("figure4")
@preset_argument
@click.option("--out", type=FOLDER, default=Path("runs/figure4"), show_default=True, help="The folder of rows.")
@source_options
def figure4_command(preset: Path | None, out: Path, sources: SourceOptions) -> None:
    """Figure 4: saliency maps of the information of a layer, standard against robust.

    PRESET is a benchmark file that names models and layers. [the bundled digits networks]

    Example: rvaudit reproduce figure4
    """
    _draw_maps(out / "figure4", preset, (), sources)


@click.command("figure5")
@preset_argument
@click.option(
    "--feature", "features", type=int, multiple=True, default=(0, 1, 2), show_default=True, help="Repeatable."
)
@click.option("--out", type=FOLDER, default=Path("runs/figure5"), show_default=True, help="The folder of rows.")
@source_options
def figure5_command(preset: Path | None, features: tuple[int, ...], out: Path, sources: SourceOptions) -> None:
    """Figure 5: saliency maps of the information of single features, standard against robust.

    PRESET is a benchmark file that names models and layers. [the bundled digits networks]

    Example: rvaudit reproduce figure5 --feature 0
    """
    _draw_maps(out / "figure5", preset, features, sources)


def _draw_maps(stem: Path, preset: Path | None, features: tuple[int, ...], sources: SourceOptions) -> None:
    """Measure and draw maps of the layers of Figure 4, or of single features of those of Figure 5."""
    from audit.attribution.saliency import SaliencySettings
    from audit.commands.display import Display
    from audit.commands.resolve import run_options
    from audit.studies.figure4_5 import SaliencyStudy, figure4_cells, figure5_cells, saliency_study
    from reports.figures.saliency_figure import draw_saliency

    cells = figure5_cells(preset) if stem.name == "figure5" else figure4_cells(preset)
    study = SaliencyStudy(SaliencySettings(), features, _FEATURE_IMAGES if features else _LAYER_IMAGES)
    with Display(len(cells)) as display:
        saliency_study(cells, stem, study, run_options(sources), display.channel)
    rows = stem.with_suffix(".csv")
    print_paths(rows, stem.with_suffix(".json"), *draw_saliency(rows))
