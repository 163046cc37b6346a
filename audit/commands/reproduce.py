"""The command group `reproduce`: the paper's tables and figures, each a study and a page to read."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER
from audit.errors import UnknownNameError

# name: the module that holds `<name>_command`, dots and dashes as underscores; imported when asked for
STUDIES = {
    "table1": "audit.commands.reproduce",
    "figure1": "audit.commands.reproduce",
    "figure2": "audit.commands.reproduce",
    "figure3": "audit.commands.features",
    "figure4": "audit.commands.features",
    "figure5": "audit.commands.features",
    "theorem-3.2": "audit.commands.features",
    "guess-first": "audit.commands.guess_first",
}

_BAR = 1000  # parts of the progress bar


class StudyGroup(click.Group):
    """The studies of `STUDIES`, each imported from its own module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all studies."""
        return sorted(STUDIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a study by its name, or None where there is none."""
        if cmd_name not in STUDIES:
            return None
        module = importlib.import_module(STUDIES[cmd_name])
        found: click.Command = getattr(module, f"{cmd_name.replace('-', '_').replace('.', '_')}_command")
        return found


_Options = Callable[[Callable[..., Any]], Callable[..., Any]]


def _model_set_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of Figures 1 and 2, which one run makes."""
    options: list[_Options] = [
        click.option("--scale", default="tiny", show_default=True,
                     help="tiny (the bundled zoo), small (two cores), paper (one GPU)."),
        click.option("--dataset", default=None, help="The scale's: digits for tiny, cifar10 for small and paper."),
        click.option("--data", default=None, help="Images to audit on and hold out, such as parquet:PATH."),
        click.option("--train-data", default=None, help="Images to train on; needed with --data."),
        click.option("--data-dir", type=FOLDER, default=Path("data"), show_default=True, help="Where data sets lie."),
        click.option("--offline", is_flag=True, help="Open no socket: use what is here."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
        click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/figure1-<scale>]"),
        click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON array, nothing else."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.group("reproduce", cls=StudyGroup)
def reproduce_command() -> None:
    """Compute a table or figure of the paper."""


@click.command("table1")
@click.option("--dataset", default="digits", show_default=True, help="digits, mnist, fashion-mnist, svhn or cifar10.")
@click.option("--scale", default="tiny", show_default=True, help="tiny, small, or paper (the authors' settings).")
@click.option("--seeds", type=click.IntRange(1), default=None, help="How many. [3; 4 at paper scale]")
@click.option("--data", default=None, help="Its images, such as parquet:PATH; alone, the last fifth is tested on.")
@click.option("--train-data", default=None, help="Where the training images are, if not in --data.")
@click.option("--data-dir", type=FOLDER, default=Path("data"), show_default=True, help="Where data sets lie.")
@click.option("--offline", is_flag=True, help="Open no socket: use what is here.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
@click.option("--out", type=FOLDER, default=None, help="The folder. [runs/table1-<data set>-<scale>]")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON array, nothing else.")
def table1_command(dataset: str, scale: str, seeds: int | None, out: Path | None, as_json: bool, **where: Any) -> int:
    """Learn representations with and without the worst case, train heads on them, and judge the paper's claims.

    The folder gets rows.csv (a row a seed, table row and head, as they come), table1.md, and the encoders. The same
    command goes on where a run was stopped.
    """
    from audit.commands.display import Display
    from audit.run.cell_runner import device_of
    from audit.studies.table1 import run_table1
    from audit.studies.table1_settings import SCALES, Table1Request
    from reports.studies.table1 import read_table1, write_table1

    if scale not in SCALES:
        raise UnknownNameError("scale", scale, SCALES)
    device = device_of(where.pop("device"))
    request = Table1Request(dataset, SCALES[scale], scale, **where)
    folder = out or Path("runs") / f"table1-{dataset}-{scale}"
    with Display(_BAR, quiet=as_json) as display:
        run_table1(
            request, seeds or request.scale.seeds, folder, device,
            lambda what, done, total: display.channel(what, _BAR * done // total),
        )  # fmt: skip
    path = write_table1(folder / "rows.csv", folder / "table1.md")
    if as_json:
        click.echo(json.dumps(read_table1(folder / "rows.csv").to_dict("records"), allow_nan=False))
    else:
        click.echo(path.read_text(encoding="utf-8"))
    return 0


@click.command("figure1")
@_model_set_options
def figure1_command(**request: Any) -> int:
    """Figure 1: RV against the adversarial gap of the paper's model set, trained where it is missing.

    The folder gets models/ (weights and cards, each a model for other commands), the records of an ordinary run with
    leaderboard, report and both figures. The same command goes on where a run was stopped.
    """
    return _audit_model_set("figure1", request)


@click.command("figure2")
@_model_set_options
def figure2_command(**request: Any) -> int:
    """Figure 2: worst-case information and the accuracy it allows, from the run that makes Figure 1."""
    return _audit_model_set("figure2", request)


def _audit_model_set(figure: str, request: dict[str, Any]) -> int:
    """Train what is missing, then run the benchmark of the set as `rvaudit run` does; return its exit code."""
    from audit.commands.display import Display
    from audit.run.cell_runner import device_of
    from audit.studies.figure1 import ModelSetRequest, prepare

    out, device, as_json = request.pop("out"), request.pop("device"), request.pop("as_json")
    asked = ModelSetRequest(**request)
    folder = out or Path("runs") / f"figure1-{asked.scale}"
    with Display(_BAR, quiet=as_json) as display:
        config = prepare(
            asked, folder, device_of(device),
            lambda what, share: display.channel(what, int(_BAR * share)),
        )  # fmt: skip
    context = click.get_current_context()
    group = context.find_root().command
    assert isinstance(group, click.Group)
    run = group.get_command(context, "run")
    assert run is not None
    where = {"data_dir": asked.data_dir, "offline": asked.offline, "device": device}
    code: int = context.invoke(run, config=config, out=folder, as_json=as_json, **where)
    if not as_json:
        click.echo(str(folder / "figures" / f"{figure}.png"))
    return code
