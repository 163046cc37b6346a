"""Measure time and memory of the guaranteed pair and of one sample of the plug-in pair on many images.

Run from the repository root, in the package's own environment:
    python benchmarks/mixture.py --out benchmarks/results/mixture.csv

Each row is measured in a separate process with one thread. Peak memory is the maximum resident memory of the process,
including Python and torch; `import_mib` is the memory after importing torch. Features are Gaussian, about one nat per
dimension for ten dimensions. Existing rows are not measured again.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from math import log
from pathlib import Path
from typing import Any

import torch

from audit.information.gaussian_mixture import guaranteed_bounds, plug_in_terms
from audit.random_keys import keyed_generator

SIZES = ((1_000, 10), (5_000, 10), (20_000, 10), (50_000, 10), (50_000, 64))
FIELDS = (
    "images",
    "dimensions",
    "pair_cpu_seconds",
    "plug_in_cpu_seconds",
    "peak_mib",
    "import_mib",
    "features_mib",
    "guaranteed_lower",
    "plug_in",
    "guaranteed_upper",
    "most_nats",
)


def measure(images: int, dimensions: int) -> dict[str, Any]:
    """Return one row, measured in this process."""
    torch.set_num_threads(1)
    imported = peak_mib()
    features = 2.5 * torch.randn(images, dimensions, generator=keyed_generator(0)) * (10 / dimensions) ** 0.5
    start = time.process_time()
    pair = guaranteed_bounds(features)
    middle = time.process_time()
    plug_in = float(plug_in_terms(features, keyed_generator(1), 1)[0].mean())
    end = time.process_time()
    return {
        "images": images,
        "dimensions": dimensions,
        "pair_cpu_seconds": f"{middle - start:.2f}",
        "plug_in_cpu_seconds": f"{end - middle:.2f}",
        "peak_mib": f"{peak_mib():.0f}",
        "import_mib": f"{imported:.0f}",
        "features_mib": f"{features.nbytes / 2**20:.1f}",
        "guaranteed_lower": f"{pair.lower:.4f}",
        "plug_in": f"{plug_in:.4f}",
        "guaranteed_upper": f"{pair.upper:.4f}",
        "most_nats": f"{log(images):.4f}",
    }


def peak_mib() -> float:
    """Return the peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def measure_in_new_process(images: int, dimensions: int) -> dict[str, Any]:
    """Return the row measured in a new process, because peak memory never decreases within a process."""
    command = (sys.executable, __file__, "--one", str(images), str(dimensions))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    """Append the missing rows, size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--out", type=Path)
    mode.add_argument("--one", type=int, nargs=2, metavar=("IMAGES", "DIMENSIONS"), help="one row as JSON")
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(measure(*args.one)))
        return
    finished = list(csv.DictReader(args.out.open(newline=""))) if args.out.exists() else []
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not finished:
            table.writeheader()
        for images, dimensions in SIZES:
            if any((row["images"], row["dimensions"]) == (str(images), str(dimensions)) for row in finished):
                continue
            row = measure_in_new_process(images, dimensions)
            table.writerow(row)
            file.flush()
            sys.stderr.write(f"{row}\n")


if __name__ == "__main__":
    main()
