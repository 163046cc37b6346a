"""Compare the audit tier with AutoAttack-standard: robust images and passes.

Run from the repository root, in the package's own environment:
    python benchmarks/autoattack.py --config tests/third_party.yaml --out benchmarks/results/autoattack.csv

Both attack the same images at the same radius. `mask` has a 1 for every robust image. Networks with rows in the file
are skipped.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

from audit.adversary.label_attack import AUDIT, LabelAttack
from audit.adversary.robustness import TargetModel, evaluate_robustness
from audit.config.yaml_source import read_config
from audit.run.cell import Cell, expand
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

STANDARD = LabelAttack(borrowed=("autoattack-standard",))
FIELDS = (
    "network",
    "eps",
    "images",
    "natural",
    "attack",
    "robust",
    "passes",
    "forwards",
    "only_this_breaks",
    "trustworthy",
    "mask",
)


def rows(cell: Cell) -> list[dict[str, Any]]:
    """Return one row per attack."""
    images = load_images(cell.dataset, ImageRequest(count=cell.images))
    model = load_model(cell.ref, SourceSettings(trust_code=True, offline=True))
    target = TargetModel(model.network, images.images, images.labels)
    found = {attack: evaluate_robustness(target, cell.threat, attack, 0) for attack in (AUDIT, STANDARD)}
    broken = {attack: ~each.accuracy.robust for attack, each in found.items()}
    others = {AUDIT: broken[STANDARD], STANDARD: broken[AUDIT]}
    return [
        {
            "network": model.entry.name,
            "eps": f"{cell.threat.eps:.6g}",
            "images": len(images.labels),
            "natural": int(each.accuracy.outcome.correct.sum()),
            "attack": "audit tier" if attack is AUDIT else attack.name,
            "robust": int(each.accuracy.robust.sum()),
            "passes": each.accuracy.passes,
            "forwards": each.accuracy.forwards,
            "only_this_breaks": int((broken[attack] & ~others[attack]).sum()),
            "trustworthy": each.trustworthy,
            "mask": "".join(str(int(robust)) for robust in each.accuracy.robust),
        }
        for attack, each in found.items()
    ]


def main() -> None:
    """Append the missing rows, network by network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="benchmark file with models, images and radii")
    parser.add_argument("--models", nargs="+", default=[], help="names of some of its models [all]")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    finished = {row["network"] for row in csv.DictReader(args.out.open(newline=""))} if args.out.exists() else set()
    cells = {cell.ref: cell for cell in expand(read_config(args.config))}
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not finished:
            table.writeheader()
        for cell in cells.values():
            wanted = not args.models or any(f"name={name}&" in cell.ref for name in args.models)
            if not wanted or any(f"name={name}&" in cell.ref for name in finished):
                continue
            for row in rows(cell):
                table.writerow(row)
                sys.stderr.write(f"{row}\n")
            file.flush()


if __name__ == "__main__":
    main()
