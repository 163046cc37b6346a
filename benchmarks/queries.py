"""Compare the finite-difference search with Square: robust images after the same number of queries.

Run from the repository root, in the package's own environment:
    python benchmarks/queries.py --config tests/third_party.yaml --out benchmarks/results/queries.csv

The audit tier's gradient attacks, without noise and queries, are listed too. The images are the 101st to the 200th: the
step sizes and the order of directions were tuned on the first hundred. Balls with rows in the file are skipped.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.external import AutoAttack
from audit.adversary.finite_differences import FiniteDifferences
from audit.adversary.label_attack import AUDIT, LabelAttack, margin
from audit.adversary.robustness import TargetModel
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import ThreatModel, threat_model
from audit.config.yaml_source import read_config
from audit.run.cell import expand
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

QUERIES = 300
FIRST, LAST = 100, 200
BALLS = (
    ("resnet2b", "l2", 0.5),
    ("resnet2b", "l1", 12.0),
    ("cnn-a-adv", "l2", 0.5),
    ("cnn-a-adv", "l1", 12.0),
    ("digits-vgg-robust", "l2", 0.8),
    ("digits-vgg-robust", "l1", 1.0),
)
FIELDS = ("network", "norm", "eps", "first_image", "images", "natural", "attack", "queries", "robust")


def rows(name: str, target: TargetModel, threat: ThreatModel) -> list[dict[str, Any]]:
    """Return one row per attack on one network in one ball."""
    attack_inputs = (target.network, target.images, target.labels)
    # as a stage of the ensemble, Square supports every norm
    square = AutoAttack(("square", "square"), QUERIES)(*attack_inputs, threat, 0).images
    robust_masks = {
        "differences": FiniteDifferences(QUERIES).search(*attack_inputs, threat).margins > 0,
        "square": _correct_mask(target, square),
        "gradients": measure_accuracy(*attack_inputs, threat, LabelAttack(AUDIT.stages), 0).robust,
    }
    return [
        {
            "network": name,
            "norm": threat.norm,
            "eps": threat.eps,
            "first_image": FIRST,
            "images": len(target.labels),
            "natural": int(_correct_mask(target, target.images).sum()),
            "attack": attack,
            "queries": "" if attack == "gradients" else QUERIES,
            "robust": int(robust.sum()),
        }
        for attack, robust in robust_masks.items()
    ]


def _correct_mask(target: TargetModel, images: torch.Tensor) -> torch.Tensor:
    return margin(logits_of(target.network, images, 100), target.labels) > 0


def network_sources(config: Path) -> dict[str, tuple[str, str]]:
    """Return reference and data set by network name: the networks of a benchmark file, and a bundled one."""
    named = {
        cell.ref.partition("name=")[2].partition("&")[0]: (cell.ref, cell.dataset)
        for cell in expand(read_config(config))
    }
    return named | {"digits-vgg-robust": ("bundled:digits-vgg-robust", "digits")}


def main() -> None:
    """Append the missing rows, ball by ball."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="benchmark file with the networks")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    finished = list(csv.DictReader(args.out.open(newline=""))) if args.out.exists() else []
    named = network_sources(args.config)
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not finished:
            table.writeheader()
        for name, norm, eps in BALLS:
            if any((row["network"], row["norm"]) == (name, norm) for row in finished):
                continue
            ref, dataset = named[name]
            images = load_images(dataset, ImageRequest(count=LAST))
            network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
            target = TargetModel(network, images.images[FIRST:], images.labels[FIRST:])
            for row in rows(name, target, threat_model(norm, eps)):
                table.writerow(row)
                sys.stderr.write(f"{row}\n")
            file.flush()


if __name__ == "__main__":
    main()
