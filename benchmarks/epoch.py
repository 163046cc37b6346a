"""A worst-case epoch beside the passes and critic steps it is made of: what does the search itself cost?

Run from the repository root (see benchmarks/README.md):
    OMP_NUM_THREADS=1 python benchmarks/epoch.py --data cifar10-test.parquet --checkpoints checkpoints --out epoch.csv

Three parts of the two searches, on logits: a collapse step and a round of `audit.information.critic_descent` (one moved pass an
image, then the critic's steps on the features met), and a step of mean shift as `audit.information.sandwich` takes it. All images
are moved once in each. Ours and the floor take turns in one process on one thread, so that a busy machine slows both
alike: batch by batch within one search, between any two gradients. Rows that the file has are not measured again.
Seconds are CPU time, medians over the turns, the
first of which is a warm-up; `ratio` is the median of the turns' ratios.

The floor, for batches of the same sizes: `torch.autograd.grad(network(x).sum(), x)` of the network as it was loaded
(`pass_seconds`), and in `critic_seconds` for a round the bound's gradient to images and features, forward and backward
through the critic alone, and as many bare critic steps (forward, backward, optimiser); for mean shift one call of
`mean_shift` on the features, which has two tables of distances. A collapse step needs nothing but passes. Not in the
floor: the projected step, the random batches, keeping the common answer, the softmax of the answers, and every check
that a value is finite.
"""

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from attacks import NETS, NETWORKS, third_party_parser
from torch import nn

from audit.adversary.threat import Linf
from audit.information.bounds import BOUNDS
from audit.information.critic_descent import Adversary, WorstCaseSearch, estimate_vulnerability
from audit.information.critic_training import CriticTraining, Splits, critic_optimiser, encode, split_images
from audit.information.critics import build_critic
from audit.information.estimator import Known
from audit.information.feature_merging import Moved, Mover
from audit.information.gaussian_mixture import mean_shift
from audit.information.sandwich import Sandwich
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.types import Encoded, Encoder, Features, Images
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

IN_A_ROW = 2  # steps of mean shift, which begin with a copy of the images
FIELDS = ("network", "part", "images", "batch", "passes", "critic_steps", "turns", "cpu_seconds", "pass_seconds",
          "critic_seconds", "ratio", "machine", "torch", "date")  # fmt: skip


class Turn(NamedTuple):
    """CPU seconds of ours, and of the floor's two parts."""

    ours: float
    passes: float
    critic: float


class Floor:
    """The bare passes and critic steps; the critic is one that nobody else trains."""

    def __init__(self, network: nn.Module, images: Images, features: Features, batch: int) -> None:
        self.network, self.images, self.features, self.batch = network, images, features, batch
        training = CriticTraining(batch_size=batch)
        self.bound = BOUNDS[training.bound]
        self.critic = build_critic(images, features, training.shape, keyed_generator(0))
        self.optimiser = critic_optimiser(self.critic, training)

    def passes(self, size: int) -> None:
        """Take the bare passes of one batch."""
        leaf = self.images[:size].clone().requires_grad_()
        torch.autograd.grad(self.network(leaf).sum(), leaf)

    def looks(self, size: int) -> None:
        """Take the bound's gradient to images and features of one batch, through the critic alone."""
        self.critic.eval()
        leaves = self.images[:size].clone().requires_grad_(), self.features[:size].clone().requires_grad_()
        torch.autograd.grad(self.bound(self.critic(*leaves)), leaves)

    def steps(self, count: int) -> None:
        """Take so many critic steps."""
        self.critic.train()
        for _ in range(count):
            value = self.bound(self.critic(self.images[: self.batch], self.features[: self.batch]))
            self.optimiser.zero_grad()
            (-value).backward()
            self.optimiser.step()


class Clocked:
    """An encoder that stops the clock at every gradient it is asked for, and takes the floor's turn there.

    A lap is from one such call to the next, so it holds all that is done with the answer.
    """

    def __init__(self, encoder: Encoder, floor: Floor, sizes: Splits, critic_steps: int) -> None:
        self.encoder, self.floor, self.sizes, self.critic_steps = encoder, floor, sizes, critic_steps
        self.laps: list[tuple[int, Turn]] = []
        self.started = 0.0
        self.open: tuple[int, float, float] | None = None

    def __call__(self, images: Images) -> Encoded:
        """Return what the encoder says."""
        if images.requires_grad:
            self._lap(len(images))
        return self.encoder(images)

    def _lap(self, size: int) -> None:
        now = time.process_time()
        if self.open is not None:
            done, bare, critic = self.open
            self.laps.append((done, Turn(now - self.started, bare, critic)))
        bare = seconds(lambda: self.floor.passes(size))
        steps = self.critic_steps if size == self.sizes[0] else 0
        critic = seconds(lambda: self.floor.looks(size)) + seconds(lambda: self.floor.steps(steps))
        self.open = size, bare, critic
        self.started = time.process_time()

    def turns(self, first: int, count: int) -> list[Turn]:
        """Return sums over one batch of each size: the laps of each from the `first` on, `count` of them."""
        by_size = [[turn for size, turn in self.laps if size == wanted][first : first + count] for wanted in self.sizes]
        return [Turn(*map(sum, zip(*batches, strict=True))) for batches in zip(*by_size, strict=True)]


