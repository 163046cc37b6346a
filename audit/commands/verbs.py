"""The measuring commands; `reports.cli` mounts them. Heavy imports wait until a command runs."""

import json
from pathlib import Path
from typing import Any

import click

from audit.commands.around_runs import executor_options, run_cells
from audit.commands.around_runs import plan_command as plan_command
from audit.commands.around_runs import status_command as status_command
from audit.commands.around_runs import validate_command as validate_command
from audit.commands.attack import attack_command as attack_command
from audit.commands.certify import certify_command as certify_command
from audit.commands.features import features_command as features_command
from audit.commands.features import saliency_command as saliency_command
from audit.commands.inspect import compare_command as compare_command
from audit.commands.inspect import convert_command as convert_command
from audit.commands.inspect import doctor_command as doctor_command
from audit.commands.inspect import export_command as export_command
from audit.commands.options import FOLDER, image_shape, run_options, slug, source_options
from audit.commands.reproduce import reproduce_command as reproduce_command
from audit.commands.verify import verify_command as verify_command
from audit.errors import ConfigError, UsageError

COMMANDS = {
    "run": "Run a benchmark file, or resume it.",
    "audit": "Audit one model.",
    "attack": "Attack one model, and check the attack.",
    "certify": "Bound every head on a layer, with exhibits.",
    "verify": "Check a run folder, or the exhibits of a certificate.",
    "validate": "Find every fault of a benchmark file.",
    "plan": "Forecast what a benchmark costs.",
    "status": "Tell what of a run is done, failed or to do.",
    "compare": "Pair the cells of two runs, and tell what differs.",
    "export": "Write a run as csv, parquet or safetensors.",
    "convert": "Turn a checkpoint into safetensors, safely.",
    "doctor": "Look for what this machine lacks.",
    "calibrate": "Hold estimators against channels whose information is known.",
    "features": "Rank the features of a layer by their vulnerability.",
    "saliency": "Map where a layer finds its information.",
    "reproduce": "Compute a table or figure of the paper.",
    "models": "List the models that can be named.",
    "layers": "List the layers of a model.",
    "train": "Train a model from its recipe.",
}

_ESTIMATORS = ("sandwich", "label-information")


@click.command("run")
@click.argument("config", type=click.Path(path_type=Path), default=Path("benchmark.yaml"))
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<name of the benchmark>]")
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON array, nothing else.")
@executor_options
@source_options
def run_command(config: Path, out: Path | None, as_json: bool, **where: Any) -> int:
    """Run the benchmark that CONFIG describes; finished cells of its run folder are not computed again.

    Several processes, here or on machines that share the folder, may run the same CONFIG at once.
    """
    from audit.run.cell import read_config
    from audit.run.run_loop import claim, expand

    benchmark = read_config(config)
    folder = out or Path("runs") / benchmark.name
    cells = expand(benchmark)
    claim(folder, benchmark, config.read_text(encoding="utf-8"))
    records = run_cells(cells, folder, where)
    _calibrate_briefly(benchmark, records, folder)
    _publish(records, folder, as_json)
    return 0 if all(record.valid for record in records) else 1


@click.command("audit")
@click.argument("model")
@click.option("--dataset", required=True, help="digits, cifar10, ..., folder:PATH, npz:PATH or parquet:PATH.")
@click.option("--layer", "layers", multiple=True, default=("logits",), show_default=True, help="Repeatable.")
@click.option("--eps", "radii", multiple=True, required=True, help="Radius in pixel units, such as 8/255. Repeatable.")
@click.option("--norm", default="linf", show_default=True, help="linf, l2 or l1.")
@click.option("--images", type=int, default=None, help="How many images, from the first. [all]")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many seeds.")
@click.option("--estimator", "estimators", multiple=True, default=_ESTIMATORS, show_default=True, help="Repeatable.")
@click.option("--reduce", default="flatten", show_default=True, help="flatten, or mean over positions.")
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<model>-<hash of the request>]")
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON array, nothing else.")
@source_options
def audit_command(model: str, dataset: str, out: Path | None, as_json: bool, **request: Any) -> int:
    """Audit MODEL, a reference such as timm:resnet18, bundled:digits-vgg-robust or file:PATH?arch=...

    The exit code is that of what failed, if anything did.
    """
    from audit.config.yaml_source import to_yaml
    from audit.run.run_loop import claim, expand
    from audit.storage import digest

    fields = ("layers", "radii", "norm", "images", "seeds", "estimators", "reduce")
    where = {name: value for name, value in request.items() if name not in fields}
    config = _request(model, dataset, {name: request[name] for name in fields})
    folder = out or Path("runs") / f"{config.name}-{digest(config.canonical())[:8]}"
    claim(folder, config, to_yaml(config))
    records = run_cells(expand(config), folder, where)
    _calibrate_briefly(config, records, folder)
    _publish(records, folder, as_json)
    return max((int(record.details.get("exit_code", 1)) for record in records if not record.valid), default=0)


