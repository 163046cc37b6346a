"""The command `certify`: bound the adversarial accuracy of any head on a layer, with collision witnesses."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from audit.commands.options import (
    FILE,
    SourceOptions,
    balanced_option,
    dataset_option,
    grouped_options,
    images_option,
    json_option,
    layers_option,
    norm_option,
    preprocess_option,
    radii_option,
    restrict_option,
    source_options,
)
from audit.errors import UsageError

_SHORT_TIERS = {
    "proved": "proved",
    "float32": "bit-identical at float32",
    "float16": "bit-identical at float16",
    "bfloat16": "bit-identical at bfloat16",
    "noise": "below noise floor",
}
_COLUMNS = (
    "layer",
    "eps",
    "images",
    "best head",
    "achieved",
    "certified",
    "population",
    "held out",
    "hubs",
    "pairs",
)
_LEDGER = ("proved", "broken", "undecided")
_LONG = 60.0  # seconds


@dataclass(frozen=True)
class CertifyOptions:
    """Images, layers, threat models, search, heads and population bounds, as options spell them."""

    dataset: str
    layers: tuple[str, ...]
    radii: tuple[str, ...]
    norm: str
    images: int | None
    balanced: bool
    confidence: float
    equality: str
    hubs: int
    pairs: bool
    pair_passes: float
    held_out: bool
    head_images: int
    train_dataset: str | None
    attack: str
    heads: tuple[str, ...]
    ledger: bool
    ledger_passes: float
    seed: int
    preprocess: str
    restrict_classes: bool


@click.command("certify")
@click.argument("model")
@grouped_options(
    "chosen",
    CertifyOptions,
    dataset_option,
    layers_option,
    radii_option,
    norm_option,
    images_option,
    balanced_option,
    click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the population bounds."),
    click.option(
        "--equality",
        default="float32",
        show_default=True,
        help="What the same features means: proved, float32, float16, bfloat16 or noise.",
    ),
    click.option("--hubs", type=click.IntRange(0), default=2, show_default=True, help="Maximum number of hubs."),
    click.option("--pairs/--hubs-only", default=True, help="Search for pairs among images outside large hubs. [pairs]"),
    click.option(
        "--pair-passes",
        type=click.FloatRange(0),
        default=12.0,
        show_default=True,
        help="Limit on passes per image spent on pairs; inf tries every pair and hub, and layers of over 799 features.",
    ),
    click.option("--held-out", is_flag=True, help="Add a population bound from hubs chosen on half of the images."),
    click.option(
        "--head-images",
        type=click.IntRange(0),
        default=500,
        show_default=True,
        help="Images that heads are trained on.",
    ),
    click.option(
        "--train-dataset", default=None, help="Data set to train heads on. [other images of the certified data set]"
    ),
    click.option(
        "--attack",
        "--tier",
        "attack",
        default="smoke",
        show_default=True,
        help="Attack on heads: smoke, audit or leaderboard.",
    ),
    click.option(
        "--heads",
        multiple=True,
        default=("own",),
        show_default=True,
        help="Heads to measure: own, slf, mlp, alf, all or none. Repeatable; all but own are trained first.",
    ),
    click.option("--ledger", is_flag=True, help="Prove, for each image, that the network keeps or loses it."),
    click.option(
        "--ledger-passes",
        type=click.FloatRange(0),
        default=150.0,
        show_default=True,
        help="Limit on passes per image of the ledger's bounds; deep networks need more, a ResNet of 9 layers 600.",
    ),
    click.option("--seed", type=int, default=0, show_default=True),
    preprocess_option,
    restrict_option,
)
@click.option(
    "--out", type=FILE, default=None, help="Witness file; one for each layer and radius if there are several."
)
@click.option(
    "--rows", "table", type=FILE, default=None, help="Also write the rows as FILE.csv, and figures beside it."
)
@json_option("the rows as one JSON array")
@source_options
def certify_command(
    model: str, chosen: CertifyOptions, out: Path | None, table: Path | None, as_json: bool, sources: SourceOptions
) -> int:
    """Bound the adversarial accuracy of any head on layers of MODEL, and measure heads for comparison.

    If images of different classes can be moved, each inside its own ball, to the same features, no head classifies
    all of them correctly. The moved images are written to the witness file, which `rvaudit verify` verifies.

    Example: rvaudit certify bundled:digits-vgg-robust --dataset digits --layer logits --eps 0.2 --out w.safetensors
    """
    chosen = _renamed(chosen)
    if table is not None and table.suffix != ".csv":
        raise UsageError(f"--rows writes CSV, so its name must end in .csv, not {table.name!r}")
    rows = _certified_rows(model, chosen, out, sources)
    if table is not None:
        from audit.storage import write_atomically
        from reports.figures.certificate_figure import to_csv, write_certificate_figures

        write_atomically(table, to_csv(rows))
        write_certificate_figures(rows, table)
    if as_json:
        click.echo(json.dumps(rows, allow_nan=False))
    else:
        _print_rows(rows)
    return 0


def _renamed(chosen: CertifyOptions) -> CertifyOptions:
    """Return options of earlier versions, where `--tier` was what is `--equality` now, as they are spelled now."""
    if chosen.attack not in (*_SHORT_TIERS, *_SHORT_TIERS.values()):
        return chosen
    click.echo(f"Note: --tier {chosen.attack} is now --equality {chosen.attack}; --tier is the attack", err=True)
    return replace(chosen, equality=chosen.attack, attack="smoke")


def _certified_rows(
    model: str, chosen: CertifyOptions, out: Path | None, sources: SourceOptions
) -> list[dict[str, Any]]:
    """Certify, write the witness files, and return the rows."""
    from audit.commands.display import Display
    from audit.commands.resolve import input_rules, run_options, threat_of
    from audit.studies.certification import CertificationRequest, certify_model

    threats = sorted((threat_of(chosen.norm, eps) for eps in chosen.radii), key=lambda threat: threat.eps)
    request = CertificationRequest(
        model=model,
        dataset=chosen.dataset,
        layers=chosen.layers,
        threats=tuple(threats),
        images=chosen.images,
        balanced=chosen.balanced,
        head_images=chosen.head_images,
        train_dataset=chosen.train_dataset,
        tier=_SHORT_TIERS.get(chosen.equality, chosen.equality),
        hubs=chosen.hubs,
        pairs=chosen.pairs,
        pair_passes=chosen.pair_passes,
        confidence=chosen.confidence,
        held_out=chosen.held_out,
        attack=chosen.attack,
        heads=_heads(chosen.heads),
        ledger=chosen.ledger,
        ledger_passes=chosen.ledger_passes,
        seed=chosen.seed,
        rules=input_rules(chosen.preprocess, restrict_classes=chosen.restrict_classes),
    )
    if request.leaves_no_head_images:
        click.echo("Note: all images are certified, none is left to train heads on: see --train-dataset", err=True)
    with Display(chosen.images or 0) as display:
        report = certify_model(
            request,
            run_options(sources),
            lambda layer, threat, stage, collided: display.channel(
                f"images in collisions; {layer}, eps {threat.eps:.4g}, {stage}", collided
            ),
            _announce,
        )
    if out is None:
        return report.rows()
    several = len(report.results) > 1
    return report.rows(lambda result: _file_of(out, result.row.layer, result.row.eps) if several else out)


def _announce(passes: float, seconds: float) -> None:
    """Say what a long search costs before it begins."""
    if seconds > _LONG:
        from audit.run.upkeep.progress import in_words

        click.echo(f"Note: this takes about {passes:,.0f} passes of single images, {in_words(seconds)}", err=True)


def _heads(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the heads that `all`, `none` and single names stand for."""
    from audit.certificate.layers import HEADS

    if "all" in names:
        return HEADS
    return tuple(dict.fromkeys(name for name in names if name != "none"))


