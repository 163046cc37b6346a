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
    attack_option,
    balanced_option,
    dataset_option,
    fail_under_option,
    grouped_options,
    images_option,
    json_option,
    norm_option,
    preprocess_option,
    radii_option,
    request_folder,
    restrict_option,
    source_options,
)


@dataclass(frozen=True)
class AttackOptions:
    """Data set, threat models and attacks, as options spell them."""

    dataset: str
    radii: tuple[str, ...]
    norm: str
    attack: str
    attacks: tuple[str, ...]
    checks: str
    transfer_from: tuple[str, ...]
    images: int | None
    balanced: bool
    seed: int
    preprocess: str
    restrict_classes: bool

    @property
    def single_attacks(self) -> tuple[str, ...]:
        """The names of `--attacks`, which repeats and takes lists, each once."""
        names = (name.strip() for words in self.attacks for name in words.split(","))
        return tuple(dict.fromkeys(name for name in names if name))

    def folder(self, model: str, norm: str, eps: float) -> Path:
        """Return the run folder of one radius, named by everything that decides the numbers."""
        decides = {**vars(self), "norm": norm, "radii": [eps], "attacks": self.single_attacks}
        return request_folder("attack", model, decides)


@click.command("attack")
@click.argument("model")
@grouped_options(
    "chosen",
    AttackOptions,
    dataset_option,
    radii_option,
    norm_option,
    attack_option,
    click.option(
        "--attacks",
        multiple=True,
        help="Further attacks, each run by itself: fgsm,bim,pgd,margin,cw,ddn,square,fab,... Repeatable.",
    ),
    click.option(
        "--checks",
        type=click.Choice(["all", "trust", "none"]),
        default="all",
        show_default=True,
        help="Checks of the attack: all, with accuracy against eps; those that decide its trust; none, the cheapest.",
    ),
    click.option(
        "--transfer-from", multiple=True, help="A model whose adversarial images are transferred. Repeatable."
    ),
    images_option,
    balanced_option,
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of random starts."),
    preprocess_option,
    restrict_option,
)
@click.option(
    "--out", type=FOLDER, default=None, help="The folder of rows and curve. [runs/attack-<model>-<hash of the request>]"
)
@fail_under_option
@json_option("one JSON object, of several radii an array of them")
@source_options
def attack_command(
    model: str, chosen: AttackOptions, out: Path | None, fail_under: float | None, as_json: bool, sources: SourceOptions
) -> int:
    """Attack MODEL, and check whether the attack can be trusted; exit code 1 where it cannot.

    Writes attack.json, images.csv (one row per image) and the curve of accuracy against eps; with several radii, a
    folder for each.

    Example: rvaudit attack bundled:digits-vgg-robust --dataset digits --eps 0.1 --eps 0.2 --attacks fgsm,pgd
    """
    from audit.commands.resolve import threat_of

    threats = sorted({threat_of(chosen.norm, eps) for eps in chosen.radii}, key=lambda threat: threat.eps)
    found = []
    for threat in threats:
        report = _attack(model, chosen, threat, sources)
        own = out / _folder_name(threat.norm, threat.eps) if out and len(threats) > 1 else out
        paths = _write(own or chosen.folder(model, threat.norm, threat.eps), report.summary, report.image_rows)
        found.append(report.summary)
        if not as_json:
            _print(report.summary, paths)
    if as_json:
        click.echo(json.dumps(found[0] if len(found) == 1 else found, allow_nan=False))
    return max(_code(summary, fail_under) for summary in found)


def _attack(model: str, chosen: AttackOptions, threat: Any, sources: SourceOptions) -> Any:
    """Return the `AttackReport` of one threat model."""
    from audit.commands.display import Display
    from audit.commands.resolve import input_rules, run_options
    from audit.studies.attack_report import STAGES, AttackRequest, attack_report

    request = AttackRequest(
        model=model,
        dataset=chosen.dataset,
        threat=threat,
        tier=chosen.attack,
        attacks=chosen.single_attacks,
        sources=chosen.transfer_from,
        images=chosen.images,
        seed=chosen.seed,
        rules=input_rules(chosen.preprocess, restrict_classes=chosen.restrict_classes, balanced=chosen.balanced),
        checks=chosen.checks,
    )
    with Display(STAGES + len(request.attacks)) as display:
        return attack_report(request, run_options(sources), display.channel)


def _code(summary: dict[str, Any], fail_under: float | None) -> int:
    """Return 1 where the attack failed a trust check or the accuracy is below `--fail-under`, else 0."""
    accuracy = summary["adversarial_accuracy"]
    if fail_under is not None and accuracy < fail_under:
        click.echo(f"adversarial accuracy {accuracy:.4f} is below --fail-under {fail_under:g}", err=True)
        return 1
    return 1 if summary["trustworthy"] is False else 0


def _folder_name(norm: str, eps: float) -> str:
    """Return the name of one radius's folder, such as `linf-8_255`."""
    from reports.text import format_eps

    return f"{norm}-{format_eps(eps)}".replace("/", "_")


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
    }
    if summary["eps_curve"]:
        contents["eps_curve.png"] = figure_bytes(eps_curve(summary), "png")
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _print(summary: dict[str, Any], paths: Sequence[Path]) -> None:
    from audit.commands.display import plain, print_table
    from reports.text import format_eps

    tier = {
        **summary,
        "low": summary["adversarial_accuracy_low"],
        "high": summary["adversarial_accuracy_high"],
    }
    eps = format_eps(summary["eps"])
    print_table(
        ("attack", "norm", "eps", "natural", "adversarial", "95 %", "passes", "forwards"),
        [_attack_row(each, summary, eps) for each in (tier, *summary["attacks"])],
    )
    if summary["checks"]:
        header = ("id", "check", "verdict", "figure", "criterion", "note")
        print_table(header, [_check_row(check) for check in summary["checks"]])
    for source, row in summary["transfer"].items():
        accuracies = ", ".join(f"{target} {share:.3f}" for target, share in row.items())
        click.echo(plain(f"accuracy on adversarial images of {source}: {accuracies}"))
    if not summary["trustworthy"]:
        click.echo(f"adversarial accuracy {summary['adversarial_accuracy']:.3f}: {summary['verdict']}")
    click.echo("  ".join(map(str, paths)))


def _attack_row(found: dict[str, Any], summary: dict[str, Any], eps: str) -> tuple[object, ...]:
    interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
    accuracies = f"{summary['natural_accuracy']:.3f}", f"{found['adversarial_accuracy']:.3f}"
    return (found["attack"], summary["norm"], eps, *accuracies, interval, found["passes"], found["forwards"])


def _check_row(check: dict[str, Any]) -> tuple[object, ...]:
    verdict = {True: "passed", False: "FAILED", None: "not applicable"}[check["passed"]]
    figure = "" if check["figure"] is None else f"{check['figure']:.4g}"
    return check["id"], check["name"], verdict, figure, check["criterion"], check["reason"]
