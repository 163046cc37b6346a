"""Select the weights of information elimination and of the bottleneck's KL divergence on training digits.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/elimination.py --out elimination.csv

The last fifth of the training images of the digits is for validation; no test image is used. Rule: the largest weight
whose mean validation accuracy over objectives and seeds is at most one standard error of a proportion below that of
weight 0. The runs have no warm-up, which small digits do not need.
"""

import argparse
import csv
import sys
from dataclasses import replace
from itertools import product
from math import sqrt
from pathlib import Path
from statistics import mean

import torch

from audit.adversary.accuracy import measure_accuracy
from audit.adversary.label_attack import TIERS
from audit.adversary.threat import Linf
from audit.studies.recipes import GUESS_FIRST_RECIPES
from audit.studies.recipes.guess_first import EPS, GuessFirstRun, TrainingData, build_network, load_training_data
from audit.training.label_hypothesis import train_hypothesis

FIELDS = ("recipe", "weight", "seed", "epochs", "images", "natural", "adversarial")
WEIGHTS = {
    "guess-first/c-dv-ie": (0.0, 0.1, 1.0, 10.0),
    "guess-first/c-js-ie": (0.0, 0.1, 1.0, 10.0),
    "guess-first/vib": (0.0, 1e-3, 1e-2, 1e-1),
}


def row(name: str, weight: float, seed: int, epochs: int, data: TrainingData) -> dict[str, str]:
    """Return the natural accuracy of one network on validation images, and its accuracy under the smoke tier."""
    recipe = GUESS_FIRST_RECIPES[name]
    field = "kl_weight" if recipe.training.kl_weight else "elimination"
    training = replace(recipe.training, epochs=epochs, seed=seed, warm_up=0.0, **{field: weight})
    network, _ = build_network(recipe, data, seed)
    train_hypothesis(network, data.images, data.labels, training)
    network.requires_grad_(False)
    found = measure_accuracy(network, data.held_out_images, data.held_out_labels, Linf(EPS), TIERS["smoke"], seed=0)
    description = (name, str(weight), str(seed), str(epochs), str(len(data.held_out_images)))
    accuracies = (f"{found.natural.value:.4f}", f"{found.adversarial.value:.4f}")
    return dict(zip(FIELDS, (*description, *accuracies), strict=True))


def selected_weight(rows: list[dict[str, str]], group: str) -> float:
    """Return the weight that the rule selects for the recipes that end in `group`."""
    matching = [row for row in rows if row["recipe"].endswith(group)]
    natural = {
        weight: mean(float(row["natural"]) for row in matching if float(row["weight"]) == weight)
        for weight in {float(row["weight"]) for row in matching}
    }
    error = sqrt(natural[0.0] * (1 - natural[0.0]) / int(matching[0]["images"]))
    return max(weight for weight, value in natural.items() if value >= natural[0.0] - error)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Write a row for every recipe, weight and seed as it is measured, and report the selected weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file; existing rows are not measured again")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_training_data(GuessFirstRun())
    split = len(whole.images) * 4 // 5
    data = TrainingData(
        whole.images[:split], whole.labels[:split], whole.images[split:], whole.labels[split:], whole.classes
    )
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    finished = {(row["recipe"], row["weight"], row["seed"], row["epochs"]) for row in rows}
    for (name, weights), seed in product(WEIGHTS.items(), range(args.seeds)):
        for weight in weights:
            if (name, str(weight), str(seed), str(args.epochs)) not in finished:
                rows.append(row(name, weight, seed, args.epochs, data))
                write(args.out, rows)
    sys.stderr.write(f"elimination {selected_weight(rows, '-ie')}, divergence {selected_weight(rows, 'vib')}\n")


if __name__ == "__main__":
    main()
