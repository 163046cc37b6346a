"""The studies `figure1` and `figure2`: two figures of one run over the paper's model set."""

from pathlib import Path

import click

from audit.commands.options import FOLDER, ExecutorOptions, SourceOptions, grouped_options, json_option
from audit.commands.reproduce.shared import PROGRESS_STEPS, DataOptions, ModelSetOptions, data_options
from audit.errors import UsageError

_model_set_options = grouped_options(
    "chosen",
    ModelSetOptions,
    click.option(
        "--scale",
        default="tiny",
        show_default=True,
        help="tiny (the bundled zoo), small (two CPU cores), paper (one GPU), study (a population of networks).",
    ),
    click.option(
        "--dataset",
        default=None,
        help="That of the scale: digits for tiny, else cifar10; study: digits, mnist, cifar10.",
    ),
    click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/figure1-<scale>]"),
    json_option("the records as one JSON array"),
    click.option("--seeds", type=click.IntRange(1), default=None, help="Study: training seeds, from the first. [all]"),
    click.option(
        "--subset",
        default=None,
        help="Study: then measure a costly estimator, such as label-information, of its subset.",
    ),
)


@click.command("figure1")
@_model_set_options
@data_options
def figure1_command(chosen: ModelSetOptions, data: DataOptions) -> int:
    """Figure 1: RV against the adversarial gap of the paper's model set; missing models are trained.

    --data and --train-data must both be given, or neither. Writes models/ (weights and cards) and the run with its
    leaderboard, report and both figures. Re-running resumes. Scale study asks whether RV predicts robustness: it writes
    the rows of a population of networks, their figures and study.md, and divides --data where it comes alone.

    Example: rvaudit reproduce figure1 --scale tiny
    """
    return _audit_model_set("figure1", chosen, data)


@click.command("figure2")
@_model_set_options
@data_options
def figure2_command(chosen: ModelSetOptions, data: DataOptions) -> int:
    """Figure 2: worst-case information and the accuracy it allows, from the run of Figure 1.

    Example: rvaudit reproduce figure2 --scale tiny
    """
    return _audit_model_set("figure2", chosen, data)


def _audit_model_set(figure: str, chosen: ModelSetOptions, data: DataOptions) -> int:
    """Train missing models, run the benchmark of the set as `rvaudit run` does, and return its exit code."""
    if chosen.scale == "study":
        from audit.commands.reproduce.population import run_study

        return run_study(figure, chosen, data)
    if chosen.seeds is not None or chosen.subset is not None:
        raise UsageError(f"scale {chosen.scale} takes neither --seeds nor --subset: they are of scale study")
    from audit.commands.display import Display
    from audit.commands.execution import publish, run_benchmark
    from audit.config.yaml_source import read_config
    from audit.run.loading import device_of
    from audit.studies.figure1 import ModelSetRequest, prepare_model_set

    request = ModelSetRequest(
        chosen.scale, chosen.dataset, data.data, data.train_data, data_dir=data.data_dir, offline=data.offline
    )
    folder = chosen.out or Path("runs") / f"figure1-{chosen.scale}"
    with Display(PROGRESS_STEPS, quiet=chosen.as_json) as display:
        config = prepare_model_set(
            request,
            folder,
            device_of(data.device),
            lambda step, share: display.channel(step, int(PROGRESS_STEPS * share)),
        )
    sources = SourceOptions(offline=data.offline, data_dir=data.data_dir, device=data.device)
    text = config.read_text(encoding="utf-8")
    records = run_benchmark(read_config(config), text, folder, sources, ExecutorOptions())
    publish(records, folder, as_json=chosen.as_json)
    if not chosen.as_json:
        click.echo(str(folder / "figures" / f"{figure}.png"))
    return 0 if all(record.valid for record in records) else 1