def _file_of(out: Path, layer: str, eps: float) -> Path:
    """Return the file of one layer and radius: `w.safetensors` gives `w-logits-8_255.safetensors`."""
    from reports.text import format_eps

    name = "".join(c if c.isascii() and (c.isalnum() or c in ".-_") else "_" for c in f"{layer}-{format_eps(eps)}")
    return out.with_name(f"{out.stem}-{name}{out.suffix}")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from audit.commands.display import plain, print_table
    from reports.text import format_eps

    ledger = _LEDGER if any(row["proved"] is not None for row in rows) else ()
    print_table((*_COLUMNS, *ledger), [_table_row(row, format_eps(row["eps"]), ledger) for row in rows])
    tier, confidence, attack = (rows[0][name] for name in ("certified_tier", "confidence", "attack"))
    click.echo(
        f"`certified`: certified upper bound on any head's adversarial accuracy on these images ({tier}); "
        f"`population`: the same on the distribution of the images ({confidence:.0%} confidence); "
        f"`achieved`: measured ({attack or 'no head'})."
    )
    if ledger:
        click.echo(
            "`proved`: the network provably keeps these images; `broken`: an adversarial image is known; "
            "the network's adversarial accuracy lies between the share proved and the share not broken."
        )
    for row in rows:
        place = plain(f"{row['layer']}, eps {format_eps(row['eps'])}")
        nothing = f"nothing is proved: {row['ledger_reason']}" if row["ledger_reason"] else ""
        for remark in (row["reason"], nothing, *row["flags"]):
            if remark:
                click.echo(f"{place}: {plain(remark)}")
        if row["witness"]:
            click.echo(f"{place}: {plain(row['witness'])} sha256 {row['witness_sha256']}")


def _table_row(row: dict[str, Any], eps: str, ledger: tuple[str, ...]) -> tuple[str, ...]:
    def number(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.3f}"

    bounds = ("best_head_accuracy", "certified_bound", "certified_bound_population", "certified_bound_held_out")
    return (
        row["layer"],
        eps,
        str(row["images"]),
        row["best_head"] or "",
        *map(number, bounds),
        "+".join(map(str, row["at_hubs"])),
        str(row["pairs"]),
        *map(number, ledger),
    )
