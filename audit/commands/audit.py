"""The command `audit`: audit models, without a benchmark file."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from audit.commands.options import (
    FOLDER,
    ExecutorOptions,
    SourceOptions,
    attack_option,
    balanced_option,
    dataset_option,
    fail_under_option,
    grouped_options,
    jobs_option,
    json_option,
    keep_images_option,
    layers_option,
    norm_option,
    preprocess_option,
    radii_option,
    restrict_option,
    slug,
    source_options,
)
from audit.config.benchmark import BenchmarkConfig
from audit.errors import ConfigError
from audit.records import AuditRecord

_ESTIMATORS = ("sandwich", "label-information")
_OPTIONS = {"layers": "--layer", "models": "MODEL", "estimators": "--estimator"}
_USAGE = 2


@dataclass(frozen=True)
class AuditRequest:
    """A benchmark of some models, as options spell it."""

    dataset: str
    layers: tuple[str, ...]
    radii: tuple[str, ...]
    norm: str
    images: int | None
    balanced: bool
    seeds: int
    seed: int
    estimators: tuple[str, ...]
    attack: str
    certificate: bool
    reduce: str
    preprocess: str
    restrict_classes: bool
    keep_images: bool

    def benchmark(self, models: Sequence[str]) -> BenchmarkConfig:
        """Return the benchmark of models, patterns expanded, each once.

        Raises ConfigError naming every option whose value is not legal, UnknownNameError for a pattern without a match.
        """
        from pydantic import ValidationError

        from model_zoo.lookup import expand_ref

        first, others = slug(models[0]).rstrip("-._") or "model", len(models) - 1
        values = {
            "name": f"{first[:40]}-and-{others}-more" if others else first,
            "dataset": self.dataset,
            "models": list(dict.fromkeys(ref for model in models for ref in expand_ref(model))),
            "layers": list(self.layers),
            "threats": [{"norm": self.norm, "eps": list(self.radii)}],
            "images": self.images,
            "balanced": self.balanced,
            "seeds": list(range(self.seed, self.seed + self.seeds)),
            "estimators": list(self.estimators),
            "certificate": self.certificate,
            "reduce": self.reduce,
            "preprocess": self.preprocess,
            "restrict_classes": self.restrict_classes,
            "keep_images": self.keep_images,
        }
        if self.attack != "audit":  # the default has no key of its own
            values["attack"] = self.attack
        try:
            return BenchmarkConfig.model_validate(values)
        except ValidationError as error:
            faults = [f"{_option(e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
            raise ConfigError(faults) from error


def _option(location: tuple[int | str, ...]) -> str:
    """Return the option that a fault's location in the benchmark stands for."""
    if not location:
        return "request"
    if location[0] == "threats":
        return "--norm" if "norm" in location else "--eps"
    key = str(location[0])
    return _OPTIONS.get(key, f"--{key}")


@dataclass(frozen=True)
class AuditExecution:
    """Whether to run or to forecast, in how many processes, and what exit code low accuracies give."""

    plan: bool
    jobs: int | None
    fail_under: float | None


@click.command("audit")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@grouped_options(
    "request",
    AuditRequest,
    dataset_option,
    layers_option,
    radii_option,
    norm_option,
    click.option("--images", type=int, default=None, help="Number of images, from the first. [all]"),
    balanced_option,
    click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="The first seed."),
    click.option(
        "--estimator", "estimators", multiple=True, default=_ESTIMATORS, show_default=True, help="Repeatable."
    ),
    attack_option,
    click.option("--certificate", is_flag=True, help="Also certify the accuracy of any head on the layers."),
    click.option("--reduce", default="flatten", show_default=True, help="flatten, or mean over positions."),
    preprocess_option,
    restrict_option,
    keep_images_option,
)
@grouped_options(
    "execution",
    AuditExecution,
    click.option("--plan", is_flag=True, help="Forecast passes, time, memory and disk, and compute nothing."),
    jobs_option,
    fail_under_option,
)
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<model>-<hash of the request>]")
@json_option("the records as one JSON array")
@source_options
def audit_command(
    models: tuple[str, ...],
    request: AuditRequest,
    execution: AuditExecution,
    out: Path | None,
    as_json: bool,
    sources: SourceOptions,
) -> int:
    """Audit each MODEL, a reference such as timm:resnet18, bundled:digits-*, or file:PATH?arch=...

    The same command resumes: finished cells are skipped. If a cell fails, the exit code is that of the failure, but for
    an estimator that runs by default and does not suit the images; where nothing could be computed because of the
    request, no folder stays behind.

    Example: rvaudit audit bundled:digits-vgg-* --dataset digits --layer logits --eps 0.2 --images 200
    """
    from audit.config.yaml_source import to_yaml
    from audit.storage import digest

    config = request.benchmark(models)
    folder = out or Path("runs") / f"{config.name}-{digest(config.canonical())[:8]}"
    if execution.plan:
        from audit.commands.inspect.plan import print_forecast

        print_forecast(config, folder, sources, as_json=as_json)
        return 0
    from audit.commands.execution import below, publish, run_benchmark  # loads torch: faults of the request come first

    is_new = not folder.exists()
    records = run_benchmark(config, to_yaml(config), folder, sources, ExecutorOptions(jobs=execution.jobs))
    publish(records, folder, as_json=as_json)
    if is_new and records and all(_code(record) == _USAGE for record in records):
        shutil.rmtree(folder)
    asked = click.get_current_context().get_parameter_source("estimators") is not ParameterSource.DEFAULT
    counted = records if asked else _answered(records)
    return max(map(_code, counted), default=0) or below(records, execution.fail_under)


def _answered(records: Sequence[AuditRecord]) -> list[AuditRecord]:
    """Return records without those of estimators that do not suit the images, where another estimator does."""
    from audit.run.upkeep.progress import record_key

    valid = {record_key(record)[:-1] for record in records if record.valid}
    return [record for record in records if _code(record) != _USAGE or record_key(record)[:-1] not in valid]


def _code(record: AuditRecord) -> int:
    """Return the exit code of a record: 0 if it is valid, else that of its failure."""
    return 0 if record.valid else int(record.details.get("exit_code", 1))