@click.command("calibrate")
@click.option("--estimator", "estimators", multiple=True, help="Repeatable. [all that the configuration names]")
@click.option("--config", type=click.Path(path_type=Path), default=None, help="A benchmark, for its settings.")
@click.option("--brief", is_flag=True, help="One radius of a few channels, as every run does.")
@click.option("--out", type=FOLDER, default=Path("runs/calibration"), show_default=True, help="A run folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON array, nothing else.")
def calibrate_command(estimators: tuple[str, ...], config: Path | None, brief: bool, out: Path, as_json: bool) -> int:
    """Hold estimators against channels whose normal and worst-case information is known; exit 1 where one fails.

    Without --config all estimators are taken, with their default settings. The rows are stored in the folder, where
    the leaderboard of a run finds them.
    """
    from dataclasses import asdict

    rows = [row for each in _chosen_estimators(estimators, config) for row in _calibrated(each, out, brief)]
    if as_json:
        click.echo(json.dumps([{**asdict(row), "passed": row.passed} for row in rows], allow_nan=False))
    else:
        _print_calibration(rows)
    return 0 if all(row.passed for row in rows) else 1


@click.command("models")
@click.option("--source", default=None, help="bundled, robustbench, timm or torchvision. [bundled and robustbench]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, nothing else.")
def models_command(source: str | None, as_json: bool) -> None:
    """List models, what they were trained for, and accuracies others published."""
    from dataclasses import asdict

    from audit.commands.display import print_table
    from model_zoo.catalogue import list_models

    entries = [entry for each in ([source] if source else ["bundled", "robustbench"]) for entry in list_models(each)]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], allow_nan=False))
        return
    header = ("reference", "data set", "trained for", "natural", "adversarial", "source of the numbers")
    print_table(header, [_model_row(entry) for entry in entries])
    click.echo(f"{len(entries)} models", err=True)


@click.command("layers")
@click.argument("model")
@click.option("--shape", default=None, help="Image shape such as 3x32x32, where the model does not tell.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, nothing else.")
@source_options
def layers_command(model: str, shape: str | None, as_json: bool, **where: Any) -> None:
    """List the layers of MODEL: output shape, dimension, calls per forward, overwritten in place later."""
    import torch

    from audit.commands.display import print_table
    from audit.representation.layers import describe_layers
    from model_zoo.load import load_model
    from model_zoo.prepared import check_outputs

    loaded = load_model(model, run_options(where).sources)
    size = image_shape(shape) if shape else loaded.image_shape
    if size is None:
        raise UsageError(f"{model!r} does not tell its image shape: add --shape, such as --shape 3x32x32")
    if shape and loaded.num_classes:
        check_outputs(loaded.network, loaded.num_classes, size, loaded.entry.name)
    layers = describe_layers(loaded.network, torch.zeros(1, *size))
    if as_json:
        click.echo(json.dumps([layer._asdict() for layer in layers]))
        return
    header = ("layer", "kind", "output", "dimension", "calls", "outputs", "overwritten")
    rows = [
        (x.name, x.kind, "x".join(map(str, x.shape)), x.dimension, x.calls, x.outputs, "yes" if x.overwritten else "")
        for x in layers
    ]
    print_table(header, rows)


