"""Options that several commands share; a group of options becomes one typed argument. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

import click

from audit.config.benchmark import TIERS
from audit.errors import UsageError
from audit.storage import digest

FOLDER = click.Path(file_okay=False, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
Command = Callable[..., Any]
Option = Callable[[Command], Command]

dataset_option = click.option(
    "--dataset", required=True, help="digits, cifar10, ..., folder:PATH, npz:PATH or parquet:PATH."
)
norm_option = click.option("--norm", default="linf", show_default=True, help="linf, l2 or l1.")
eps_option = click.option("--eps", required=True, help="Radius in pixel units, such as 8/255.")
data_dir_option = click.option(
    "--data-dir", type=FOLDER, default=Path("data"), show_default=True, help="The folder of data sets."
)
offline_option = click.option("--offline", is_flag=True, help="Use local files only: open no network connection.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")

attack_option = click.option(
    "--attack",
    "--tier",
    "attack",
    type=click.Choice(TIERS),
    default="audit",
    show_default=True,
    help="Strength of the attack on the label.",
)
layers_option = click.option(
    "--layer", "layers", multiple=True, default=("logits",), show_default=True, help="Repeatable."
)
radii_option = click.option(
    "--eps", "radii", multiple=True, required=True, help="Radius in pixel units, such as 8/255. Repeatable."
)
images_option = click.option(
    "--images", type=click.IntRange(1), default=None, help="Number of images, from the first. [all]"
)


def count_option(text: str) -> Option:
    """Return the option of a number of images, which is also spelled `--count`."""
    return click.option("--images", "--count", "count", type=click.IntRange(1), default=None, help=text)


balanced_option = click.option(
    "--balanced", is_flag=True, help="Take equally many images of each class instead of the first."
)
jobs_option = click.option(
    "--jobs",
    type=click.IntRange(1),
    default=None,
    help="Processes of a local run, which divide its models. [one per core; 1 on a GPU or for a short run]",
)
fail_under_option = click.option(
    "--fail-under",
    type=click.FloatRange(0, 1),
    default=None,
    help="Exit with 1 where an adversarial accuracy is below this fraction: for pipelines.",
)
preprocess_option = click.option(
    "--preprocess",
    type=click.Choice(["model", "none"]),
    default="model",
    show_default=True,
    help="Resize and crop images as the model's own preprocessing does, or take them as they are.",
)
restrict_option = click.option(
    "--restrict-classes", is_flag=True, help="Leave out the network's outputs that are no class of the data set."
)


keep_images_option = click.option(
    "--keep-images",
    is_flag=True,
    help="Keep the adversarial and worst-case images of every cell in the run folder, for `rvaudit verify`; "
    "finished cells without images are computed again.",
)


def json_option(content: str) -> Option:
    """Return the option `--json`, which prints `content` and nothing else on standard output."""
    return click.option("--json", "as_json", is_flag=True, help=f"Print {content}, nothing else.")


def grouped_options(argument: str, kind: type, *options: Option) -> Option:
    """Return a decorator that adds options and passes their values as one argument, a dataclass of type `kind`.

    The fields of the dataclass are the parameters of the options.
    """
    names = [field.name for field in fields(kind)]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_group(*positional: Any, **values: Any) -> Any:
            group = kind(**{name: values.pop(name) for name in names if name in values})
            return command(*positional, **{argument: group}, **values)

        for option in reversed(options):
            option(with_group)
        return with_group

    return decorate


@dataclass(frozen=True)
class SourceOptions:
    """Sources of models and data, and the device and batches to compute with."""

    trust_code: bool = False
    offline: bool = False
    data_dir: Path = Path("data")
    model_dir: Path | None = None
    device: str = "auto"
    batch_size: int | None = None
    base: Path | tuple[Path, ...] | None = None


source_options = grouped_options(
    "sources",
    SourceOptions,
    click.option("--trust-code", is_flag=True, help="Allow the Python factories that file: references name to run."),
    offline_option,
    data_dir_option,
    click.option("--model-dir", type=FOLDER, default=None, help="The folder of RobustBench's weights. [./models]"),
    device_option,
    click.option(
        "--batch-size", type=click.IntRange(1), default=None, help="Images in one pass. [as many as memory bears]"
    ),
)


@dataclass(frozen=True)
class ExecutorOptions:
    """The executor of a run: this machine with a number of processes, or a Ray cluster."""

    executor: str = "local"
    jobs: int | None = None
    address: str | None = None
    workers: int | None = None
    gpus_per_cell: float = 0.0


executor_options = grouped_options(
    "executor",
    ExecutorOptions,
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="This machine, or a Ray cluster; cells that share a search stay together.",
    ),
    jobs_option,
    click.option("--address", default=None, help="Address of the Ray cluster. [a new one on this machine]"),
    click.option("--workers", type=click.IntRange(1), default=None, help="Ray processes on this machine."),
    click.option(
        "--gpus-per-cell", type=click.FloatRange(0), default=0.0, show_default=True, help="GPUs, such as 0.25."
    ),
)


def image_shape(text: str) -> tuple[int, int, int]:
    """Return an image shape written as 3x32x32; raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"shape {text!r} is not channels x height x width, such as 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def request_folder(verb: str, model: str, decides: dict[str, Any]) -> Path:
    """Return the folder of a request, named by the model and by a hash of everything that decides the numbers."""
    return Path("runs") / f"{verb}-{slug(model)}-{digest({**decides, 'model': model})[:8]}"


def slug(ref: str) -> str:
    """Return a folder name for a model reference: ASCII letters, digits, dots, dashes and underscores."""
    name = ref.partition("?")[0].rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].partition(":")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".-_") else "-" for c in (name[2] or name[0]))
    return kept.lstrip("._-")[:50] or "model"
