"""Compare the default critic with the estimators of torch-mist on channels with finished_rows mutual information.

Run from the repository root, in a separate environment (see benchmarks/README.md):
    python benchmarks/mist.py --out benchmarks/results/mist.csv
"""

import argparse
import csv
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from channels import CHANNELS, draw
from torch import Tensor

from audit.information.critic_training import fit_critic
from audit.information.encoding import EncodedSplits, split_indices
from audit.information.settings import CriticTraining
from audit.types import Encoded

SAMPLES, STEPS, BATCH, WIDTH, EMBEDDING = 5000, 1000, 256, 128, 32
PEERS = ("infonce", "nwj", "smile", "js", "mine")
FIELDS = ("task", "truth", "estimator", "package", "seed", "estimate", "error", "seconds")


def ours(x: list[Tensor], z: list[Tensor], seed: int) -> float:
    """Return the held-out estimate of the default critic of a benchmark run, applied to vectors."""
    images = split_indices(SAMPLES, seed)._make(part[:, None, None] for part in x)
    encoded = EncodedSplits(*(Encoded(part, part.new_empty(len(part), 0)) for part in z))
    return fit_critic(images, encoded, CriticTraining(steps=STEPS, batch_size=BATCH), seed)[1].nats


def torch_mist(name: str) -> Callable[[list[Tensor], list[Tensor], int], float]:
    """Return a torch-mist estimator: separable critic of our size, all pairs of a batch, its own early stopping."""

    def estimate(x: list[Tensor], z: list[Tensor], seed: int) -> float:
        from torch_mist import estimate_mi

        torch.manual_seed(seed)  # torch-mist draws from the global generator
        train, valid, test = ({"x": a, "y": b} for a, b in zip(x, z, strict=True))
        settings: dict[str, Any] = {
            "hidden_dims": [WIDTH, WIDTH, EMBEDDING],
            "critic_type": "separable",
            "neg_samples": -1,
            "max_iterations": STEPS,
            "batch_size": BATCH,
            "patience": 8,
            "evaluation_batch_size": len(x[2]),
            "verbose": False,
            "fast_train": True,
            "logger": False,
        }
        with open(os.devnull, "w") as silent, redirect_stdout(silent):
            found = estimate_mi(train, estimator=name, valid_data=valid, test_data=test, **settings)
        return float(found[0] if isinstance(found, tuple) else found)

    return estimate


def rows(seed: int, task: str, wanted: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield one row per estimator, in turn, so that load on the machine affects all equally."""
    truth, x, z = draw(task, SAMPLES, seed)
    parts = split_indices(SAMPLES, seed)
    sides = [x[index] for index in parts], [z[index] for index in parts]
    for package, name in wanted:
        estimate = ours if package == "rvaudit" else torch_mist(name)
        started = time.process_time()
        value = estimate(*sides, seed)
        spent = time.process_time() - started
        numbers = {"truth": truth, "estimate": value, "error": value - truth, "seconds": spent}
        rounded = {key: f"{number:.4f}" for key, number in numbers.items()}
        yield {"task": task, "estimator": name, "package": package, "seed": seed, **rounded}


def finished_rows(path: Path) -> set[tuple[str, ...]]:
    """Return the keys of the rows in a file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["task"], row["package"], row["estimator"], row["seed"]) for row in csv.DictReader(file)}


def main() -> None:
    """Append the missing rows as they are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tasks", nargs="+", choices=list(CHANNELS), default=list(CHANNELS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    finished = finished_rows(args.out)
    estimators = [("rvaudit", "infonce"), *(("torch-mist", name) for name in args.peers)]
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if not finished:
            table.writeheader()
        for seed, task in itertools.product(args.seeds, args.tasks):
            wanted = [each for each in estimators if (task, *each, str(seed)) not in finished]
            for row in rows(seed, task, wanted):
                table.writerow(row)
                file.flush()
                sys.stderr.write(f"{seed} {task} {row['package']} {row['estimator']} {row['error']}\n")


if __name__ == "__main__":
    main()
