"""`rvaudit attack`: how a model stands up to attacks, and whether these are to be believed."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import click

from audit.commands.options import FOLDER, run_options, slug, source_options
from audit.errors import UsageError

_TIERS = ("smoke", "audit", "leaderboard")


@click.command("attack")
@click.argument("model")
@click.option("--dataset", required=True, help="digits, cifar10, ..., folder:PATH, npz:PATH or parquet:PATH.")
@click.option("--eps", required=True, help="Radius in pixel units, such as 8/255.")
@click.option("--norm", default="linf", show_default=True, help="linf, l2 or l1.")
@click.option("--tier", type=click.Choice(_TIERS), default="audit", show_default=True, help="How hard to attack.")
@click.option("--attacks", default="", help="Further attacks, each alone: fgsm,bim,pgd,margin,cw,ddn,square,fab,...")
@click.option("--transfer-from", "sources", multiple=True, help="Another model to take images from. Repeatable.")
@click.option("--images", type=click.IntRange(1), default=None, help="How many images, from the first. [all]")
@click.option("--seed", type=int, default=0, show_default=True, help="What random starts are drawn by.")
@click.option("--out", type=FOLDER, default=None, help="Where rows and curve go. [runs/attack-<model>]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@source_options
def attack_command(
    model: str, dataset: str, sources: tuple[str, ...], out: Path | None, as_json: bool, **request: Any
) -> int:
    """Attack MODEL, and check whether the attack is to be believed; exit 1 where it is not.

    Writes attack.json, images.csv (one row an image) and the eps curve.
    """
    found, rows = _measured(model, dataset, sources, request)
    folder = out or Path("runs") / f"attack-{slug(model)}"
    paths = _written(folder, found, rows)
    if as_json:
        click.echo(json.dumps(found, allow_nan=False))
    else:
        _print(found, paths)
    return 0 if found["trustworthy"] else 1


def _measured(
    model: str, dataset: str, sources: tuple[str, ...], request: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from audit.adversary.label_attack import TIERS
    from audit.adversary.robustness import ATTACKS, alone, attacked, climb, compared, transferred
    from audit.commands.display import Display
    from audit.errors import UnknownNameError

    attack, seed, threat = TIERS[request["tier"]], request["seed"], _threat(request)
    names = [name.strip() for name in request["attacks"].split(",") if name.strip()]
    for name in names:
        if name not in ATTACKS and name != "autoattack":
            raise UnknownNameError("attack", name, ATTACKS)
    subjects = _subjects((model, *sources), dataset, request)
    subject = subjects[model]
    with Display(4 + len(names)) as display:
        display.channel(f"{model}: {attack.name_in(threat.norm)}", 0)
        tier = attacked(subject, threat, attack, seed)
        display.channel("the attack beside itself", 1)
        beside = compared(subject, threat, attack, seed)
        display.channel("radii", 2)
        ladder = climb(subject, threat, seed)
        tables = []
        for done, name in enumerate(names):
            display.channel(name, 3 + done)
            tables.append(alone(name, subject, threat, seed))
        display.channel("transfer", 3 + len(names))
        matrix = transferred(subjects, threat, seed) if sources else {}
    robust = tier.accuracy.robust
    crossed = _crossed(robust, [matrix[source][model] for source in sources])
    checks = [*tier.checks, *beside, *ladder.checks, *crossed]
    told = {
        "model": model, "dataset": dataset, "norm": threat.norm, "eps": threat.eps, "seed": seed,
        **_accuracy(tier.accuracy), **_verdict(checks),
        "eps_curve": [_rung(rung) for rung in ladder.rungs],
        "attacks": [_alone(each) for each in tables],
        "transfer": {source: {target: float(right.float().mean()) for target, right in row.items()}
                     for source, row in matrix.items()},
    }  # fmt: skip
    return told, _image_rows(subject, tier.accuracy, ladder)


def _threat(request: dict[str, Any]) -> Any:
    from audit.adversary.threat import threat_model
    from audit.config.benchmark import parse_number

    try:
        return threat_model(request["norm"], parse_number(request["eps"]))
    except ValueError as error:
        raise UsageError(f"--eps: {error}") from error


def _subjects(refs: tuple[str, ...], dataset: str, request: dict[str, Any]) -> dict[str, Any]:
    from audit.adversary.robustness import Target
    from audit.run.cell_runner import device_of
    from audit.run.layer_audit import check_input
    from model_zoo.images.load import ImageRequest, check_fit, load_images
    from model_zoo.load import load_model

    options = run_options(request)
    device = device_of(options.device)
    wanted = ImageRequest(count=request["images"], data_dir=options.data_dir, offline=options.sources.offline)
    images = load_images(dataset, wanted)
    pixels, labels = images.images.to(device), images.labels.to(device)
    found = {}
    for ref in refs:
        model = load_model(ref, options.sources)
        model.network.to(device)
        check_fit(model, images)
        check_input(model.network, pixels, labels, fewest=1)
        found[ref] = Target(model.network, pixels, labels)
    return found


def _crossed(robust: Any, others: list[Any]) -> list[Any]:
    from audit.adversary.attack_checks import transfer_breaks_nothing

    return [transfer_breaks_nothing(robust, robust & right) for right in others]


def _accuracy(found: Any) -> dict[str, Any]:
    siege = found.siege
    broken = {name: int((siege.stage == number).sum()) for number, name in enumerate(found.names)}
    return {
        "attack": "+".join(found.names), "images": found.natural.images,
        "natural_accuracy": found.natural.value, "natural_accuracy_low": found.natural.low,
        "natural_accuracy_high": found.natural.high, "adversarial_accuracy": found.adversarial.value,
        "adversarial_accuracy_low": found.adversarial.low, "adversarial_accuracy_high": found.adversarial.high,
        "passes": found.passes, "forwards": found.forwards, "broken_by": broken,
    }  # fmt: skip


def _verdict(checks: list[Any]) -> dict[str, Any]:
    from audit.adversary.attack_checks import trustworthy, verdict

    return {
        "trustworthy": trustworthy(checks),
        "verdict": verdict(checks),
        "checks": [check._asdict() for check in checks],
    }


def _rung(rung: Any) -> dict[str, Any]:
    share = rung.accuracy
    return {"eps": rung.eps, "adversarial_accuracy": share.value, "low": share.low, "high": share.high}


def _alone(found: Any) -> dict[str, Any]:
    share = found.accuracy
    return {
        "attack": found.name, "adversarial_accuracy": share.value, "low": share.low, "high": share.high,
        "passes": found.passes, "forwards": found.forwards,
    }  # fmt: skip


def _image_rows(subject: Any, found: Any, ladder: Any) -> list[dict[str, Any]]:
    """One row an image: what it is, and what broke it first."""
    siege = found.siege
    columns = zip(
        subject.labels.tolist(), siege.correct.tolist(), siege.robust.tolist(), siege.stage.tolist(),
        siege.step.tolist(), siege.margin.tolist(), ladder.smallest.tolist(), strict=True,
    )  # fmt: skip
    return [
        {
            "index": index, "label": label, "correct": int(correct), "robust": int(robust),
            "broken_by": found.names[stage] if stage >= 0 else "", "step": step if stage >= 0 else "",
            "margin": f"{margin:.6g}", "smallest_eps": "" if smallest == float("inf") else f"{smallest:.6g}",
        }
        for index, (label, correct, robust, stage, step, margin, smallest) in enumerate(columns)
    ]  # fmt: skip


def _written(folder: Path, found: dict[str, Any], rows: list[dict[str, Any]]) -> list[Path]:
    from audit.storage import write_atomically
    from reports.figures.all_figures import figure_bytes
    from reports.figures.attack_figure import eps_curve

    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents: dict[str, str | bytes] = {
        "attack.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
        "images.csv": table.getvalue(),
        "eps_curve.png": figure_bytes(eps_curve(found), "png"),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _print(found: dict[str, Any], paths: list[Path]) -> None:
    from audit.commands.display import print_table

    share = f"{found['adversarial_accuracy']:.3f}"
    interval = f"[{found['adversarial_accuracy_low']:.3f}, {found['adversarial_accuracy_high']:.3f}]"
    rows = [(found["attack"], found["natural_accuracy"], share, interval, found["passes"], found["forwards"])]
    rows += [
        (each["attack"], found["natural_accuracy"], f"{each['adversarial_accuracy']:.3f}",
         f"[{each['low']:.3f}, {each['high']:.3f}]", each["passes"], each["forwards"])
        for each in found["attacks"]
    ]  # fmt: skip
    print_table(
        ("attack", "natural", "adversarial", "95 %", "passes", "forwards"),
        [(name, f"{natural:.3f}", *rest) for name, natural, *rest in rows],
    )
    print_table(("#", "check", "verdict", "figure", "criterion", "note"), [_check_row(x) for x in found["checks"]])
    for source, row in found["transfer"].items():
        click.echo(f"images made against {source}: " + ", ".join(f"{t} {share:.3f}" for t, share in row.items()))
    if not found["trustworthy"]:
        click.echo(f"adversarial accuracy {share}: {found['verdict']}")
    click.echo("  ".join(map(str, paths)))


def _check_row(check: dict[str, Any]) -> tuple[object, ...]:
    verdict = {True: "passed", False: "FAILED", None: "not applicable"}[check["passed"]]
    figure = "" if check["figure"] is None else f"{check['figure']:.4g}"
    return check["number"], check["name"], verdict, figure, check["criterion"], check["reason"]
