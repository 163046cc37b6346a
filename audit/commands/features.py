"""`rvaudit features`, `rvaudit saliency`, and the parts of `rvaudit reproduce` that look at single features."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, run_options, slug, source_options
from audit.errors import UsageError

_BOTH = 5  # how many of the most and of the least vulnerable features the table shows
PICTURE = "Each feature is searched alone: these are estimates of single features, never a bound on the layer."
_Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that both commands on a model take."""
    options: list[_Option] = [
        click.option("--dataset", required=True, help="digits, cifar10, ..., folder:PATH, npz:PATH or parquet:PATH."),
        click.option("--layer", required=True, help="A name of `rvaudit layers MODEL`."),
        click.option("--images", type=click.IntRange(2), default=300, show_default=True, help="How many, from first."),
        click.option("--feature", "chosen", type=int, multiple=True, help="A channel or coordinate. Repeatable."),
        click.option("--noise", type=float, default=0.5, show_default=True, help="In standard deviations."),
        click.option("--seed", type=int, default=0, show_default=True, help="What noise and random starts are."),
        click.option("--out", type=FOLDER, default=None, help="Where rows and figure go. [runs/<command>-<model>]"),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON array, nothing else."),
    ]
    for option in reversed(options):
        command = option(command)
    return source_options(command)


@click.command("features")
@click.argument("model")
@click.option("--eps", required=True, help="Radius in pixel units, such as 8/255.")
@click.option("--norm", default="linf", show_default=True, help="linf, l2 or l1.")
@click.option("--unit", default=None, help="ROW,COLUMN on the map, or TOKEN. [the middle one]")
@click.option("--scale", default="feature", show_default=True, help="Noise in deviations of the feature, or layer.")
@click.option("--steps", type=int, default=10, show_default=True, help="Steps from the corner of the ball.")
@click.option("--restarts", type=int, default=1, show_default=True, help="Searches; all but the first start at random.")
@_common
def features_command(model: str, as_json: bool, out: Path | None, **request: Any) -> None:
    """Rank the features of a layer of MODEL by how much an adversary takes from each.

    Of a convolution the features are its channels at one unit. Writes features.csv and a histogram.
    """
    from audit.attribution.single_features import FeatureRequest, FeatureSettings, audit_features
    from audit.commands.display import Display
    from audit.studies.figure3 import feature_rows
    from audit.studies.rows import write_rows
    from reports.figures.feature_figure import draw_features

    settings = FeatureSettings(
        noise=request["noise"], scale=request["scale"], steps=request["steps"], restarts=request["restarts"]
    )
    exhibit = _exhibit(model, request)
    with Display(100) as display:
        asked = FeatureRequest(request["chosen"], _unit(request["unit"]), request["seed"], display.channel)
        found = audit_features(
            exhibit.network, exhibit.images, request["layer"], exhibit.cell.threat, settings, asked
        )  # fmt: skip
    folder = out or Path("runs") / f"features-{slug(model)}"
    rows = feature_rows(exhibit, found, settings)
    paths = [write_rows(folder / "features.csv", rows), *draw_features(folder / "features.csv")]
    if as_json:
        click.echo(json.dumps(rows, allow_nan=False))
    else:
        _print_features(found, exhibit, paths)


@click.command("saliency")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--draw", "drawn", type=click.IntRange(1), default=5, show_default=True, help="How many maps to draw.")
@_common
def saliency_command(models: tuple[str, ...], as_json: bool, out: Path | None, **request: Any) -> None:
    """Map where in the images a layer of each MODEL finds its information, and how far the maps follow the images.

    Writes saliency.csv (alignment), saliency.json (the maps drawn) and the grid of maps.
    """
    from audit.attribution.saliency import SaliencySettings
    from audit.commands.display import Display
    from audit.studies.figure45 import SaliencyStudy, saliency_study
    from reports.figures.saliency_figure import draw_saliency

    settings = SaliencySettings(noise=request["noise"], seed=request["seed"])
    study = SaliencyStudy(settings, request["chosen"], tuple(range(request["drawn"])))
    folder = out or Path("runs") / f"saliency-{slug(models[0])}"
    cells = [_cell(model, {**request, "eps": "0", "norm": "linf"}) for model in models]
    with Display(len(cells)) as display:
        rows = saliency_study(cells, folder / "saliency", study, run_options(request), display.channel)
    paths = [folder / "saliency.csv", folder / "saliency.json", *draw_saliency(folder / "saliency.csv")]
    if as_json:
        click.echo(json.dumps(rows))
    else:
        _print_alignment(rows, paths)


@click.command("theorem-3.2")
@click.option("--samples", type=int, default=1000, show_default=True, help="Samples a seed.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many seeds.")
@click.option("--shift", "shifts", type=float, multiple=True, help="In spreads of the mixture. Repeatable. [nine]")
@click.option("--out", type=FOLDER, default=Path("runs/theorem-3.2"), show_default=True, help="Where rows go.")
def theorem_3_2_command(samples: int, seeds: int, shifts: tuple[float, ...], out: Path) -> None:
    """Theorem 3.2 on a Gaussian mixture: corrected bounds, exact curve and estimates (about two minutes)."""
    from audit.commands.display import Display
    from audit.studies.theorem32 import Sweep, theorem32
    from reports.figures.mixture_figure import draw

    sweep = Sweep(shifts or Sweep().shifts, samples, tuple(range(seeds)))
    with Display(len(sweep.shifts) * len(sweep.mixtures)) as display:
        theorem32(sweep, out, display.channel)
    _say([out / "theorem32.csv", *draw(out)])


