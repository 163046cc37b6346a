"""The study `figure1 --scale study`: a population of networks, its rows, figures and page."""

import json
from dataclasses import dataclass
from pathlib import Path

import click

from audit.commands.reproduce.shared import DataOptions, ModelSetOptions
from audit.errors import UsageError


@dataclass(frozen=True)
class _Located:
    name: str
    data: str | None


def run_study(figure: str, chosen: ModelSetOptions, data: DataOptions) -> int:
    """Train and measure missing networks, draw figures and page, print the paths, and return the exit code."""
    if figure != "figure1":
        raise UsageError(f"scale study is of figure1, not of {figure}")
    from audit.commands.display import Display
    from audit.studies.population.study import PopulationRequest, measure_subset, read_rows, run_population
    from reports.studies.population.page import draw

    located = _located(chosen.dataset, data.data)
    request = PopulationRequest(
        located.name,
        located.data,
        data.train_data,
        seeds=chosen.seeds,
        folder=chosen.out or Path("runs/figure1-study"),
        data_dir=data.data_dir,
        offline=data.offline,
        subset=chosen.subset,
    )
    done, total = len(read_rows(request.path)), len(request.recipes)
    if done >= total and chosen.subset is None:
        click.echo(f"Note: nothing was to do: {request.path} holds all {total} networks already", err=True)
    with Display(total, quiet=chosen.as_json) as display:
        written = [run_population(request, display.channel)]
        if chosen.subset is not None:
            measure_subset(request, display.channel)
    paths = [str(path) for path in (*written, *draw(request.folder))]
    click.echo(json.dumps(paths) if chosen.as_json else "\n".join(paths))
    return 0


def _located(dataset: str | None, data: str | None) -> _Located:
    """Return the name of a data set and the reference to its images.

    A reference may stand in place of the name: that of its file begins with the name, as in parquet:mnist-test.parquet.
    """
    scheme, colon, path = (dataset or "digits").partition(":")
    if not colon:
        return _Located(scheme, data)
    if data is not None:
        raise UsageError(f"--dataset {dataset} is a reference and --data {data} another one: give one of them")
    return _Located(Path(path).stem.partition("-")[0], dataset)
