"""The command `attack`: attack a model and check whether the attack can be trusted."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from audit.commands.options import (
    FOLDER,
    SourceOptions,
    dataset_option,
    eps_option,
    grouped_options,
    json_option,
    norm_option,
    preprocess_option,
    restrict_option,
    slug,
    source_options,
)
from audit.config.benchmark import TIERS


@dataclass(frozen=True)
class AttackOptions:
    """Data set, threat model and attacks, as options spell them."""

    dataset: str
    eps: str
    norm: str
    tier: str
    attacks: str
    transfer_from: tuple[str, ...]
    images: int | None
    seed: int
    preprocess: str
    restrict_classes: bool


@click.command("attack")
@click.argument("model")
@grouped_options(
    "chosen",
    AttackOptions,
    dataset_option,
    eps_option,
    norm_option,
    click.option(
        "--tier", type=click.Choice(TIERS), default="audit", show_default=True, help="Strength of the attack."
    ),
    click.option(
        "--attacks", default="", help="Further attacks, each run by itself: fgsm,bim,pgd,margin,cw,ddn,square,fab,..."
    ),
    click.option(
        "--transfer-from", multiple=True, help="A model whose adversarial images are transferred. Repeatable."
    ),
    click.option("--images", type=click.IntRange(1), default=None, help="Number of images, from the first. [all]"),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random starts."),
    preprocess_option,
    restrict_option,
)
@click.option("--out", type=FOLDER, default=None, help="The folder of rows and curve. [runs/attack-<model>]")
@json_option("one JSON object")
@source_options
def attack_command(model: str, chosen: AttackOptions, out: Path | None, as_json: bool, sources: SourceOptions) -> int:
    """Attack MODEL, and check whether the attack can be trusted; exit code 1 where it cannot.

    Writes attack.json, images.csv (one row per image) and the curve of accuracy against eps.
    """
    from audit.commands.display import Display
    from audit.commands.resolve import input_rules, run_options, threat_of
    from audit.studies.attack_report import STAGES, AttackRequest, attack_report

    attacks = tuple(name.strip() for name in chosen.attacks.split(",") if name.strip())
    threat = threat_of(chosen.norm, chosen.eps)
    request = AttackRequest(
        model=model,
        dataset=chosen.dataset,
        threat=threat,
        tier=chosen.tier,
        attacks=attacks,
        sources=chosen.transfer_from,
        images=chosen.images,
        seed=chosen.seed,
        rules=input_rules(chosen.preprocess, restrict_classes=chosen.restrict_classes),
    )
    with Display(STAGES + len(attacks)) as display:
        report = attack_report(request, run_options(sources), display.channel)
    paths = _write(out or Path("runs") / f"attack-{slug(model)}", report.summary, report.image_rows)
    if as_json:
        click.echo(json.dumps(report.summary, allow_nan=False))
    else:
        _print(report.summary, paths)
    return 0 if report.summary["trustworthy"] else 1


def _write(folder: Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[Path]:
    from audit.storage import write_atomically
    from reports.figures.all_figures import figure_bytes
    from reports.figures.attack_figure import eps_curve

    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents: dict[str, str | bytes] = {
        "attack.json": json.dumps(summary, indent=1, allow_nan=False) + "\n",
        "images.csv": table.getvalue(),
        "eps_curve.png": figure_bytes(eps_curve(summary), "png"),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _print(summary: dict[str, Any], paths: Sequence[Path]) -> None:
    from audit.commands.display import print_table

    tier = {
        **summary,
        "low": summary["adversarial_accuracy_low"],
        "high": summary["adversarial_accuracy_high"],
    }
    print_table(
        ("attack", "natural", "adversarial", "95 %", "passes", "forwards"),
        [_attack_row(each, summary["natural_accuracy"]) for each in (tier, *summary["attacks"])],
    )
    print_table(("id", "check", "verdict", "figure", "criterion", "note"), [_check_row(x) for x in summary["checks"]])
    for source, row in summary["transfer"].items():
        accuracies = ", ".join(f"{target} {share:.3f}" for target, share in row.items())
        click.echo(f"accuracy on adversarial images of {source}: {accuracies}")
    if not summary["trustworthy"]:
        click.echo(f"adversarial accuracy {summary['adversarial_accuracy']:.3f}: {summary['verdict']}")
    click.echo("  ".join(map(str, paths)))


def _attack_row(found: dict[str, Any], natural: float) -> tuple[object, ...]:
    interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
    accuracies = f"{natural:.3f}", f"{found['adversarial_accuracy']:.3f}"
    return (found["attack"], *accuracies, interval, found["passes"], found["forwards"])


def _check_row(check: dict[str, Any]) -> tuple[object, ...]:
    verdict = {True: "passed", False: "FAILED", None: "not applicable"}[check["passed"]]
    figure = "" if check["figure"] is None else f"{check['figure']:.4g}"
    return check["id"], check["name"], verdict, figure, check["criterion"], check["reason"]