def worst_case_search(network: nn.Module, images: Images, chosen: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return the turns of collapse steps and of rounds, all from one search; the ends of both are left out."""
    training, parts = CriticTraining(steps=1), split_images(images, 0)
    search = WorstCaseSearch(collapse_steps=chosen.turns + 2, rounds=chosen.turns + 2)
    encoder = Representation(network, "logits").encode
    features = encode(encoder, images, training.batch_size).features
    floor = Floor(network, images, features, min(training.batch_size, len(parts.train)))
    clocked = Clocked(encoder, floor, Splits(*map(len, parts)), search.critic_steps)
    known = Known(served="merged into 0")  # any answer will do, and no trial of several comes first
    estimate_vulnerability(clocked, parts, training, Adversary(Linf(chosen.eps / 255), search), 0, known)
    collapse = clocked.turns(1, chosen.turns)
    rounds = clocked.turns(search.collapse_steps + 1, chosen.turns)
    return {"collapse-step": [turn._replace(critic=0.0) for turn in collapse], "search-round": rounds}


def mean_shift_steps(network: nn.Module, images: Images, chosen: argparse.Namespace) -> dict[str, list[Turn]]:
    """Return the turns of single steps of mean shift from the clean images."""
    settings, draws, encoder = Sandwich(), keyed_generator(0), Representation(network, "logits").encode
    features = encode(encoder, images, settings.batch_size).features
    scaled = (features - features.mean(0)) / settings.scale(features)
    mover = Mover(encoder, images, Linf(chosen.eps / 255), settings.relative_step, settings.batch_size)
    floor, sizes = Floor(network, images, features, settings.batch_size), _sizes(len(images), settings.batch_size)
    deviation, start = settings.scale(features), Moved(images, features)

    def pull(found: Features) -> Features:
        return mean_shift((found - found.mean(0)) / deviation, draws, 1)

    turns = [
        Turn(
            seconds(lambda: mover.along(pull, start, IN_A_ROW)) / IN_A_ROW,
            seconds(lambda: [floor.passes(size) for size in sizes]),
            seconds(lambda: mean_shift(scaled, draws, 1)),
        )
        for _ in range(chosen.turns + 1)
    ]
    return {"mean-shift-step": turns[1:]}


def _sizes(count: int, batch: int) -> list[int]:
    return [len(part) for part in torch.arange(count).split(batch)]


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


MEASURES = {"search-round": worst_case_search, "mean-shift-step": mean_shift_steps}


def row(name: str, part: str, turns: list[Turn], images: int) -> dict[str, Any]:
    """Return one part's medians."""
    ratio = median(turn.ours / (turn.passes + turn.critic) for turn in turns)
    sys.stderr.write(f"{name} {part}: {ratio:.3f}\n")
    medians = [f"{median(each):.4f}" for each in zip(*turns, strict=True)]
    return {
        "network": name, "part": part, "images": images, "batch": CriticTraining.batch_size, "passes": images,
        "critic_steps": WorstCaseSearch.critic_steps if part == "search-round" else 0, "turns": len(turns),
        **dict(zip(FIELDS[7:10], medians, strict=True)), "ratio": f"{ratio:.3f}", "machine": platform.machine(),
        "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }  # fmt: skip


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = third_party_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=512, help="so many that each part is one batch")
    parser.add_argument("--eps", type=float, default=1.0, help="grey levels of 255")
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


def known(path: Path) -> set[tuple[str, str]]:
    """Return which rows a file already has."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["network"], row["part"]) for row in csv.DictReader(file)}


def main() -> None:
    """Append the rows that are not there yet, as they come."""
    chosen = options()
    torch.set_num_threads(1)
    data = load_images(f"parquet:{chosen.data}", ImageRequest(count=chosen.images))
    new, there = not chosen.out.exists(), known(chosen.out)
    with chosen.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            table.writeheader()
        for name, (part, measure) in product(chosen.networks, MEASURES.items()):
            if (name, part) in there:
                continue
            ref = f"file:{chosen.checkpoints}/{NETWORKS[name].format(nets=NETS)}&num_classes=10"
            network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
            turns = measure(network, data.images, chosen)
            table.writerows(row(name, part, each, len(data.images)) for part, each in turns.items())
            file.flush()


if __name__ == "__main__":
    main()
