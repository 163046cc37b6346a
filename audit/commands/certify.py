"""The command `certify`: what no head on a layer can exceed, with exhibits that `verify` checks."""

import json
from pathlib import Path
from typing import Any

import click

from audit.commands.options import run_options, source_options
from audit.errors import MismatchError, UsageError

_SHORT_TIERS = {
    "proved": "proved",
    "float32": "bit-identical at float32",
    "float16": "bit-identical at float16",
    "bfloat16": "bit-identical at bfloat16",
    "noise": "below noise floor",
}
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("certify")
@click.argument("model")
@click.option("--dataset", required=True, help="digits, cifar10, ..., folder:PATH, npz:PATH or parquet:PATH.")
@click.option("--layer", "layers", multiple=True, default=("logits",), show_default=True, help="Repeatable.")
@click.option("--eps", "radii", multiple=True, required=True, help="Radius in pixel units, such as 8/255. Repeatable.")
@click.option("--norm", default="linf", show_default=True, help="Only linf balls can be certified so far.")
@click.option("--images", type=click.IntRange(1), default=None, help="How many images, from the first. [all]")
@click.option("--balanced", is_flag=True, help="Equally many images of each class, not the first ones.")
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the limits on the population.")
@click.option("--tier", default="float32", show_default=True, help="proved, float32, float16, bfloat16 or noise.")
@click.option("--hubs", type=click.IntRange(0), default=2, show_default=True, help="How many hubs to look for.")
@click.option("--pairs/--hubs-only", default=True, help="Look for pairs among images at no large hub. [pairs]")
@click.option("--held-out", is_flag=True, help="Limit the population also by hubs chosen on one half of the images.")
@click.option("--head-images", type=click.IntRange(0), default=500, show_default=True, help="Train heads on so many.")
@click.option("--train-dataset", default=None, help="Where these come from. [the same set: other images]")
@click.option("--attack", default="audit", show_default=True, help="How hard heads are attacked: smoke or audit.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=_FILE, default=None, help="Witness file, one for each layer and radius.")
@click.option("--rows", type=_FILE, default=None, help="Also write the rows as FILE.csv, and figures beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as one JSON array, nothing else.")
@source_options
def certify_command(model: str, dataset: str, as_json: bool, **request: Any) -> int:
    """Bound the accuracy of every head on layers of MODEL, and measure the best head beside it.

    If images of different classes can each be moved, inside their own balls, to the same features, no head gets all
    of them right. The images that show it go into the witness file, which `rvaudit verify` checks.
    """
    from reports.figures.certificate_figure import to_csv, write_certificate_figures

    settings, threats = _settings(request), _threats(request["norm"], request["radii"])
    if request["rows"] is not None and request["rows"].suffix != ".csv":
        raise UsageError(f"--rows writes CSV, so its name must end in .csv, not {request['rows'].name!r}")
    loaded, case = _case(model, dataset, request)
    outcomes = _certified(case, request["layers"], threats, settings)
    named = {"model": loaded.entry.name, "training": loaded.entry.training, "dataset": dataset}
    rows = [{**named, **row} for row in _written(outcomes, case, request["out"])]
    if request["rows"] is not None:
        from audit.storage import write_atomically

        write_atomically(request["rows"], to_csv(rows))
        write_certificate_figures(rows, request["rows"])
    if as_json:
        click.echo(json.dumps(rows, allow_nan=False))
    else:
        _print_rows(rows)
    return 0


def _settings(request: dict[str, Any]) -> Any:
    from audit.adversary.label_attack import TIERS as ATTACKS
    from audit.certificate.certificate import CertificateSettings
    from audit.certificate.collision_search import SearchEffort
    from audit.certificate.layers import CertificationSettings
    from audit.errors import UnknownNameError

    if request["attack"] not in ATTACKS:
        raise UnknownNameError("attack", request["attack"], ATTACKS)
    if not 0 < request["confidence"] < 1:
        raise UsageError(f"--confidence {request['confidence']!r} is not between 0 and 1: write 0.95 for 95 %")
    tier = request["tier"]
    effort = SearchEffort(hubs=request["hubs"], **({} if request["pairs"] else {"neighbours": 0}))
    certificate = CertificateSettings(
        tier=_SHORT_TIERS.get(tier, tier), effort=effort, confidence=request["confidence"], seed=request["seed"]
    )
    return CertificationSettings(certificate, ATTACKS[request["attack"]], held_out=request["held_out"])


def _threats(norm: str, radii: tuple[str, ...]) -> list[Any]:
    """Return the threat models, smallest radius first."""
    from audit.adversary.threat import threat_model
    from audit.config.benchmark import parse_number

    try:
        return sorted((threat_model(norm, parse_number(eps)) for eps in radii), key=lambda threat: threat.eps)
    except ValueError as error:
        raise UsageError(f"--eps: {error}") from error


def _case(model: str, dataset: str, request: dict[str, Any]) -> tuple[Any, Any]:
    """Return the loaded model and what is to be certified, on the device."""
    from dataclasses import replace

    from audit.certificate.layers import Case, Examples
    from audit.run.cell_runner import device_of
    from model_zoo.images.load import ImageRequest, load_images
    from model_zoo.load import load_model

    options = run_options(request)
    device, offline = device_of(options.device), options.sources.offline
    loaded = load_model(model, options.sources)
    asked = ImageRequest(request["images"], data_dir=options.data_dir, offline=offline, balanced=request["balanced"])
    images = load_images(dataset, asked)
    _check_fit(loaded, images)
    training = _training_images(dataset, images, request, replace(asked, balanced=False))
    examples = Examples(training[0].to(device), training[1].to(device)) if training else None
    network, classes = loaded.network.to(device), len(images.classes)
    pixels, labels = images.images.to(device), images.labels.to(device)
    return loaded, Case(network, pixels, labels, classes, loaded.num_classes == 0, examples)


def _check_fit(loaded: Any, images: Any) -> None:
    """A network without a classifier fits if it takes the images: its answers are not asked for."""
    from model_zoo.images.load import check_fit

    if loaded.num_classes:
        check_fit(loaded, images)
        return
    shape = tuple(images.images.shape[1:])
    if loaded.image_shape is not None and shape != loaded.image_shape:
        wanted, found = ("x".join(map(str, size)) for size in (loaded.image_shape, shape))
        raise MismatchError(f"{loaded.entry.name} takes images of {wanted}, {images.ref} has {found}")


def _training_images(dataset: str, images: Any, request: dict[str, Any], asked: Any) -> tuple[Any, Any] | None:
    """Return images and labels that train heads, none of them among the certified ones; None where none are left."""
    from dataclasses import replace

    import torch

    from model_zoo.images.load import NAMED, load_at_most, load_images

    count, source = request["head_images"], request["train_dataset"]
    if count == 0:
        return None
    if source is None and dataset not in NAMED:
        if request["images"] is None:
            click.echo("Note: every image is certified, none is left to train heads on: see --train-dataset", err=True)
            return None
        found = load_at_most(dataset, replace(asked, count=request["images"] + count))
        pixels, labels = found.images[request["images"] :], found.labels[request["images"] :]
    else:
        split = "train" if source is None or source in NAMED else "test"
        found = load_images(source or dataset, replace(asked, count=count, split=split))
        pixels, labels = found.images, found.labels
    if found.classes != images.classes:
        raise MismatchError(f"{found.ref} has the classes {', '.join(found.classes)}, {images.ref} has others")
    seen = {image.numpy().tobytes() for image in images.images}
    fresh = torch.tensor([image.numpy().tobytes() not in seen for image in pixels], dtype=torch.bool)
    return (pixels[fresh][:count], labels[fresh][:count]) if bool(fresh.any()) else None


def _certified(case: Any, layers: tuple[str, ...], threats: list[Any], settings: Any) -> list[Any]:
    from audit.certificate.layers import certify_layers
    from audit.commands.display import Display

    with Display(len(case.clean)) as display:
        return certify_layers(
            case, layers, threats, settings,
            lambda layer, threat, stage, met: display.channel(f"{layer}, eps {threat.eps:.4g}, {stage}: met", met),
        )  # fmt: skip


def _written(outcomes: list[Any], case: Any, out: Path | None) -> list[dict[str, Any]]:
    """Write the witness files and return the rows with their names and hashes."""
    from audit.certificate.witness import header_of, write
    from audit.hashing import weights_sha256

    weights, rows = weights_sha256(case.network), []
    for row, threat, certificate in outcomes:
        plain = {**row.to_dict(), "weights_sha256": weights, "witness": "", "witness_sha256": ""}
        if out is not None and certificate is not None:
            path = out if len(outcomes) == 1 else _path(out, row.layer, row.eps)
            header = header_of(certificate, row.layer, threat, (case.clean, case.labels), weights)
            plain |= {"witness": str(path), "witness_sha256": write(path, certificate, header, case.labels)}
        rows.append(plain)
    return rows


def _path(out: Path, layer: str, eps: float) -> Path:
    """Return the file of one layer and radius: `w.safetensors` gives `w-logits-8_255.safetensors`."""
    from reports.text import format_eps

    name = "".join(c if c.isascii() and (c.isalnum() or c in ".-_") else "_" for c in f"{layer}-{format_eps(eps)}")
    return out.with_name(f"{out.stem}-{name}{out.suffix}")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    from audit.commands.display import plain, print_table
    from reports.text import format_eps

    header = ("layer", "eps", "images", "best head", "achieved", "certified", "population", "held out", "hubs",
              "pairs")  # fmt: skip
    print_table(header, [_shown(row, format_eps(row["eps"])) for row in rows])
    confidence = rows[0]["confidence"]
    click.echo(
        f"No head keeps more than `certified` of these images ({rows[0]['certified_tier']}), nor more than "
        f"`population` of all images of their kind ({confidence:.0%}); `achieved` is measured ({rows[0]['attack']})."
    )
    for row in rows:
        where = plain(f"{row['layer']}, eps {format_eps(row['eps'])}")
        for said in (row["reason"], *row["flags"]):
            if said:
                click.echo(f"{where}: {plain(said)}")
        if row["witness"]:
            click.echo(f"{where}: {plain(row['witness'])} sha256 {row['witness_sha256']}")


def _shown(row: dict[str, Any], eps: str) -> tuple[str, ...]:
    def number(name: str) -> str:
        return "" if row[name] is None else f"{row[name]:.3f}"

    bounds = ("best_head_accuracy", "certified_bound", "certified_bound_population", "certified_bound_held_out")
    hubs = "+".join(map(str, row["at_hubs"]))
    return (
        row["layer"],
        eps,
        str(row["images"]),
        row["best_head"] or "",
        *map(number, bounds),
        hubs,
        str(row["pairs"]),
    )


def claimed_parts(model: str, dataset: str, count: int, where: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Return network, images and labels to hold a witness against."""
    from audit.run.cell_runner import device_of
    from model_zoo.images.load import ImageRequest, load_at_most
    from model_zoo.load import load_model

    options = run_options(where)
    device = device_of(options.device)
    loaded = load_model(model, options.sources)
    asked = ImageRequest(count, data_dir=options.data_dir, offline=options.sources.offline, balanced=where["balanced"])
    images = load_at_most(dataset, asked)
    _check_fit(loaded, images)
    return loaded.network.to(device), images.images.to(device), images.labels.to(device)