@click.command("train")
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--out", type=FOLDER, default=Path("trained"), show_default=True, help="Where weights and card go.")
@click.option("--dataset", default=None, help="For guess-first recipes: a data set, such as parquet:PATH. [digits]")
@click.option("--count", type=click.IntRange(1), default=None, help="For guess-first recipes: how many images. [all]")
@click.option("--epochs", type=int, default=None, help="For guess-first recipes. [200]")
@click.option("--seed", type=click.IntRange(0), default=None, help="For guess-first recipes. [0]")
def train_command(recipes: tuple[str, ...], out: Path, **run: Any) -> None:
    """Train bundled models again; RECIPE is a name of `rvaudit models --source bundled`, or all.

    Others are guess-first/NAME, with NAME c-dv, c-js, c-dv-ie, c-js-ie, cnn, vib or lenet: load what they leave as
    file:OUT/<name>.safetensors. A run that was stopped goes on where it was.
    """
    from audit.commands.display import Display
    from audit.studies.recipes import (
        RECIPES,
        GuessFirstRecipe,
        GuessFirstRun,
        find_recipe,
        train_guess_first,
        train_recipe,
    )

    given = {name: value for name, value in run.items() if value is not None}
    for recipe in list(RECIPES.values()) if recipes == ("all",) else [find_recipe(name) for name in recipes]:
        if isinstance(recipe, GuessFirstRecipe):
            settings = GuessFirstRun(**given)
            with Display(settings.epochs or recipe.training.epochs) as display:
                card = train_guess_first(recipe, settings, out, display.step)
        elif given:
            raise UsageError(f"recipe {recipe.id} is fixed: leave out --{' --'.join(given)}")
        else:
            with Display(recipe.epochs) as display:
                card = train_recipe(recipe, out, display.step)
        natural, adversarial = (number["value"] for number in card["published"])
        click.echo(f"{card['id']}: natural {natural:.3f}, adversarial {adversarial:.3f}, sha256 {card['sha256']}")


def _chosen_estimators(names: tuple[str, ...], config: Path | None) -> list[Any]:
    from audit.errors import UnknownNameError
    from audit.information.registry import ESTIMATORS
    from audit.run.cell import read_config

    known = ESTIMATORS if config is None else {x.name: x.estimator() for x in read_config(config).estimators}
    for name in names:
        if name not in known:
            raise UnknownNameError("estimator", name, known)
    return [known[name] for name in names or known]


def _calibrated(estimator: Any, folder: Path, brief: bool) -> list[Any]:
    from audit.calibration.calibrate import applicable, calibrate, settings_key
    from audit.commands.display import Display
    from audit.records import write_calibration

    with Display(len(applicable(estimator, brief))) as display:
        rows = calibrate(estimator, brief, lambda name, done: display.channel(f"{estimator.name}: {name}", done))
    write_calibration(folder, settings_key(estimator), rows)
    return rows


def _calibrate_briefly(benchmark: Any, records: list[Any], folder: Path) -> None:
    """Every leaderboard carries its calibration; one that is there already, brief or full, is kept.

    The same settings calibrate the same, so a brief round is remembered between runs, in the cache folder.
    """
    from audit.calibration.calibrate import settings_key
    from audit.errors import EnvironmentFault
    from audit.records import is_calibrated, read_calibration, write_calibration
    from model_zoo.prepared import default_cache

    used = {record.estimator for record in records if record.valid}
    for settings in benchmark.settings():
        key = settings_key(settings.estimator)
        if settings.estimator.name not in used or is_calibrated(folder, key):
            continue
        try:
            if not is_calibrated(default_cache(), key):
                _calibrated(settings.estimator, default_cache(), brief=True)
            write_calibration(folder, key, read_calibration(default_cache(), key))
        except EnvironmentFault:  # no cache may be written here
            _calibrated(settings.estimator, folder, brief=True)


def _print_calibration(rows: list[Any]) -> None:
    from audit.commands.display import print_table

    header = ("estimator", "channel", "parameters", "normal: truth", "estimate", "worst: truth", "estimate", "verdict")
    print_table(header, [_calibration_row(row) for row in rows])
    judged = [row for row in rows if row.normal_tolerance is not None or row.worst_tolerance is not None]
    passed = sum(row.passed for row in judged)
    click.echo(f"{passed} of {len(judged)} channels with a verdict passed; nats, estimates beside closed forms.")


