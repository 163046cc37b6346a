"""The command `audit`: audit one model, without a benchmark file."""

from dataclasses import dataclass
from pathlib import Path

import click

from audit.commands.options import (
    FOLDER,
    ExecutorOptions,
    SourceOptions,
    dataset_option,
    grouped_options,
    json_option,
    keep_images_option,
    norm_option,
    preprocess_option,
    restrict_option,
    slug,
    source_options,
)
from audit.config.benchmark import BenchmarkConfig
from audit.errors import ConfigError

_ESTIMATORS = ("sandwich", "label-information")
_OPTIONS = {"layers": "--layer", "models": "MODEL", "estimators": "--estimator"}


@dataclass(frozen=True)
class AuditRequest:
    """A benchmark of one model, as options spell it."""

    dataset: str
    layers: tuple[str, ...]
    radii: tuple[str, ...]
    norm: str
    images: int | None
    seeds: int
    estimators: tuple[str, ...]
    reduce: str
    preprocess: str
    restrict_classes: bool
    keep_images: bool

    def benchmark(self, model: str) -> BenchmarkConfig:
        """Return the benchmark of a model; raises ConfigError naming every option whose value is not legal."""
        from pydantic import ValidationError

        values = {
            "name": slug(model),
            "dataset": self.dataset,
            "models": [model],
            "layers": list(self.layers),
            "threats": [{"norm": self.norm, "eps": list(self.radii)}],
            "images": self.images,
            "seeds": list(range(self.seeds)),
            "estimators": list(self.estimators),
            "reduce": self.reduce,
            "preprocess": self.preprocess,
            "restrict_classes": self.restrict_classes,
            "keep_images": self.keep_images,
        }
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


@click.command("audit")
@click.argument("model")
@grouped_options(
    "request",
    AuditRequest,
    dataset_option,
    click.option("--layer", "layers", multiple=True, default=("logits",), show_default=True, help="Repeatable."),
    click.option(
        "--eps", "radii", multiple=True, required=True, help="Radius in pixel units, such as 8/255. Repeatable."
    ),
    norm_option,
    click.option("--images", type=int, default=None, help="Number of images, from the first. [all]"),
    click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Number of seeds."),
    click.option(
        "--estimator", "estimators", multiple=True, default=_ESTIMATORS, show_default=True, help="Repeatable."
    ),
    click.option("--reduce", default="flatten", show_default=True, help="flatten, or mean over positions."),
    preprocess_option,
    restrict_option,
    keep_images_option,
)
@click.option("--out", type=FOLDER, default=None, help="The run folder. [runs/<model>-<hash of the request>]")
@json_option("the records as one JSON array")
@source_options
def audit_command(model: str, request: AuditRequest, out: Path | None, as_json: bool, sources: SourceOptions) -> int:
    """Audit MODEL, a reference such as timm:resnet18, bundled:digits-vgg-robust or file:PATH?arch=...

    If a cell fails, the exit code is that of the failure.
    """
    from audit.config.yaml_source import to_yaml
    from audit.storage import digest

    config = request.benchmark(model)
    from audit.commands.execution import publish, run_benchmark  # loads torch: faults of the request come first

    folder = out or Path("runs") / f"{config.name}-{digest(config.canonical())[:8]}"
    records = run_benchmark(config, to_yaml(config), folder, sources, ExecutorOptions())
    publish(records, folder, as_json=as_json)
    return max((int(record.details.get("exit_code", 1)) for record in records if not record.valid), default=0)
