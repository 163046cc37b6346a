"""The command `features`: rank the single features of a layer by their vulnerability."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from audit.commands.options import (
    FOLDER,
    Option,
    SourceOptions,
    balanced_option,
    dataset_option,
    eps_option,
    grouped_options,
    json_option,
    norm_option,
    preprocess_option,
    request_folder,
    restrict_option,
    source_options,
)
from audit.errors import UsageError

_SHOWN = 5  # rows of the table from each end of the ranking

layer_option = click.option("--layer", required=True, help="A name of `rvaudit layers MODEL`.")
images_option = click.option(
    "--images", type=click.IntRange(2), default=300, show_default=True, help="Number of images, from the first."
)
feature_option = click.option(
    "--feature", "features", type=int, multiple=True, help="A channel or coordinate. Repeatable."
)
noise_option = click.option("--noise", type=float, default=0.5, show_default=True, help="In standard deviations.")
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of noise and random starts.")
LAYER_OPTIONS: tuple[Option, ...] = (
    dataset_option,
    layer_option,
    images_option,
    balanced_option,
    feature_option,
    noise_option,
    seed_option,
    preprocess_option,
    restrict_option,
)


@dataclass(frozen=True)
class FeatureOptions:
    """A layer of a model, its features, and how they are searched."""

    eps: str
    norm: str
    unit: str | None
    scale: Literal["feature", "layer"]
    steps: int
    restarts: int
    dataset: str
    layer: str
    images: int
    balanced: bool
    features: tuple[int, ...]
    noise: float
    seed: int
    preprocess: str
    restrict_classes: bool

    def folder(self, model: str, norm: str, eps: float) -> Path:
        """Return the folder of a request, named by everything that decides the numbers."""
        decides = {**vars(self), "norm": norm, "eps": eps, "unit": _unit(self.unit)}
        return request_folder("features", model, decides)


@click.command("features")
@click.argument("model")
@grouped_options(
    "request",
    FeatureOptions,
    eps_option,
    norm_option,
    click.option("--unit", default=None, help="ROW,COLUMN on the map, or TOKEN. [the middle one]"),
    click.option("--scale", default="feature", show_default=True, help="Unit of the noise: feature or layer."),
    click.option("--steps", type=int, default=10, show_default=True, help="Steps from the corner of the ball."),
    click.option("--restarts", type=int, default=1, show_default=True, help="Searches; all but the first are random."),
    *LAYER_OPTIONS,
)
@click.option(
    "--out",
    type=FOLDER,
    default=None,
    help="The folder of rows and figure. [runs/features-<model>-<hash of the request>]",
)
@json_option("one JSON array")
@source_options
def features_command(
    model: str, request: FeatureOptions, out: Path | None, as_json: bool, sources: SourceOptions
) -> None:
    """Rank the features of a layer of MODEL by their vulnerability.

    The features of a convolution are its channels at one unit. Writes features.csv and a histogram.

    Example: rvaudit features bundled:digits-vgg-robust --dataset digits --layer stages.1.0 --eps 0.1
    """
    from audit.attribution.single_features import FeatureRequest, FeatureSettings, audit_features
    from audit.commands.display import Display
    from audit.commands.resolve import input_rules, run_options, threat_of
    from audit.run.loading import batches_for
    from audit.studies.figure3 import feature_rows
    from audit.studies.figure_networks import layer_cell, load_cell
    from audit.studies.rows import write_rows
    from reports.figures.feature_figure import draw_features

    settings = FeatureSettings(request.noise, request.scale, request.steps, restarts=request.restarts)
    threat, unit = threat_of(request.norm, request.eps), _unit(request.unit)
    rules = input_rules(request.preprocess, restrict_classes=request.restrict_classes, balanced=request.balanced)
    cell = layer_cell(model, request.dataset, request.layer, threat, images=request.images, rules=rules)
    options = run_options(sources)
    loaded = load_cell(cell, options)
    with Display(100) as display, batches_for(loaded.network, loaded.images, options):
        asked = FeatureRequest(request.features, unit, request.seed, display.channel)
        found = audit_features(loaded.network, loaded.images, request.layer, threat, settings, asked)
    folder = out or request.folder(model, threat.norm, threat.eps)
    rows = feature_rows(loaded, found, settings)
    paths = [write_rows(folder / "features.csv", rows), *draw_features(folder / "features.csv")]
    if as_json:
        click.echo(json.dumps(rows, allow_nan=False))
        return
    _print_ranking(
        [
            (
                row.feature,
                f"{row.normal_nats:.2f} ± {row.normal_nats_se:.2f}",
                f"{row.worst_nats:.2f} ± {row.worst_nats_se:.2f}",
                f"{row.rv:.2f} ± {row.rv_se:.2f}",
                f"{row.reach:.2f}",
                f"{row.silent:.0%}",
            )
            for row in found.rows
        ]
    )
    field, (height, width) = "x".join(map(str, found.field)), loaded.images.shape[2:]
    scope = f"the receptive field of unit {','.join(map(str, found.unit))}" if found.unit else "each receptive field"
    click.echo(f"{scope} is {field} of {height}x{width} pixels; {found.passes:.0f} passes")
    click.echo("Each feature is searched alone: these are estimates of single features, never a bound on the layer.")
    click.echo("  ".join(map(str, paths)))


def _unit(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--unit {text!r} is not ROW,COLUMN or TOKEN, such as 4,4")
    return tuple(map(int, parts))


def _print_ranking(rows: Sequence[tuple[object, ...]]) -> None:
    """Print both ends of the ranking."""
    from audit.commands.display import print_table

    ranked = [(rank, *row) for rank, row in enumerate(rows, 1)]
    shown = ranked if len(ranked) <= 2 * _SHOWN else [*ranked[:_SHOWN], *ranked[-_SHOWN:]]
    header = ("rank", "feature", "normal nats", "worst nats", "RV", "reach in deviations", "without gradient")
    print_table(header, shown)
    if len(shown) < len(ranked):
        click.echo(f"the {_SHOWN} most and the {_SHOWN} least vulnerable of {len(ranked)} features")
