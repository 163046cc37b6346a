"""Compare worst-case searches warm-started from another radius with searches from scratch.

Run from the repository root:
    python benchmarks/following.py --out following.csv

Bundled digits networks, `sandwich` with its defaults, one seed, increasing radii at two layers. `alone` is the
worst case in nats from scratch, `after` that of a search warm-started from the previous radius; both are upper
bounds of the same quantity, so the lower one is tighter. The first radius has no warm start.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.information.sandwich import Sandwich
from audit.run.layer_audit import LayerAudit, SearchStarts
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import load_model

MODELS = ("digits-baseline-h-robust", "digits-resnet-robust", "digits-vgg-standard")
LAYERS, RADII = ("logits", "penultimate"), (0.05, 0.1, 0.2, 0.3)
FIELDS = (
    "model",
    "layer",
    "eps",
    "images",
    "alone",
    "alone_passes",
    "alone_served",
    "after",
    "after_passes",
    "after_served",
    "se",
)


def rows(model: str, layer: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each radius with a warm start."""
    images = load_images("digits", ImageRequest(count=count))
    settings = AuditSettings(estimator=Sandwich(), seeds=(0,))
    network = load_model(f"bundled:{model}").network
    audit = LayerAudit(network, images.images, images.labels, layer, settings)
    (last,) = audit.searched(Linf(RADII[0]))
    for eps in RADII[1:]:
        (alone,), (after,) = (
            audit.searched(Linf(eps)),
            audit.searched(Linf(eps), SearchStarts({0: last.all_adversarial})),
        )
        last = after
        values = (
            model,
            layer,
            eps,
            count,
            f"{alone.worst.nats:.3f}",
            f"{alone.passes / count:.0f}",
            alone.origin.label,
            f"{after.worst.nats:.3f}",
            f"{after.passes / count:.0f}",
            after.origin.label,
            f"{after.worst.stderr:.3f}",
        )
        yield dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Write the rows as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with args.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for model in MODELS:
            for layer in LAYERS:
                for row in rows(model, layer, args.images):
                    table.writerow(row)
                    file.flush()
                    sys.stderr.write(f"{model}, {layer}, {row['eps']}: {row['alone']} alone, {row['after']} after\n")


if __name__ == "__main__":
    main()
