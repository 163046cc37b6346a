"""Measure the inference cost under ten label hypotheses relative to the plain CNN with the same trunk.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/hypothesis.py --out hypothesis.csv

Random weights, ten classes, images of 1x28x28, eval mode, no gradients, one thread. The networks alternate in one
process, so that load on the machine affects both equally. Times are CPU time, medians over the repetitions; the
ratio is the median of the ratios of each repetition. Kernels "torch": both networks use torch's linear layers.
Kernels "onednn", the default: layers of pairs run in oneDNN, which the dense layers of the plain CNN do not use.
The ratio of multiplications is 1.42 for ten hypotheses that enter at the flattened map.
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
from model_zoo.architectures.hypothesis_net import HYPOTHESIS_ENTRIES

SHAPE, CLASSES, BATCHES, WARM_UP = (1, 28, 28), 10, (1, 10, 50, 250, 1000), 3
KERNELS = ("onednn", "torch")
FIELDS = ("batch", "entry", "kernels", "turns", "plain_cpu_ms", "hypothesis_cpu_ms", "ratio")


def milliseconds(network: nn.Module, images: Images, repeats: int) -> float:
    """Return the CPU time in ms of one forward pass, averaged over `repeats` passes."""
    started = time.process_time()
    for _ in range(repeats):
        network(images)
    return 1e3 * (time.process_time() - started) / repeats


@torch.no_grad()
def row(entry: str, kernels: str, batch: int, turns: int) -> dict[str, object]:
    """Return one row: both networks in alternation on the same images."""
    arguments = {"image_shape": SHAPE, "num_classes": CLASSES}
    plain, conditioned = (
        build("plain-cnn", arguments).eval(),
        build("hypothesis-net", arguments | {"entry": entry}).eval(),
    )
    conditioned.fused = kernels == "onednn"
    images = torch.rand(batch, *SHAPE)
    repeats = max(1, 500 // batch)
    pairs = [
        (milliseconds(plain, images, repeats), milliseconds(conditioned, images, repeats))
        for _ in range(turns + WARM_UP)
    ][WARM_UP:]
    medians = (median(a for a, _ in pairs), median(b for _, b in pairs), median(b / a for a, b in pairs))
    return {"batch": batch, "entry": entry, "kernels": kernels, "turns": turns} | {
        name: f"{value:.3f}" for name, value in zip(FIELDS[4:], medians, strict=True)
    }


def main() -> None:
    """Write a row for every entry, kernel and batch size as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="CSV file [standard output]")
    parser.add_argument("--turns", type=int, default=21)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with args.out.open("w", newline="") if args.out else sys.stdout as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for entry, kernels, batch in product(HYPOTHESIS_ENTRIES, KERNELS, BATCHES):
            writer.writerow(row(entry, kernels, batch, args.turns))
            file.flush()


if __name__ == "__main__":
    main()
