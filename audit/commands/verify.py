"""The command `verify`: the exhibits of a certificate, or the records of a run folder."""

import json
from pathlib import Path
from typing import Any

import click

from audit.commands.certify import claimed_parts
from audit.commands.options import run_options, source_options
from audit.errors import IntegrityError, UsageError

_VIOLATED = 5


@click.command("verify")
@click.argument("subject", metavar="RUN|WITNESS", type=click.Path(path_type=Path))
@click.option("--replay", type=click.IntRange(0), default=0, help="Compute so many cells of a run again, at random.")
@click.option("--model", default=None, help="The model that a witness is of.")
@click.option("--dataset", default=None, help="The data set that a witness's images were moved from.")
@click.option("--images", type=click.IntRange(1), default=None, help="How many, from the first. [as in the witness]")
@click.option("--balanced", is_flag=True, help="Equally many images of each class, not the first ones.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
@source_options
def verify_command(subject: Path, as_json: bool, **request: Any) -> int:
    """Check a run folder or a witness file, trusting nothing of the search behind it.

    Of a RUN: every id follows from its identity, every published number from its seeds and from theory, nothing
    impossible stands in it, and leaderboard.csv is what its records give; --replay computes cells again. Of a WITNESS:
    every claim by one forward pass; it needs --model and --dataset.

    Exit code 5 where anything does not agree.
    """
    if subject.is_dir():
        return _verify_run(subject, as_json, request)
    if request["model"] is None or request["dataset"] is None:
        raise UsageError(f"{subject} is no run folder; to check it as a witness, add --model and --dataset")
    _verify_witness(subject, as_json, request)
    return 0


def _verify_run(folder: Path, as_json: bool, request: dict[str, Any]) -> int:
    from audit.run.upkeep.verification import Violation, check_run

    records, found = check_run(folder)
    if not records:
        found.append(Violation(folder.name, "holds no record"))
    found += [] if found else _leaderboard(folder, records)
    replayed: list[str] = []
    if request["replay"] and not found:
        replayed, again = _replayed(folder, records, request)
        found += again
    if as_json:
        rows = [violation._asdict() for violation in found]
        click.echo(
            json.dumps({"accepted": not found, "records": len(records), "replayed": replayed, "violations": rows})
        )
        return _VIOLATED if found else 0
    from reports.text import plain_text

    for violation in found:
        click.echo(plain_text(f"{violation.file}: {violation.what}"))
    if not found:
        valid = sum(record.valid for record in records)
        some = f", {len(replayed)} of them computed again" if replayed else ""
        click.echo(f"accepted: {len(records)} records, {valid} of them with numbers{some}")
    return _VIOLATED if found else 0


def _leaderboard(folder: Path, records: list[Any]) -> list[Any]:
    from audit.run.upkeep.verification import Violation
    from reports.tables.ranking import leaderboard, to_csv
    from reports.tables.table import to_frame

    path = folder / "leaderboard.csv"
    if not path.is_file() or not records:
        return []
    same = path.read_text(encoding="utf-8", errors="replace") == to_csv(leaderboard(to_frame(records)))
    return [] if same else [Violation(path.name, "is not what the records give; rebuild it with `rvaudit report`")]


def _replayed(folder: Path, records: list[Any], request: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Compute randomly chosen cells again, in a folder of their own; return their ids and what does not agree."""
    import random
    import tempfile

    from audit.commands.display import Display
    from audit.config.yaml_source import read_config
    from audit.run.cell_runner import Watcher
    from audit.run.run_loop import expand, run
    from audit.run.upkeep.progress import record_key
    from audit.run.upkeep.verification import Violation, differences

    stored = {record_key(record): record for record in records if record.valid}
    cells = {
        (c.ref, c.dataset, c.layer, c.threat.norm, c.threat.eps, c.settings.estimator.name): c
        for c in expand(read_config(folder / "benchmark.yaml"))
    }
    stray = [Violation(stored[key].cell_id, "is no cell of the benchmark") for key in stored if key not in cells]
    keys = sorted(set(stored) & set(cells))
    # whoever made the folder must not know which cells will be looked at
    chosen = random.SystemRandom().sample(keys, min(request["replay"], len(keys)))
    with tempfile.TemporaryDirectory() as scratch, Display(len(chosen)) as display:
        watcher = Watcher(lambda cell, stage: display.stage(cell.name or cell.ref, stage), display.done)
        again = run([cells[key] for key in chosen], Path(scratch), run_options(request), watcher)
    pairs = [(stored[key], record) for key, record in zip(chosen, again, strict=True)]
    wrong = [Violation(f"{old.cell_id}.json", what) for old, new in pairs for what in differences(old, new)]
    return [old.cell_id for old, _ in pairs], stray + wrong


def _verify_witness(witness: Path, as_json: bool, request: dict[str, Any]) -> None:
    from audit.certificate.collision_search import Layer
    from audit.certificate.witness import read, verify
    from audit.hashing import weights_sha256
    from audit.representation.layers import Representation

    claimed = read(witness)
    count = request["images"] or len(claimed.labels)
    network, pixels, labels = claimed_parts(request["model"], request["dataset"], count, request)
    weights = weights_sha256(network)
    if weights != claimed.header.weights_sha256:
        raise IntegrityError(f"{witness} is of weights {claimed.header.weights_sha256}, these are {weights}")
    try:
        layer = Layer.of(Representation(network, claimed.header.layer))
        header = verify(witness, layer, pixels, labels, weights).header
    except UsageError as error:  # the layer is the file's own word
        raise IntegrityError(f"{witness} names a layer that cannot be checked: {error}") from error
    bound = header.bound
    if as_json:
        click.echo(json.dumps(_verdict(header), allow_nan=False))
        return
    from audit.commands.display import plain

    click.echo(
        f"accepted: no head on {plain(header.layer)} keeps more than {bound.kept} of {bound.images} images "
        f"({bound.certified:.4f}) at {header.threat.norm} {header.threat.eps:.6g}; {header.tier}"
    )


def _verdict(header: Any) -> dict[str, Any]:
    return {
        "accepted": True, "layer": header.layer, "norm": header.threat.norm, "eps": header.threat.eps,
        "images": header.bound.images, "certified_bound": header.bound.certified, "certified_tier": header.tier,
    }  # fmt: skip
