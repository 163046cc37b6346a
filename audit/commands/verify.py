"""The command `verify`: verify the collision witnesses of a certificate, or the records of a run folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from audit.commands.options import (
    SourceOptions,
    grouped_options,
    json_option,
    preprocess_option,
    restrict_option,
    source_options,
)
from audit.errors import AuditError, EnvironmentFault, UsageError
from audit.records import AuditRecord, RecordStore
from audit.run.upkeep.verification import Violation

_VIOLATED = 5


@dataclass(frozen=True)
class VerifyOptions:
    """Number of recomputed cells, for a run folder; model and images, for a witness file."""

    replay: int
    model: str | None
    dataset: str | None
    images: int | None
    balanced: bool
    preprocess: str
    restrict_classes: bool


@click.command("verify")
@click.argument("subject", metavar="RUN|WITNESS", type=click.Path(path_type=Path))
@grouped_options(
    "chosen",
    VerifyOptions,
    click.option("--replay", type=click.IntRange(0), default=0, help="Number of random cells of a run to recompute."),
    click.option("--model", default=None, help="The model of a witness file."),
    click.option("--dataset", default=None, help="The data set of the clean images of a witness file."),
    click.option(
        "--images", type=click.IntRange(1), default=None, help="Number of images, from the first. [as in the witness]"
    ),
    click.option("--balanced", is_flag=True, help="Take equally many images of each class instead of the first."),
    preprocess_option,
    restrict_option,
)
@json_option("one JSON object")
@source_options
def verify_command(subject: Path, chosen: VerifyOptions, as_json: bool, sources: SourceOptions) -> int:
    """Verify a run folder or a witness file, without trusting the search behind it.

    RUN: checks the id of every record against its identity, published numbers against seeds and theory, and
    leaderboard.csv against the records; --replay recomputes cells. Images that a run has kept are read again: they
    must have the recorded hash, lie in the ball, and give the recorded accuracies and nats (those of `mine` and `ref-*`
    need a new fit: their images are checked without it). WITNESS: checks every claim with one forward pass; needs
    --model and --dataset.

    Exit code 5 if anything disagrees.

    Example: rvaudit verify runs/digits --replay 2
    """
    if subject.is_dir():
        return _verify_run(subject, chosen.replay, sources, as_json=as_json)
    if chosen.model is None or chosen.dataset is None:
        raise UsageError(f"{subject} is not a run folder; to verify it as a witness file, add --model and --dataset")
    _verify_witness(subject, chosen, sources, as_json=as_json)
    return 0


def _verify_run(folder: Path, replay: int, sources: SourceOptions, *, as_json: bool) -> int:
    from audit.run.upkeep.start_folders import start_folders
    from audit.run.upkeep.verification import check_run

    sources = replace(sources, base=start_folders(folder))
    records, found = check_run(folder)
    plan = RecordStore(folder).plan()
    present = [record for record in records if plan is None or record.cell_id in plan]
    if not records:
        found.append(Violation(folder.name, "holds no record"))
    if not found and not _leaderboard_agrees(folder, present):
        found.append(Violation("leaderboard.csv", "disagrees with the records; rebuild it with `rvaudit report`"))
    replayed: list[str] = []
    if replay and not found:
        replayed, found = _replay(folder, records, replay, sources)
    with_images = [] if found else [each for each in present if each.valid and each.details.get("images")]
    unread: list[Violation] = []
    if with_images:
        found, unread = _reread(folder, with_images, sources)
    if as_json:
        shown = {"violations": found, "images_not_read": unread}
        verdict = {"accepted": not found, "records": len(records), "replayed": replayed, "images": len(with_images)}
        click.echo(json.dumps(verdict | {name: [each._asdict() for each in some] for name, some in shown.items()}))
        return _VIOLATED if found else 0
    from reports.text import plain_text

    for violation in found:
        click.echo(plain_text(f"{violation.file}: {violation.what}"))
    for each in unread:
        click.echo(plain_text(f"Note: {each.file}: images not read again for {each.what}"))
    if not found:
        valid = sum(record.valid for record in records)
        recomputed = f", {len(replayed)} of them recomputed" if replayed else ""
        checked = f", images of {len(with_images)} checked" if with_images else ""
        click.echo(f"accepted: {len(records)} records, {valid} of them with numbers{recomputed}{checked}")
    return _VIOLATED if found else 0


def _leaderboard_agrees(folder: Path, records: Sequence[AuditRecord]) -> bool:
    from reports.tables.ranking import leaderboard, to_csv
    from reports.tables.table import to_frame

    path = folder / "leaderboard.csv"
    if not path.is_file() or not records:
        return True
    return path.read_text(encoding="utf-8", errors="replace") == to_csv(leaderboard(to_frame(records)))


def _reread(
    folder: Path, records: Sequence[AuditRecord], sources: SourceOptions
) -> tuple[list[Violation], list[Violation]]:
    """Read kept images again; return the disagreements, and what could not be read with the reasons."""
    from audit.commands.display import Display
    from audit.commands.resolve import run_options
    from audit.run.evidence.rereading import Rereader
    from audit.run.upkeep.progress import record_key

    cells, reader = _cells_by_key(folder, sources), Rereader(folder, run_options(sources))
    wrong, unread = [], []
    with Display(len(records)) as display:
        ordered = sorted(records, key=lambda each: (record_key(each), each.cell_id))  # so that a model is loaded once
        for number, record in enumerate(ordered):
            display.channel(record.model, number)
            reading, file = reader.read(record, cells.get(record_key(record))), f"{record.cell_id}.json"
            wrong += [Violation(file, what) for what in reading.wrong]
            unread += [Violation(file, what) for what in reading.unread]
    return wrong, unread


def _cells_by_key(folder: Path, sources: SourceOptions) -> dict[Any, Any]:
    """Return the cells of a run folder's benchmark by the keys of their records."""
    from audit.config.yaml_source import read_config
    from audit.run.cell import expand

    return {
        (c.ref, c.dataset, c.layer, c.threat.norm, c.threat.eps, c.settings.estimator.name): c
        for c in expand(read_config(folder / "benchmark.yaml"), sources.base)
    }


