"""Options that several commands take, and what they stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from audit.errors import UsageError

FOLDER = click.Path(file_okay=False, path_type=Path)
_Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say where models and data come from and where to compute."""
    options: list[_Option] = [
        click.option("--trust-code", is_flag=True, help="Allow factories named in file: references to run their code."),
        click.option("--offline", is_flag=True, help="Open no socket: use what is here."),
        click.option("--data-dir", type=FOLDER, default=Path("data"), show_default=True, help="Where data sets lie."),
        click.option("--model-dir", type=FOLDER, default=None, help="RobustBench's folder of weights. [./models]"),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def run_options(where: dict[str, Any]) -> Any:
    """Return the `RunOptions` that the source options stand for."""
    from audit.run.cell_runner import RunOptions
    from model_zoo.load import SourceSettings

    sources = SourceSettings(
        trust_code=where["trust_code"], offline=where["offline"], cache_dir=None, model_dir=where["model_dir"]
    )
    return RunOptions(sources, where["data_dir"], where["device"])


def image_shape(text: str) -> tuple[int, int, int]:
    """Return a shape written as 3x32x32; raises UsageError."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"shape {text!r} is not channels x height x width, such as 3x32x32")
    channels, height, width = map(int, parts)
    return channels, height, width


def slug(ref: str) -> str:
    """A folder's name from a reference: letters, digits, dots and dashes only."""
    name = ref.partition("?")[0].rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].partition(":")
    kept = "".join(c if c.isascii() and (c.isalnum() or c in ".-_") else "-" for c in (name[2] or name[0]))
    return kept.lstrip("._-")[:50] or "model"
