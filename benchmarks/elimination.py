"""How much information elimination, and how much of the bottleneck's divergence? Chosen on training digits alone.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/elimination.py --out elimination.csv

The training images of the embedded digits are cut, the last fifth is for validation; no test image is looked at. The
rule: the largest weight whose accuracy on validation images, averaged over objectives and seeds, is no more than one
standard error of a proportion below that of weight 0. These runs have no warm-up: on the small digits none is needed.
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
from audit.studies.recipes import GUESS_FIRST
from audit.studies.recipes.guess_first import EPS, GuessFirstRun, TrainingData, fresh_network, load_training_data
from audit.training.label_hypothesis import train_hypothesis

FIELDS = ("recipe", "weight", "seed", "epochs", "images", "natural", "adversarial")
WEIGHTS = {
    "guess-first/c-dv-ie": (0.0, 0.1, 1.0, 10.0),
    "guess-first/c-js-ie": (0.0, 0.1, 1.0, 10.0),
    "guess-first/vib": (0.0, 1e-3, 1e-2, 1e-1),
}


def row(name: str, weight: float, seed: int, epochs: int, data: TrainingData) -> dict[str, str]:
    """Return one network's accuracy on the validation images, natural and under the smoke tier's attack."""
    recipe = GUESS_FIRST[name]
    weighed = "kl_weight" if recipe.training.kl_weight else "elimination"
    training = replace(recipe.training, epochs=epochs, seed=seed, warm_up=0.0, **{weighed: weight})
    network, _ = fresh_network(recipe, data, seed)
    train_hypothesis(network, data.images, data.labels, training)
    network.requires_grad_(False)
    found = measure_accuracy(network, data.held_out_images, data.held_out_labels, Linf(EPS), TIERS["smoke"], seed=0)
    figures = (name, str(weight), str(seed), str(epochs), str(len(data.held_out_images)))
    accuracies = (f"{found.natural.value:.4f}", f"{found.adversarial.value:.4f}")
    return dict(zip(FIELDS, (*figures, *accuracies), strict=True))


def chosen(rows: list[dict[str, str]], group: str) -> float:
    """Return the largest weight of the recipes that end in `group` whose natural accuracy holds, by the rule."""
    own = [row for row in rows if row["recipe"].endswith(group)]
    natural = {
        weight: mean(float(row["natural"]) for row in own if float(row["weight"]) == weight)
        for weight in {float(row["weight"]) for row in own}
    }
    error = sqrt(natural[0.0] * (1 - natural[0.0]) / int(own[0]["images"]))
    return max(weight for weight, value in natural.items() if value >= natural[0.0] - error)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Write all rows there are; what is written is not measured again."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Write a row for every recipe, weight and seed, as it comes, and say what the rule chooses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="A CSV file; a run that was stopped goes on in it.")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    words = parser.parse_args()
    torch.set_num_threads(1)
    whole = load_training_data(GuessFirstRun())
    cut = len(whole.images) * 4 // 5
    data = TrainingData(whole.images[:cut], whole.labels[:cut], whole.images[cut:], whole.labels[cut:], whole.classes)
    rows = list(csv.DictReader(words.out.open())) if words.out.exists() else []
    known = {(row["recipe"], row["weight"], row["seed"], row["epochs"]) for row in rows}
    for (name, weights), seed in product(WEIGHTS.items(), range(words.seeds)):
        for weight in weights:
            if (name, str(weight), str(seed), str(words.epochs)) not in known:
                rows.append(row(name, weight, seed, words.epochs, data))
                write(words.out, rows)
    sys.stderr.write(f"elimination {chosen(rows, '-ie')}, divergence {chosen(rows, 'vib')}\n")


if __name__ == "__main__":
    main()
