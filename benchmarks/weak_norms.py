"""Robust images in l2 and l1: the audit tier beside plain PGD-100 and AutoAttack, at two radii.

Run from the repository root, in the package's own environment:
    python benchmarks/weak_norms.py --config tests/third_party.yaml --out benchmarks/results/weak_norms.csv
    python benchmarks/weak_norms.py --config tests/third_party.yaml --out benchmarks/results/weak_norms.csv \
        --attack autoattack "autoattack on the rest" --images 100

Plain PGD is a loop of a dozen lines: 100 steps on the cross-entropy and on the margin, of a tenth and of a fortieth of
the radius, from a random start; an image counts as broken if any of the four runs breaks it. A step follows the
normalised gradient in l2, and moves the hundredth of the pixels with the largest gradient in l1. AutoAttack is
APGD-CE, APGD-T and FAB-T; Square adds nothing in these norms. "On the rest" it runs only on images that the audit tier
leaves: its random numbers depend on the images in a batch, so that it may break others than before. Every row holds the
mask of robust images, so that a table of images that one attack breaks and another leaves can be printed from the rows
of separate runs.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.external import AutoAttack
from audit.adversary.label_attack import AUDIT
from audit.adversary.threat import ThreatModel, threat_model
from audit.config.yaml_source import read_config
from audit.run.cell import Cell, expand
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

REST = "autoattack on the rest"
RADII = {"mnist": {"l2": (1.0, 2.0), "l1": (5.0, 10.0)}, "cifar": {"l2": (0.25, 0.5), "l1": (4.0, 12.0)}}
FIELDS = ("network", "norm", "eps", "images", "natural", "attack", "robust", "passes", "forwards", "mask")
_STEPS = 100


def plain_pgd(
    network: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, loss: str, share: float
) -> Tensor:
    """Return which images (N,) a plain loop of 100 steps, each of `share` of the radius, leaves correct."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator).flatten(1)
    length = noise.norm(dim=1, p=2 if threat.norm == "l2" else 1, keepdim=True)
    moved = images.flatten(1) + threat.eps * torch.rand(len(images), 1, generator=generator) * noise / length
    robust = torch.ones_like(labels, dtype=torch.bool)
    moved = moved.clamp(0, 1).view_as(images)
    for step in range(_STEPS + 1):
        index = robust.nonzero().flatten()
        if len(index) == 0:
            break
        pixels, wanted = moved[index].requires_grad_(), labels[index]
        logits = network(pixels)
        robust[index[logits.argmax(1) != wanted]] = False
        if step == _STEPS:
            break
        (gradient,) = torch.autograd.grad(_loss(logits, wanted, loss), pixels)
        ahead = pixels.detach() + share * threat.eps * _direction(gradient, pixels.detach(), threat.norm)
        moved[index] = _projected(ahead, images[index], threat)
    return robust


