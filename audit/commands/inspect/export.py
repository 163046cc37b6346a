"""The command `export`: write a leaderboard as a file, or a run in the forms that others publish results in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, json_option
from audit.errors import UsageError

_FORMATS = ("csv", "parquet", "safetensors", "robustbench", "hf-eval", "card")
_DEFAULTS = {"robustbench": "robustbench", "hf-eval": "hf-eval", "card": "card.md"}  # others: leaderboard.<format>


@click.command("export")
@click.argument("run", type=FOLDER)
@click.argument("target", metavar="[OUT]", type=click.Path(path_type=Path), required=False)
@click.option("--format", "form", type=click.Choice(_FORMATS), default=None, help="[the suffix of OUT]")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="OUT as an option. [below RUN/exports]")
@click.option("--model", default=None, help="For --format card: the model, of a run of several.")
@json_option("one JSON object")
def export_command(
    run: Path, target: Path | None, form: str | None, out: Path | None, model: str | None, as_json: bool
) -> int:
    """Write the leaderboard of the run folder RUN as OUT, a .csv, .parquet or .safetensors file.

    safetensors holds every numeric column as float64 with NaN for missing values, and text columns as JSON in its
    header.

    With --format robustbench, OUT is a folder that receives one JSON file for each model and threat model, with the
    fields of RobustBench's model_info files (accuracies in percent), and beside it clean and adversarial images with
    their labels, where the run has kept them (--keep-images).

    With --format hf-eval, OUT is a folder that receives one YAML file for each model: its Hugging Face evaluation
    results (model-index). With --format card, OUT is a Markdown file: the section of a model card for one model.

    Example: rvaudit export runs/mine --format card --model digits-vgg-robust --out card.md
    """
    if (target is not None and out is not None) or (target is None and out is None and form is None):
        raise UsageError("name the file or folder to write once: rvaudit export RUN OUT, or --out OUT, or --format")
    if model is not None and form != "card":
        raise UsageError(f"--model {model} is for --format card, the section of one model's card")
    place = target or out or run / "exports" / _DEFAULTS.get(form or "", f"leaderboard.{form}")
    if form == "robustbench":
        facts = _write_claims(run, place)
    elif form == "hf-eval":
        facts = _write_evaluations(run, place)
    else:
        facts = _write_card(run, place, model) if form == "card" else _write_table(run, place, form)
    from audit.commands.display import print_facts

    if as_json:
        click.echo(json.dumps(facts))
    else:
        print_facts(facts)
    return 0


def _write_table(run: Path, out: Path, form: str | None) -> dict[str, Any]:
    import pandas as pd

    from audit.records import read_records
    from audit.storage import write_atomically
    from reports.tables.comparison import to_safetensors
    from reports.tables.ranking import leaderboard, to_csv, to_parquet
    from reports.tables.table import to_frame

    writers: dict[str, Callable[[pd.DataFrame], str | bytes]] = {
        ".csv": to_csv,
        ".parquet": to_parquet,
        ".safetensors": to_safetensors,
    }
    suffix = f".{form}" if form else out.suffix
    if suffix not in writers:
        message = f"{out.name!r} must end in one of {', '.join(writers)}: the suffix selects the format"
        raise UsageError(f"{message}; for RobustBench's fields add --format robustbench")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; a leaderboard is written as one file")
    table = leaderboard(to_frame(read_records(run)))
    write_atomically(out, writers[suffix](table))
    return {"path": str(out), "rows": len(table), "columns": len(table.columns)}


def _write_evaluations(run: Path, out: Path) -> dict[str, Any]:
    """Write one YAML file of Hugging Face evaluation results for each model of a run."""
    from audit.config.yaml_source import dump_yaml
    from audit.records import read_records
    from audit.storage import write_atomically
    from reports.tables.hugging_face import model_indices

    if out.is_file():
        raise UsageError(f"{out} is a file; evaluation results are written into a folder, a file for each model")
    found = model_indices(read_records(run))
    if not found:
        raise UsageError(f"{run} holds no valid record, so there is no result to write")
    for name, index in found.items():
        write_atomically(out / f"{name}.yaml", dump_yaml(index))
    return {"path": str(out), "models": len(found)}


def _write_card(run: Path, out: Path, model: str | None) -> dict[str, Any]:
    """Write the Markdown section of a model card for one model of a run."""
    from audit.records import read_records
    from audit.storage import write_atomically
    from reports.tables.model_card import card_section

    if out.is_dir():
        raise UsageError(f"{out} is a folder; the section of a model card is written as one file")
    text = card_section(read_records(run), model)
    write_atomically(out, text)
    return {"path": str(out), "lines": text.count("\n")}


def _write_claims(run: Path, out: Path) -> dict[str, Any]:
    """Write the claims of a run into a folder; images first, so that no claim names a file that is not there."""
    from hashlib import sha256

    from audit.records import read_records
    from audit.run.evidence.kept import has_images, read_images, to_claim_file
    from audit.storage import write_atomically
    from reports.tables.robustbench import claims

    if out.is_file():
        raise UsageError(f"{out} is a file; RobustBench's claims are written into a folder")
    found, with_images = claims(read_records(run)), 0
    if not found:
        raise UsageError(f"{run} holds no valid record, so there is no accuracy to write")
    for claim in found:
        path, fields = out / claim.path, claim.fields
        if has_images(run, claim.record):
            content = to_claim_file(read_images(run, claim.record), fields["rvaudit"])
            write_atomically(path.with_name(f"{path.name}.safetensors"), content)
            fields["rvaudit"] |= {
                "images_file": f"{path.name}.safetensors",
                "images_sha256": sha256(content).hexdigest(),
            }
            with_images += 1
        text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
        write_atomically(path.with_name(f"{path.name}.json"), text)
    if with_images < len(found):
        missing = len(found) - with_images
        click.echo(
            f"Note: {missing} of {len(found)} claims have no images: run with --keep-images to add them", err=True
        )
    return {"path": str(out), "claims": len(found), "with images": with_images}