def _replay(
    folder: Path, records: Sequence[AuditRecord], count: int, sources: SourceOptions
) -> tuple[list[str], list[Violation]]:
    """Recompute random cells in a temporary folder; return their ids and the disagreements."""
    import random
    import tempfile

    from audit.commands.display import Display
    from audit.commands.resolve import run_options
    from audit.run.run_loop import Watcher, run
    from audit.run.upkeep.progress import record_key
    from audit.run.upkeep.verification import differences

    plan = RecordStore(folder).plan()
    stored = {record_key(record): record for record in records if record.valid}
    present = {record_key(each): each for each in records if each.valid and (plan is None or each.cell_id in plan)}
    cells = _cells_by_key(folder, sources)
    unknown = [Violation(stored[key].cell_id, "is not a cell of the benchmark") for key in stored if key not in cells]
    for key in stored.keys() - cells.keys():
        _check_files(folder, key[0], key[1], sources)  # of a pattern that no longer matches it, the file may be gone
    keys = sorted(set(present) & set(cells))
    # unpredictable, so that nobody can forge the records of the other cells
    chosen = random.SystemRandom().sample(keys, min(count, len(keys)))
    for key in chosen:
        _check_files(folder, key[0], key[1], sources)
    with tempfile.TemporaryDirectory() as scratch, Display(len(chosen)) as display:
        watcher = Watcher(lambda cell, stage: display.stage(cell.name or cell.ref, stage), display.done)
        recomputed = run([cells[key] for key in chosen], Path(scratch), run_options(sources), watcher)
    pairs = [(present[key], record) for key, record in zip(chosen, recomputed, strict=True)]
    different = [Violation(f"{old.cell_id}.json", what) for old, new in pairs for what in differences(old, new)]
    return [old.cell_id for old, _ in pairs], unknown + different


def _check_files(folder: Path, model: str, dataset: str, sources: SourceOptions) -> None:
    """Raise EnvironmentFault where a file that a cell needs does not exist; other faults are those of the cell."""
    from audit.run.upkeep.start_folders import stated_folders
    from model_zoo.lookup import check_dataset, check_model

    for check, ref in ((check_model, model), (check_dataset, dataset)):
        try:
            check(ref, sources.base)
        except EnvironmentFault as error:
            places = " and ".join(stated_folders(folder))
            where = (
                f"the run was started with paths from {places}" if places else "the run keeps no folder of its paths"
            )
            raise EnvironmentFault(f"{ref} cannot be recomputed: {error}; {where}") from error
        except AuditError:
            continue


def _verify_witness(witness: Path, chosen: VerifyOptions, sources: SourceOptions, *, as_json: bool) -> None:
    from audit.commands.display import plain
    from audit.commands.resolve import input_rules, run_options
    from audit.studies.certification import WitnessSubject, verify_model_witness

    assert chosen.model is not None
    assert chosen.dataset is not None
    rules = input_rules(chosen.preprocess, restrict_classes=chosen.restrict_classes)
    subject = WitnessSubject(chosen.model, chosen.dataset, chosen.images, chosen.balanced, rules)
    header = verify_model_witness(witness, subject, run_options(sources))
    bound, threat = header.bound, header.threat
    if as_json:
        verdict = {
            "accepted": True,
            "layer": header.layer,
            "norm": threat.norm,
            "eps": threat.eps,
            "images": bound.images,
            "certified_bound": bound.certified,
            "certified_tier": header.tier,
        }
        verdict |= {name: header.ledger[name] for name in ("proved", "broken")} if header.ledger else {}
        click.echo(json.dumps(verdict, allow_nan=False))
        return
    click.echo(
        f"accepted: certified upper bound on any head's adversarial accuracy on {plain(header.layer)}: "
        f"{bound.kept}/{bound.images} = {bound.certified:.4f} at {threat.norm} {threat.eps:.6g}; {header.tier}"
    )
    if header.ledger is not None:
        proved, broken = header.ledger["proved"], header.ledger["broken"]
        click.echo(f"accepted: the network keeps {proved} of {bound.images} images, and {broken} are broken")