def _loss(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    if loss == "cross-entropy":
        return F.cross_entropy(logits, labels, reduction="sum")
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (others - logits.gather(1, labels[:, None])[:, 0]).sum()


def _direction(gradient: Tensor, pixels: Tensor, norm: str) -> Tensor:
    rows = gradient.flatten(1)
    if norm == "l2":
        return (rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-20)).view_as(pixels)
    blocked = ((gradient > 0) & (pixels >= 1)) | ((gradient < 0) & (pixels <= 0))
    rows = rows.masked_fill(blocked.flatten(1), 0.0)
    chosen = rows.abs().topk(max(1, rows.shape[1] // 100), 1).indices
    signs = rows.gather(1, chosen).sign() / chosen.shape[1]
    return torch.zeros_like(rows).scatter(1, chosen, signs).view_as(pixels)


def _projected(images: Tensor, clean: Tensor, threat: ThreatModel) -> Tensor:
    delta = (images - clean).flatten(1)
    if threat.norm == "l2":
        delta = delta * (threat.eps / delta.norm(dim=1, keepdim=True).clamp_min(1e-20)).clamp_max(1)
    else:
        sizes = delta.abs().sort(1, descending=True).values
        excess = sizes.cumsum(1) - threat.eps
        last = (sizes * torch.arange(1, sizes.shape[1] + 1) > excess).sum(1, keepdim=True)
        threshold = (excess.gather(1, last - 1) / last).clamp_min(0)
        delta = delta.sign() * (delta.abs() - threshold).clamp_min(0)
    return (clean + delta.view_as(clean)).clamp(0, 1)


def attacked(
    network: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, attack: str, left: str = ""
) -> dict[str, Any]:
    """Return the robust images of one attack, with its cost where it is counted; `left` masks those it may attack."""
    if attack == "audit tier":
        found = measure_accuracy(network, images, labels, threat, AUDIT, 0)
        return {"robust": found.robust, "passes": found.passes, "forwards": found.forwards}
    with torch.no_grad():
        robust = network(images).argmax(1) == labels
    if attack == "plain PGD-100":
        for loss, share in product(("cross-entropy", "margin"), (0.1, 0.025)):
            robust &= plain_pgd(network, images, labels, threat, loss, share)
        return {"robust": robust, "passes": "", "forwards": ""}
    if attack == REST:
        robust &= torch.tensor([each == "1" for each in left])
    index = robust.nonzero().flatten()
    if len(index) == 0:
        return {"robust": robust, "passes": 0, "forwards": 0}
    library = AutoAttack(stages=("apgd-ce", "apgd-t", "fab-t"))
    outcome = library(network, images[index], labels[index], threat, 0)
    with torch.no_grad():
        robust[index] = network(outcome.images).argmax(1) == labels[index]
    return {"robust": robust, "passes": outcome.backwards, "forwards": outcome.forwards - outcome.backwards}


def rows(cell: Cell, count: int, attacks: list[str], masks: dict[tuple[str, ...], str]) -> Iterator[dict[str, Any]]:
    """Yield one row per norm, radius and attack that has no mask yet."""
    images = load_images(cell.dataset, ImageRequest(count=count))
    model = load_model(cell.ref, SourceSettings(trust_code=True, offline=True))
    kind = "mnist" if images.images.shape[1] == 1 else "cifar"
    with torch.no_grad():
        natural = int((model.network(images.images).argmax(1) == images.labels).sum())
    for norm, attack in product(("l2", "l1"), attacks):
        for eps in RADII[kind][norm]:
            key = (model.entry.name, norm, f"{eps:g}", attack)
            if key in masks:
                continue
            left = masks.get((*key[:3], "audit tier"), "")
            if attack == REST and len(left) != count:
                raise SystemExit(f"{' '.join(key[:3])}: no row of the audit tier for these {count} images yet")
            found = attacked(model.network, images.images, images.labels, threat_model(norm, eps), attack, left)
            mask = "".join(str(int(each)) for each in found["robust"])
            masks[key] = mask
            values = {**found, "robust": int(found["robust"].sum()), "images": count, "natural": natural, "mask": mask}
            yield dict(zip(("network", "norm", "eps", "attack"), key, strict=True)) | values


def table(path: Path) -> str:
    """Return the table of robust images, and of images that other attacks break and the audit tier leaves."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in csv.DictReader(path.open(newline="")):
        found.setdefault((row["network"], row["norm"], row["eps"]), {})[row["attack"]] = row["mask"]
    names = ("network", "norm", "eps", "plain PGD-100", "audit tier", "missed", "AutoAttack", "missed", "of the rest")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for place, masks in found.items():
        ours, cells = masks.get("audit tier", ""), list(place)
        for attack in ("plain PGD-100", "audit tier", "autoattack"):
            mask = masks.get(attack, "")
            cells.append(f"{mask.count('1')} of {len(mask)}" if mask else "")
            if attack != "audit tier":
                missed = sum(a == "1" and b == "0" for a, b in zip(ours, mask, strict=False))
                cells.append(str(missed) if mask and ours else "")
        # the audit tier stands before what others break of its robust images
        plain, left, audit, auto, more = cells[3], cells[4], cells[5], cells[6], cells[7]
        rest = str(ours.count("1") - masks[REST].count("1")) if REST in masks else ""
        lines.append(f"| {' | '.join([*cells[:3], plain, audit, left, auto, more, rest])} |")
    return "\n".join(lines)


def main() -> None:
    """Append the missing rows, network by network, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="benchmark file with models and images")
    parser.add_argument(
        "--attack",
        nargs="+",
        choices=["plain PGD-100", "audit tier", "autoattack", REST],
        default=["plain PGD-100", "audit tier"],
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--models", nargs="+", default=[], help="names of some of its models [all]")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    existing = list(csv.DictReader(args.out.open(newline=""))) if args.out.exists() else []
    masks = {tuple(row[name] for name in ("network", "norm", "eps", "attack")): row["mask"] for row in existing}
    with args.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not existing:
            writer.writeheader()
        for cell in {cell.ref: cell for cell in expand(read_config(args.config))}.values():
            if args.models and not any(f"name={name}&" in cell.ref for name in args.models):
                continue
            for row in rows(cell, args.images, args.attack, masks):
                writer.writerow(row)
                file.flush()
    sys.stdout.write(table(args.out) + "\n")


if __name__ == "__main__":
    main()
