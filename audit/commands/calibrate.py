"""The command `calibrate`: compare estimators with channels of known mutual information."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from audit.commands.options import FOLDER, grouped_options, json_option
from audit.errors import UnknownNameError, UsageError
from audit.records import CalibrationRow


@dataclass(frozen=True)
class _ExtentOptions:
    brief: bool = False
    full: bool = False


_extent_options = grouped_options(
    "extent",
    _ExtentOptions,
    click.option("--brief", is_flag=True, help="One radius of a few channels, as in every run."),
    click.option("--full", is_flag=True, help="Every channel at every radius: minutes to hours."),
)


@click.command("calibrate")
@click.option("--estimator", "estimators", multiple=True, help="Repeatable. [all that the configuration names]")
@click.option("--config", type=click.Path(path_type=Path), default=None, help="A benchmark file, for its settings.")
@_extent_options
@click.option("--out", type=FOLDER, default=Path("runs/calibration"), show_default=True, help="A run folder.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Processes. [one per core; 1 with --brief]")
@json_option("the rows as one JSON array")
def calibrate_command(
    estimators: tuple[str, ...],
    config: Path | None,
    extent: "_ExtentOptions",
    out: Path,
    jobs: int | None,
    as_json: bool,
) -> int:
    """Compare estimators with channels of known normal- and worst-case information; exit code 1 where one fails.

    The default is the channels that tell most about errors; rows of equal settings and versions are kept, and a later
    run prints them at once.

    Without --config all estimators are calibrated with their default settings. The rows are stored in the run folder,
    and appear in its leaderboard.

    Example: rvaudit calibrate --estimator label-level --brief
    """
    from audit.calibration.calibrate import Extent
    from audit.commands.execution import calibrate_into
    from audit.config.yaml_source import read_config
    from audit.information.estimator import ESTIMATORS
    from audit.run.processes import cores

    known = ESTIMATORS if config is None else {each.shown: each.estimator() for each in read_config(config).estimators}
    if extent.brief and extent.full:
        raise UsageError("--brief and --full exclude each other: use one, or none for the default channels")
    channels: Extent = "brief" if extent.brief else "full" if extent.full else "default"
    for name in estimators:
        if name not in known:
            raise UnknownNameError("estimator", name, known)
    processes = jobs or (1 if extent.brief else cores())
    rows = calibrate_into([known[name] for name in dict.fromkeys(estimators or known)], out, channels, processes)
    if as_json:
        click.echo(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], allow_nan=False))
    else:
        _print_rows(rows)
    return 0 if all(row.passed for row in rows) else 1


def _print_rows(rows: Sequence[CalibrationRow]) -> None:
    from audit.commands.display import print_table

    header = ("estimator", "channel", "parameters", "normal: truth", "estimate", "worst: truth", "estimate", "verdict")
    print_table(header, [_shown(row) for row in rows])
    judged = [row for row in rows if _is_judged(row)]
    passed = sum(row.passed for row in judged)
    click.echo(f"{passed} of {len(judged)} channels with a verdict passed; nats, estimates beside closed forms.")


def _is_judged(row: CalibrationRow) -> bool:
    return row.normal_tolerance is not None or row.worst_tolerance is not None


def _shown(row: CalibrationRow) -> tuple[str, ...]:
    verdict = ("passed" if row.passed else "FAILED") if _is_judged(row) else "shown only"
    normal = f"{row.normal_nats:.3f} ± {row.normal_nats_se:.3f}"
    worst = "" if row.worst_nats is None else f"{row.worst_nats:.3f} ± {row.worst_nats_se:.3f}"
    truth = "" if row.true_worst_nats is None else f"{row.true_worst_nats:.4f}"
    return (row.estimator, row.channel, row.parameters, f"{row.true_normal_nats:.4f}", normal, truth, worst, verdict)
