"""What inference under ten label hypotheses costs beside the plain CNN of the same trunk.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/hypothesis.py --out hypothesis.csv

Freshly drawn weights, ten classes, images of 1x28x28, eval mode, no gradients, one thread. The networks take turns in
one process, so that a busy machine slows all alike. Seconds are CPU time; each figure is the median over the turns,
and so is the ratio of the two networks' seconds of one turn. Kernels "torch": both networks run torch's linear layers.
Kernels "onednn", the default: the layers that see pairs run through oneDNN, which the plain CNN does not use for its
dense layers. Multiplications alone say 1.42 for ten hypotheses that enter at the flattened map.
"""

import argparse
import csv
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import nn

from audit.types import Images
from model_zoo.architectures import build
from model_zoo.architectures.hypothesis import ENTRIES

SHAPE, CLASSES, BATCHES, WARM_UP = (1, 28, 28), 10, (1, 10, 50, 250, 1000), 3
KERNELS = ("onednn", "torch")
FIELDS = ("batch", "entry", "kernels", "turns", "plain_cpu_ms", "hypothesis_cpu_ms",
          "ratio")  # fmt: skip


def milliseconds(network: nn.Module, images: Images, repeats: int) -> float:
    """Return the CPU time of one forward pass, averaged over some in a row."""
    started = time.process_time()
    for _ in range(repeats):
        network(images)
    return 1e3 * (time.process_time() - started) / repeats


@torch.no_grad()
def row(entry: str, kernels: str, batch: int, turns: int) -> dict[str, object]:
    """Return one row: both networks on the same images, in turns."""
    arguments = {"image_shape": SHAPE, "num_classes": CLASSES}
    plain, ours = build("plain-cnn", arguments).eval(), build("hypothesis-net", arguments | {"entry": entry}).eval()
    ours.fused = kernels == "onednn"
    images = torch.rand(batch, *SHAPE)
    repeats = max(1, 500 // batch)
    pairs = [(milliseconds(plain, images, repeats), milliseconds(ours, images, repeats))
             for _ in range(turns + WARM_UP)][WARM_UP:]  # fmt: skip
    figures = (median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs))
    return {"batch": batch, "entry": entry, "kernels": kernels, "turns": turns} | {
        name: f"{value:.3f}" for name, value in zip(FIELDS[4:], figures, strict=True)
    }


def main() -> None:
    """Write a row for every batch size and entry, as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="A CSV file. [standard output]")
    parser.add_argument("--turns", type=int, default=21)
    words = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with words.out.open("w", newline="") if words.out else sys.stdout as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for entry, kernels, batch in product(ENTRIES, KERNELS, BATCHES):
            writer.writerow(row(entry, kernels, batch, words.turns))
            file.flush()


if __name__ == "__main__":
    main()