def _calibration_row(row: Any) -> tuple[str, ...]:
    judged = row.normal_tolerance is not None or row.worst_tolerance is not None
    verdict = ("passed" if row.passed else "FAILED") if judged else "shown only"
    normal = f"{row.normal_nats:.3f} ± {row.normal_nats_se:.3f}"
    worst = "" if row.worst_nats is None else f"{row.worst_nats:.3f} ± {row.worst_nats_se:.3f}"
    truth = "" if row.true_worst_nats is None else f"{row.true_worst_nats:.4f}"
    return (row.estimator, row.channel, row.parameters, f"{row.true_normal_nats:.4f}", normal, truth, worst, verdict)


def _publish(records: list[Any], folder: Path, as_json: bool) -> None:
    """Derive everything people look at; the command's own output is the records, or where to look."""
    from audit.commands.display import plain
    from reports.publish import write_reports
    from reports.tables.table import to_rows

    failures = {f"{plain(record.model)}: {plain(record.reason)}": None for record in records if not record.valid}
    for failure in failures:  # once, however many cells of the model it stopped
        click.echo(f"Error: {failure}", err=True)
    write_reports(folder)
    if as_json:
        click.echo(json.dumps(to_rows(records), allow_nan=False))
    else:
        _print_summary(records, folder)


def _print_summary(records: list[Any], folder: Path) -> None:
    from audit.commands.display import print_table
    from reports.tables.contradictions import cross_check

    header = ("model", "layer", "eps", "estimator", "natural", "adversarial", "worst nats", "RV", "est. bound", "flags")
    rows = [
        (
            r.model, r.layer, f"{r.eps:.4g}", r.estimator, f"{r.natural_accuracy:.3f}",
            f"{r.adversarial_accuracy:.3f}", f"{r.worst_nats:.2f} ± {r.worst_nats_se:.2f}",
            f"{r.rv:.2f} ± {r.rv_se:.2f}", "" if r.fano_accuracy_bound is None else f"{r.fano_accuracy_bound:.3f}",
            ", ".join(flag.partition(":")[0] for flag in r.flags),
        )
        for r in cross_check(records)
        if r.valid
    ]  # fmt: skip
    if not rows:
        return
    print_table(header, rows)
    click.echo("Accuracies are measured; nats, RV and the bound are estimates.")
    click.echo(f"{folder / 'report.html'}  {folder / 'leaderboard.csv'}  {folder / 'figures'}")


def _request(model: str, dataset: str, fields: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from audit.config.benchmark import BenchmarkConfig

    values = {
        "name": slug(model), "dataset": dataset, "models": [model], "layers": list(fields["layers"]),
        "threats": [{"norm": fields["norm"], "eps": list(fields["radii"])}], "images": fields["images"],
        "seeds": list(range(fields["seeds"])), "estimators": list(fields["estimators"]), "reduce": fields["reduce"],
    }  # fmt: skip
    try:
        return BenchmarkConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            [f"{_option(e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        ) from error


def _option(location: tuple[Any, ...]) -> str:
    if location[:1] == ("threats",):
        return "--norm" if "norm" in location else "--eps"
    if not location:
        return "request"
    return {"layers": "--layer", "models": "MODEL", "estimators": "--estimator"}.get(location[0], f"--{location[0]}")


def _model_row(entry: Any) -> tuple[str, ...]:
    numbers = {number.metric: number for number in entry.published}
    natural, adversarial = numbers.get("natural_accuracy"), numbers.get("adversarial_accuracy")
    radius = f" {entry.trained_norm} {entry.trained_eps:.4g}" if entry.trained_norm else ""
    shown = [f"{number.value:.4f}" if number else "" for number in (natural, adversarial)]
    shown_number = adversarial or natural
    reference = shown_number.source if shown_number else ""
    return (entry.ref, entry.dataset, entry.training + radius, *shown, reference)
