"""The audit tier beside AutoAttack-standard: how many images does each leave standing, and at how many passes?

Run from the repository root, in the package's own environment:
    python benchmarks/autoattack.py --config tests/third_party.yaml --out benchmarks/results/autoattack.csv

Both attack the same images with the same radius. A network whose rows the file has is not attacked again.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

from audit.adversary.label_attack import AUDIT, LabelAttack
from audit.adversary.robustness import Target, attacked
from audit.run.cell import Cell, read_config
from audit.run.run_loop import expand
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

STANDARD = LabelAttack(borrowed=("autoattack-standard",))
FIELDS = ("network", "eps", "images", "natural", "attack", "robust", "passes", "forwards", "only_this_breaks",
          "trustworthy")  # fmt: skip


def rows(cell: Cell) -> list[dict[str, Any]]:
    """Return one row an attack."""
    images = load_images(cell.dataset, ImageRequest(count=cell.images))
    model = load_model(cell.ref, SourceSettings(trust_code=True, offline=True))
    target = Target(model.network, images.images, images.labels)
    found = {attack: attacked(target, cell.threat, attack, 0) for attack in (AUDIT, STANDARD)}
    broken = {attack: ~each.accuracy.robust for attack, each in found.items()}
    others = {AUDIT: broken[STANDARD], STANDARD: broken[AUDIT]}
    return [
        {
            "network": model.entry.name, "eps": f"{cell.threat.eps:.6g}", "images": len(images.labels),
            "natural": int(each.accuracy.siege.correct.sum()),
            "attack": "audit tier" if attack is AUDIT else attack.name, "robust": int(each.accuracy.robust.sum()),
            "passes": each.accuracy.passes, "forwards": each.accuracy.forwards,
            "only_this_breaks": int((broken[attack] & ~others[attack]).sum()), "trustworthy": each.trustworthy,
        }
        for attack, each in found.items()
    ]  # fmt: skip


def main() -> None:
    """Write the rows that are not there yet, network by network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a benchmark: its models, images and radii")
    parser.add_argument("--models", nargs="+", default=[], help="names of some of its models [all]")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    known = {row["network"] for row in csv.DictReader(chosen.out.open(newline=""))} if chosen.out.exists() else set()
    cells = {cell.ref: cell for cell in expand(read_config(chosen.config))}
    with chosen.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not known:
            table.writeheader()
        for cell in cells.values():
            wanted = not chosen.models or any(f"name={name}&" in cell.ref for name in chosen.models)
            if not wanted or any(f"name={name}&" in cell.ref for name in known):
                continue
            for row in rows(cell):
                table.writerow(row)
                sys.stderr.write(f"{row}\n")
            file.flush()


if __name__ == "__main__":
    main()
