"""Searches that start from another radius's worst-case images beside searches from scratch: which end lower?

Run from the repository root:
    python benchmarks/following.py --out following.csv

Bundled digits networks, `sandwich` with its defaults, one seed, radii from small to large at two layers. `alone` is the
worst case in nats from scratch, `after` that of a search that starts where the one at the radius before ended; both are
upper bounds of the same number, so the lower one is right or less wrong. The first radius follows nothing.
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
from audit.run.layer_audit import LayerAudit
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import load_model

MODELS = ("digits-baseline-h-robust", "digits-resnet-robust", "digits-vgg-standard")
LAYERS, RADII = ("logits", "penultimate"), (0.05, 0.1, 0.2, 0.3)
FIELDS = ("model", "layer", "eps", "images", "alone", "alone_passes", "alone_served", "after", "after_passes",
          "after_served", "se")  # fmt: skip


def rows(model: str, layer: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each radius that follows another."""
    images = load_images("digits", ImageRequest(count=count))
    settings = AuditSettings(estimator=Sandwich(), seeds=(0,))
    network = load_model(f"bundled:{model}").network
    audit = LayerAudit(network, images.images, images.labels, layer, settings)
    (last,) = audit.searched(Linf(RADII[0]))
    for eps in RADII[1:]:
        (alone,), (after,) = audit.searched(Linf(eps)), audit.searched(Linf(eps), {0: last.start})
        last = after
        values = (
            model, layer, eps, count, f"{alone.worst.nats:.3f}", f"{alone.passes / count:.0f}", alone.served,
            f"{after.worst.nats:.3f}", f"{after.passes / count:.0f}", after.served, f"{after.worst.stderr:.3f}",
        )  # fmt: skip
        yield dict(zip(FIELDS, values, strict=True))


def main() -> None:
    """Write the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with chosen.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for model in MODELS:
            for layer in LAYERS:
                for row in rows(model, layer, chosen.images):
                    table.writerow(row)
                    file.flush()
                    sys.stderr.write(f"{model}, {layer}, {row['eps']}: {row['alone']} alone, {row['after']} after\n")


if __name__ == "__main__":
    main()
