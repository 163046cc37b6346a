"""The command `saliency`: map the information of a layer onto the pixels."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from audit.commands.features import LAYER_OPTIONS
from audit.commands.options import FOLDER, SourceOptions, grouped_options, json_option, request_folder, source_options


@dataclass(frozen=True)
class SaliencyOptions:
    """A layer, its features, and the number of maps to draw."""

    drawn: int
    dataset: str
    layer: str
    images: int
    balanced: bool
    features: tuple[int, ...]
    noise: float
    seed: int
    preprocess: str
    restrict_classes: bool

    def folder(self, models: Sequence[str]) -> Path:
        """Return the folder of a request, named by everything that decides the numbers."""
        return request_folder("saliency", models[0], {**vars(self), "models": models})


@click.command("saliency")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@grouped_options(
    "request",
    SaliencyOptions,
    click.option("--draw", "drawn", type=click.IntRange(1), default=5, show_default=True, help="Number of maps."),
    *LAYER_OPTIONS,
)
@click.option(
    "--out",
    type=FOLDER,
    default=None,
    help="The folder of rows and figure. [runs/saliency-<model>-<hash of the request>]",
)
@json_option("one JSON array")
@source_options
def saliency_command(
    models: tuple[str, ...], request: SaliencyOptions, out: Path | None, as_json: bool, sources: SourceOptions
) -> None:
    """Map the information of a layer of each MODEL onto the pixels, and measure how far maps align with images.

    Writes saliency.csv (alignment), saliency.json (the maps drawn) and the grid of maps.

    Example: rvaudit saliency bundled:digits-vgg-robust --dataset digits --layer logits --draw 3
    """
    from audit.adversary.threat import Linf
    from audit.attribution.saliency import SaliencySettings
    from audit.commands.display import Display
    from audit.commands.resolve import input_rules, run_options
    from audit.studies.figure4_5 import SaliencyStudy, saliency_study
    from audit.studies.figure_networks import layer_cell
    from reports.figures.saliency_figure import draw_saliency

    settings = SaliencySettings(noise=request.noise, seed=request.seed)
    study = SaliencyStudy(settings, request.features, tuple(range(request.drawn)))
    stem = (out or request.folder(models)) / "saliency"
    rules = input_rules(request.preprocess, restrict_classes=request.restrict_classes, balanced=request.balanced)
    place = request.dataset, request.layer, Linf(0)
    cells = [layer_cell(model, *place, images=request.images, rules=rules) for model in models]
    with Display(len(cells)) as display:
        rows = saliency_study(cells, stem, study, run_options(sources), display.channel)
    table = stem.with_suffix(".csv")
    paths = [table, stem.with_suffix(".json"), *draw_saliency(table)]
    if as_json:
        click.echo(json.dumps(rows))
    else:
        _print_alignment(rows)
        click.echo("  ".join(map(str, paths)))


def _print_alignment(rows: Sequence[dict[str, Any]]) -> None:
    from audit.commands.display import print_table

    names = ("alignment", "cosine", "correlation")
    print_table(
        ("model", "layer", "feature", "images", *names, "maps of zeros"),
        [
            (
                row["model"],
                row["layer"],
                row["feature"],
                row["images"],
                *(_mean(row, name) for name in names),
                row["zeros"],
            )
            for row in rows
        ],
    )
    click.echo("Measured: mean and standard error over images of |<x, m>| / |m| (Etmann et al. 2019) and its cosines.")


def _mean(row: dict[str, Any], name: str) -> str:
    return "" if row[name] is None else f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}"
