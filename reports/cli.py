"""The command `rvaudit`: the commands that read runs, and those of `audit.commands.table`, mounted lazily.

A command is imported when it is used: `rvaudit --help` loads neither torch nor pandas.
"""

import ctypes
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from audit.errors import AuditError, EnvironmentFault, UsageError
from reports.text import plain_text

_INTERRUPTED, _TERMINATED = 130, 143
_PIPE_WIDTH = 160
_HELP_WIDTH = 60
# glibc's options by the variables that set them: the largest tensor that kept memory serves, and how much is kept
_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**25), "MALLOC_TRIM_THRESHOLD_": (-1, 2**29)}
_RUN = click.Path(path_type=Path)
_json_paths = click.option("--json", "as_json", is_flag=True, help="Print the paths as one JSON array, nothing else.")


class LazyGroup(click.Group):
    """The commands defined here and those of `audit.commands.table`, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *_mounted_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name, or None."""
        own = super().get_command(ctx, cmd_name)
        mounted = _mounted_commands()
        if own is not None or cmd_name not in mounted:
            return own
        module = importlib.import_module(mounted[cmd_name][0])
        found: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing the mounted ones."""
        lines = {name: line for name, (_, line) in _mounted_commands().items()}
        lines |= {name: command.get_short_help_str(_HELP_WIDTH) for name, command in self.commands.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, lines[name]) for name in self.list_commands(ctx)])


class Terminated(BaseException):
    """SIGTERM was received; not an Exception, so that no handler of errors catches it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: that of the command or of its error."""
    # read when torch is loaded: threads that wait by spinning took 13 times the CPU time beside other processes
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _keep_freed_memory()
    with _terminable():
        return _exit_code(arguments)


def _keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors for the next ones, unless the user has set its thresholds.

    Returning it to the system after every batch took a quarter of the CPU time of a pass through a ResNet-20. Other C
    libraries than glibc have no such setting.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _THRESHOLDS):
        return
    with suppress(OSError, AttributeError):  # no C library to load, or not glibc
        library = ctypes.CDLL(None)
        for option, size in _THRESHOLDS.values():
            library.mallopt(option, size)


@contextmanager
def _terminable() -> Iterator[None]:
    """Unwind on SIGTERM as on Ctrl-C, so that no file is left half-written; only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_code(arguments: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(args=words, prog_name="rvaudit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except AuditError as error:
        _print_error(str(error))
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _print_error("interrupted; the same command resumes")
        return _INTERRUPTED
    except Terminated:
        _print_error("ended by SIGTERM; the same command resumes")
        return _TERMINATED


@click.group(
    cls=LazyGroup,
    context_settings={
        "token_normalize_func": lambda word: word.replace("_", "-"),
        "help_option_names": ["-h", "--help"],
    },
)
@click.version_option(version("rvaudit"), prog_name="rvaudit")
def cli() -> None:
    """Audit the robustness of a pretrained model's representation, and report on the results.

    Exit codes: 0 success, 1 some model failed, 2 usage, 3 environment, 4 refused for safety, 5 integrity,
    130 interrupted, 143 terminated.
    """


@cli.command("leaderboard")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=_RUN)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, nothing else.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table as FILE.csv.")
def leaderboard_command(runs: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    """Rank the models of one or more run folders.

    Of several, the column `run` says which folder a row is from.

    Rebuilds the leaderboard files of each folder from its records.

    Example: rvaudit leaderboard runs/first runs/second --out both.csv
    """
    if out is not None and out.suffix != ".csv":
        raise UsageError(f"--out writes CSV, so its name must end in .csv, not {out.suffix or out.name!r}")
    from audit.storage import write_atomically
    from reports.tables.leftovers import leftover_sentences
    from reports.tables.ranking import leaderboard_of, to_csv
    from reports.tables.table import frame_rows

    table = leaderboard_of(runs)
    _rebuild_leaderboards(runs)
    if out is not None:
        write_atomically(out, to_csv(table))
    if as_json:
        click.echo(json.dumps(frame_rows(table), allow_nan=False))
    else:
        _print_table(table, runs)
    for sentence in leftover_sentences(runs):
        click.echo(sentence, err=as_json)


@cli.command("figures")
@click.argument("path", type=_RUN)
@click.option("--only", default=None, help="One study of a folder of studies, such as figure3 or theorem-3.2.")
@_json_paths
def figures_command(path: Path, only: str | None, as_json: bool) -> None:
    """Redraw the figures of a folder.

    PATH is a run folder, or a folder of committed study rows such as docs.

    Example: rvaudit figures runs/digits
    """
    from reports.publish import write_figures
    from reports.studies.redraw import draw_studies, holds_studies

    paths = draw_studies(path, only) if only or holds_studies(path) else write_figures(path)
    _list_paths(paths, as_json=as_json)


@cli.command("report")
@click.argument("run", type=_RUN)
@click.option(
    "--compare", "other", metavar="OTHER", type=_RUN, help="Also write comparison.html: two runs side by side."
)
@_json_paths
def report_command(run: Path, other: Path | None, as_json: bool) -> None:
    """Rebuild the reports of a run.

    Writes leaderboard, figures and HTML report of a run folder from its records.

    Example: rvaudit report runs/second --compare runs/first
    """
    from reports.publish import write_html, write_reports

    _list_paths([*write_reports(run), *([write_html(run, other)] if other else [])], as_json=as_json)


def _mounted_commands() -> dict[str, tuple[str, str]]:
    """Return module and help line of every command of `audit.commands`."""
    commands: dict[str, tuple[str, str]] = importlib.import_module("audit.commands.table").COMMANDS
    return commands


def _rebuild_leaderboards(runs: Sequence[Path]) -> None:
    from reports.tables.ranking import write_leaderboard

    for run in runs:
        try:
            write_leaderboard(run)
        except EnvironmentFault as error:
            # an archive may be read-only; the table can still be printed
            click.echo(f"Note: {plain_text(str(error))}", err=True)


def _print_table(table: Any, runs: Sequence[Path]) -> None:
    from rich.console import Console

    from reports.tables.calibration import calibration_of
    from reports.tables.terminal import fitting_table

    terminal = Console(highlight=False)
    width = terminal.width if terminal.is_terminal else max(terminal.width, _PIPE_WIDTH)
    console = Console(highlight=False, width=width)
    for part in fitting_table(table, width, calibration_of(runs)):
        console.print(part)


def _list_paths(paths: Sequence[Path], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([str(path) for path in paths]))
        return
    for path in paths:
        click.echo(plain_text(str(path)))


def _print_error(message: str) -> None:
    lines = [plain_text(line) for line in message.splitlines()] or [""]
    click.echo("Error: " + "\n".join(lines), err=True)


if __name__ == "__main__":
    sys.exit(main())
