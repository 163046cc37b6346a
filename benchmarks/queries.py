"""The search by differences beside Square: how many images does each leave standing after as many queries?

Run from the repository root, in the package's own environment:
    python benchmarks/queries.py --config tests/third_party.yaml --out benchmarks/results/queries.csv

Beside them stand the audit tier's gradients, without noise and queries. The images are the 101st to the 200th: on the
first hundred the search's reach and its order of directions were chosen. A ball whose rows the file has is not attacked
again.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

from audit.adversary.accuracy import logits_of, measure_accuracy
from audit.adversary.external import AutoAttack
from audit.adversary.finite_differences import Differences
from audit.adversary.label_attack import AUDIT, LabelAttack, margin
from audit.adversary.robustness import Target
from audit.adversary.threat import ThreatModel, threat_model
from audit.run.cell import read_config
from audit.run.run_loop import expand
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

QUERIES = 300
FIRST, LAST = 100, 200
BALLS = (
    ("resnet2b", "l2", 0.5), ("resnet2b", "l1", 12.0),
    ("cnn-a-adv", "l2", 0.5), ("cnn-a-adv", "l1", 12.0),
    ("digits-vgg-robust", "l2", 0.8), ("digits-vgg-robust", "l1", 1.0),
)  # fmt: skip
FIELDS = ("network", "norm", "eps", "first_image", "images", "natural", "attack", "queries", "robust")


def rows(name: str, target: Target, threat: ThreatModel) -> list[dict[str, Any]]:
    """Return one row an attack on one network in one ball."""
    everything = (target.network, target.images, target.labels)
    # as a stage of the ensemble Square knows every norm
    square = AutoAttack(("square", "square"), QUERIES)(*everything, threat, 0).images
    left = {
        "differences": Differences(QUERIES).search(*everything, threat).margins > 0,
        "square": _right(target, square),
        "gradients": measure_accuracy(*everything, threat, LabelAttack(AUDIT.stages), 0).robust,
    }
    return [
        {
            "network": name, "norm": threat.norm, "eps": threat.eps, "first_image": FIRST,
            "images": len(target.labels), "natural": int(_right(target, target.images).sum()), "attack": attack,
            "queries": "" if attack == "gradients" else QUERIES, "robust": int(robust.sum()),
        }
        for attack, robust in left.items()
    ]  # fmt: skip


def _right(target: Target, images: torch.Tensor) -> torch.Tensor:
    return margin(logits_of(target.network, images, 100), target.labels) > 0


def sources(config: Path) -> dict[str, tuple[str, str]]:
    """Return the reference and the data set of each network by its name: those of a benchmark, and a bundled one."""
    named = {cell.ref.partition("name=")[2].partition("&")[0]: (cell.ref, cell.dataset)
             for cell in expand(read_config(config))}  # fmt: skip
    return named | {"digits-vgg-robust": ("bundled:digits-vgg-robust", "digits")}


def main() -> None:
    """Write the rows that are not there yet, ball by ball."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a benchmark that names the networks")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    known = list(csv.DictReader(chosen.out.open(newline=""))) if chosen.out.exists() else []
    named = sources(chosen.config)
    with chosen.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not known:
            table.writeheader()
        for name, norm, eps in BALLS:
            if any((row["network"], row["norm"]) == (name, norm) for row in known):
                continue
            ref, dataset = named[name]
            images = load_images(dataset, ImageRequest(count=LAST))
            network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
            target = Target(network, images.images[FIRST:], images.labels[FIRST:])
            for row in rows(name, target, threat_model(norm, eps)):
                table.writerow(row)
                sys.stderr.write(f"{row}\n")
            file.flush()


if __name__ == "__main__":
    main()