@click.command("figure3")
@click.argument("preset", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--out", type=FOLDER, default=Path("runs/figure3"), show_default=True, help="Where rows go.")
@source_options
def figure3_command(preset: Path | None, out: Path, **where: Any) -> None:
    """Figure 3: information and vulnerability of a second convolution's channels, standard against robust.

    PRESET is a benchmark file that names models, layers and radii. [the bundled digits networks]
    """
    from audit.attribution.single_features import FeatureSettings
    from audit.commands.display import Display
    from audit.studies.figure3 import figure3, figure3_cells
    from reports.figures.feature_figure import draw

    cells = figure3_cells(preset)
    with Display(len(cells)) as display:
        figure3(cells, out, FeatureSettings(), run_options(where), display.channel)
    _say([out / "figure3.csv", *draw(out)])


@click.command("figure4")
@click.argument("preset", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--out", type=FOLDER, default=Path("runs/figure4"), show_default=True, help="Where rows go.")
@source_options
def figure4_command(preset: Path | None, out: Path, **where: Any) -> None:
    """Figure 4: saliency maps of the information of a layer, standard against robust.

    PRESET is a benchmark file that names models and layers. [the bundled digits networks]
    """
    from audit.studies.figure45 import figure4_cells

    _saliency_figure(out / "figure4", figure4_cells(preset), ((), (0, 1, 2)), where)


@click.command("figure5")
@click.argument("preset", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)
@click.option("--feature", "chosen", type=int, multiple=True, default=(0, 1, 2), show_default=True, help="Repeatable.")
@click.option("--out", type=FOLDER, default=Path("runs/figure5"), show_default=True, help="Where rows go.")
@source_options
def figure5_command(preset: Path | None, chosen: tuple[int, ...], out: Path, **where: Any) -> None:
    """Figure 5: saliency maps of the information of single features, standard against robust.

    PRESET is a benchmark file that names models and layers. [the bundled digits networks]
    """
    from audit.studies.figure45 import figure5_cells

    _saliency_figure(out / "figure5", figure5_cells(preset), (chosen, (0, 1)), where)


def _saliency_figure(
    stem: Path, cells: list[Any], what: tuple[tuple[int, ...], tuple[int, ...]], where: dict[str, Any]
) -> None:
    """Measure and draw; `what` is the features and which images to draw."""
    from audit.attribution.saliency import SaliencySettings
    from audit.commands.display import Display
    from audit.studies.figure45 import SaliencyStudy, saliency_study
    from reports.figures.saliency_figure import draw_saliency

    with Display(len(cells)) as display:
        saliency_study(cells, stem, SaliencyStudy(SaliencySettings(), *what), run_options(where), display.channel)
    rows = stem.with_suffix(".csv")
    _say([rows, stem.with_suffix(".json"), *draw_saliency(rows)])


def _cell(model: str, request: dict[str, Any]) -> Any:
    from audit.adversary.threat import threat_model
    from audit.config.benchmark import parse_number
    from audit.config.settings import AuditSettings
    from audit.run.cell import Cell

    try:
        threat = threat_model(request["norm"], parse_number(request["eps"]))
    except ValueError as error:
        raise UsageError(f"--eps: {error}") from error
    settings = AuditSettings(seeds=(request["seed"],))
    return Cell(model, None, request["dataset"], request["images"], request["layer"], threat, settings)


def _exhibit(model: str, request: dict[str, Any]) -> Any:
    from audit.studies.networks import opened

    return opened(_cell(model, request), run_options(request))


def _unit(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--unit {text!r} is not ROW,COLUMN or TOKEN, such as 4,4")
    return tuple(map(int, parts))


def _print_features(found: Any, exhibit: Any, paths: list[Path]) -> None:
    from audit.commands.display import print_table

    rows = list(enumerate(found.rows, 1))
    shown = rows if len(rows) <= 2 * _BOTH else [*rows[:_BOTH], *rows[-_BOTH:]]
    header = ("rank", "feature", "normal nats", "worst nats", "RV", "reach in deviations", "without gradient")
    print_table(header, [
        (rank, row.feature, f"{row.normal_nats:.2f} ± {row.normal_nats_se:.2f}",
         f"{row.worst_nats:.2f} ± {row.worst_nats_se:.2f}", f"{row.rv:.2f} ± {row.rv_se:.2f}", f"{row.reach:.2f}",
         f"{row.silent:.0%}")
        for rank, row in shown
    ])  # fmt: skip
    if len(shown) < len(rows):
        click.echo(f"the {_BOTH} most and the {_BOTH} least vulnerable of {len(rows)} features")
    at = f"unit {','.join(map(str, found.unit))} sees" if found.unit else "each sees"
    height, width = exhibit.images.shape[2:]
    click.echo(f"{at} {'x'.join(map(str, found.field))} of {height}x{width} pixels; {found.passes:.0f} passes")
    click.echo(PICTURE)
    _say(paths)


def _print_alignment(rows: list[dict[str, Any]], paths: list[Path]) -> None:
    from audit.commands.display import print_table

    names = ("alignment", "cosine", "correlation")
    print_table(
        ("model", "layer", "feature", "images", *names, "maps of zeros"),
        [(row["model"], row["layer"], row["feature"], row["images"],
          *("" if row[name] is None else f"{row[name]:.3f} ± {row[f'{name}_se']:.3f}" for name in names), row["zeros"])
         for row in rows],
    )  # fmt: skip
    click.echo("Measured: mean and standard error over images of |<x, m>| / |m| (Etmann et al. 2019) and its cosines.")
    _say(paths)


def _say(paths: list[Path]) -> None:
    click.echo("  ".join(map(str, paths)))
