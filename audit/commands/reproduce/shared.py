"""Options of several studies."""

from dataclasses import dataclass
from pathlib import Path

import click

from audit.commands.options import data_dir_option, device_option, grouped_options, offline_option

PROGRESS_STEPS = 1000  # of a progress bar over shares of the work

preset_argument = click.argument("preset", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=False)


@dataclass(frozen=True)
class DataOptions:
    """Location of the images of a study, and the device to compute on."""

    data: str | None
    train_data: str | None
    data_dir: Path
    offline: bool
    device: str


@dataclass(frozen=True)
class ModelSetOptions:
    """Scale, data set and run folder of a model set; of the study also its seeds, and an estimator of its subset."""

    scale: str
    dataset: str | None
    out: Path | None
    as_json: bool
    seeds: int | None
    subset: str | None


data_options = grouped_options(
    "data",
    DataOptions,
    click.option("--data", default=None, help="Images to test on, such as parquet:PATH. [those of the data set]"),
    click.option("--train-data", default=None, help="Images to train on, such as parquet:PATH."),
    data_dir_option,
    offline_option,
    device_option,
)


def print_paths(*paths: Path) -> None:
    """Print the paths of written files on one line."""
    click.echo("  ".join(map(str, paths)))
