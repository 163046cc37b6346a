"""What the information of many images costs: the guaranteed pair and one draw of the plug-in pair, time and memory.

Run from the repository root, in the package's own environment:
    python benchmarks/mixture.py --out benchmarks/results/mixture.csv

Each row is measured in a process of its own, one thread. Peak memory is all that the process ever held in memory, with
Python and torch; beside it stands what importing torch alone had taken. Features are normal, about one nat a dimension
for ten dimensions. Rows that the file has are not measured again.
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

from audit.information.gaussian_mixture import guaranteed_pair, plug_in_terms
from audit.random_keys import keyed_generator

SIZES = ((1_000, 10), (5_000, 10), (20_000, 10), (50_000, 10), (50_000, 64))
FIELDS = ("images", "dimensions", "pair_cpu_seconds", "plug_in_cpu_seconds", "peak_mib", "import_mib", "features_mib",
          "guaranteed_lower", "plug_in", "guaranteed_upper", "most_nats")  # fmt: skip


def measured(images: int, dimensions: int) -> dict[str, Any]:
    """Return one row, measured in this process."""
    torch.set_num_threads(1)
    imported = peak_mib()
    features = 2.5 * torch.randn(images, dimensions, generator=keyed_generator(0)) * (10 / dimensions) ** 0.5
    start = time.process_time()
    pair = guaranteed_pair(features)
    middle = time.process_time()
    told = float(plug_in_terms(features, keyed_generator(1), 1)[0].mean())
    end = time.process_time()
    return {
        "images": images, "dimensions": dimensions, "pair_cpu_seconds": f"{middle - start:.2f}",
        "plug_in_cpu_seconds": f"{end - middle:.2f}", "peak_mib": f"{peak_mib():.0f}", "import_mib": f"{imported:.0f}",
        "features_mib": f"{features.nbytes / 2**20:.1f}", "guaranteed_lower": f"{pair.lower:.4f}",
        "plug_in": f"{told:.4f}", "guaranteed_upper": f"{pair.upper:.4f}", "most_nats": f"{log(images):.4f}",
    }  # fmt: skip


def peak_mib() -> float:
    """Return the most memory this process ever held, in MiB."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**20 if sys.platform == "darwin" else 2**10)


def in_a_process_of_its_own(images: int, dimensions: int) -> dict[str, Any]:
    """Return the row that a fresh process measures: a peak never falls again in one that measured before."""
    command = (sys.executable, __file__, "--one", str(images), str(dimensions))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    """Write the rows that are not there yet, size by size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--out", type=Path)
    wanted.add_argument("--one", type=int, nargs=2, metavar=("IMAGES", "DIMENSIONS"), help="one row as JSON")
    chosen = parser.parse_args()
    if chosen.one:
        sys.stdout.write(json.dumps(measured(*chosen.one)))
        return
    known = list(csv.DictReader(chosen.out.open(newline=""))) if chosen.out.exists() else []
    with chosen.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not known:
            table.writeheader()
        for images, dimensions in SIZES:
            if any((row["images"], row["dimensions"]) == (str(images), str(dimensions)) for row in known):
                continue
            row = in_a_process_of_its_own(images, dimensions)
            table.writerow(row)
            file.flush()
            sys.stderr.write(f"{row}\n")


if __name__ == "__main__":
    main()
