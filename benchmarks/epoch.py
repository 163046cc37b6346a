"""Measure the overhead of a worst-case search relative to its passes and critic steps.

Run from the repository root (see benchmarks/README.md):
    OMP_NUM_THREADS=1 python benchmarks/epoch.py --data cifar10-test.parquet --checkpoints checkpoints --out epoch.csv

Three parts of the two searches on logits are timed: a collapse step and a round of
`audit.information.critic_search` (one pass per image, then critic steps on the features found), and a mean-shift
step of `audit.information.sandwich`. Each moves all images once. Ours and the floor alternate in one process on one
thread, so that load on the machine affects both equally: batch by batch within one search, between any two
gradients. Existing rows are not measured again. Seconds are CPU time, medians over the repetitions, the first of
which is a warm-up; `ratio` is the median of the ratios.

The floor, for batches of the same sizes: `torch.autograd.grad(network(x).sum(), x)` of the network as loaded
(`pass_seconds`). `critic_seconds` are, for a round, the gradient of the bound to images and features through the
critic, and the same number of critic steps (forward, backward, optimiser); for mean shift, one call of `mean_shift`
on the features, with two tables of distances. A collapse step consists of passes only. Not in the floor: the
projected step, drawing of random batches, updates of the common output, the softmax of the outputs, and checks for
finite values.
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
from audit.information.critic_search.descent import estimate_vulnerability
from audit.information.critic_search.merging import Adversary
from audit.information.critic_training import critic_optimiser
from audit.information.critics import build_critic
from audit.information.encoding import Splits, encode, split_images
from audit.information.estimator import Origin, WarmStart
from audit.information.feature_merging import Candidate, FeatureDescent
from audit.information.gaussian_mixture import mean_shift
from audit.information.sandwich import Sandwich
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.types import Encoded, Encoder, Features, Images
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

STEPS_PER_CALL = 2  # consecutive mean-shift steps per call, which starts with a copy of the images
FIELDS = (
    "network",
    "part",
    "images",
    "batch",
    "passes",
    "critic_steps",
    "turns",
    "cpu_seconds",
    "pass_seconds",
    "critic_seconds",
    "ratio",
    "machine",
    "torch",
    "date",
)


class Timing(NamedTuple):
    """CPU seconds of the search, and of both parts of the floor."""

    ours: float
    passes: float
    critic: float


class Floor:
    """The passes and critic steps alone, with a separate critic."""

    def __init__(self, network: nn.Module, images: Images, features: Features, batch: int) -> None:
        self.network, self.images, self.features, self.batch = network, images, features, batch
        training = CriticTraining(batch_size=batch)
        self.bound = BOUNDS[training.bound]
        self.critic = build_critic(images, features, training.shape, keyed_generator(0))
        self.optimiser = critic_optimiser(self.critic, training)

    def passes(self, size: int) -> None:
        """Run the passes of one batch."""
        leaf = self.images[:size].clone().requires_grad_()
        torch.autograd.grad(self.network(leaf).sum(), leaf)

    def critic_gradients(self, size: int) -> None:
        """Compute the gradient of the bound to images and features of one batch, through the critic alone."""
        self.critic.eval()
        leaves = self.images[:size].clone().requires_grad_(), self.features[:size].clone().requires_grad_()
        torch.autograd.grad(self.bound(self.critic(*leaves)), leaves)

    def steps(self, count: int) -> None:
        """Run `count` critic steps."""
        self.critic.train()
        for _ in range(count):
            value = self.bound(self.critic(self.images[: self.batch], self.features[: self.batch]))
            self.optimiser.zero_grad()
            (-value).backward()
            self.optimiser.step()


class TimedEncoder:
    """An encoder that pauses the clock at every call with gradients and runs the floor finished.

    A lap is the time between two such calls, so it includes all use of the output.
    """

    def __init__(self, encoder: Encoder, floor: Floor, sizes: Splits, critic_steps: int) -> None:
        self.encoder, self.floor, self.sizes, self.critic_steps = encoder, floor, sizes, critic_steps
        self.laps: list[tuple[int, Timing]] = []
        self.started = 0.0
        self.open: tuple[int, float, float] | None = None

    def __call__(self, images: Images) -> Encoded:
        """Return the output of the encoder."""
        if images.requires_grad:
            self._lap(len(images))
        return self.encoder(images)

    def _lap(self, size: int) -> None:
        now = time.process_time()
        if self.open is not None:
            done, bare, critic = self.open
            self.laps.append((done, Timing(now - self.started, bare, critic)))
        bare = seconds(lambda: self.floor.passes(size))
        steps = self.critic_steps if size == self.sizes[0] else 0
        critic = seconds(lambda: self.floor.critic_gradients(size)) + seconds(lambda: self.floor.steps(steps))
        self.open = size, bare, critic
        self.started = time.process_time()

    def turns(self, first: int, count: int) -> list[Timing]:
        """Return `count` sums of laps over one batch of each size, starting with lap `first`."""
        by_size = [[turn for size, turn in self.laps if size == wanted][first : first + count] for wanted in self.sizes]
        return [Timing(*map(sum, zip(*batches, strict=True))) for batches in zip(*by_size, strict=True)]


def worst_case_search(network: nn.Module, images: Images, args: argparse.Namespace) -> dict[str, list[Timing]]:
    """Return timings of collapse steps and rounds of one search, without the first and last of each."""
    training, parts = CriticTraining(steps=1), split_images(images, 0)
    turns = args.turns + 2
    # one cycle is a quarter of all rounds: one critic, whose rounds follow each other
    search = WorstCaseSearch(collapse_steps=turns, mixing_steps=1, rounds=4 * turns, every=turns, gain=100.0)
    encoder = Representation(network, "logits").encode
    features = encode(encoder, images, training.batch_size).features
    floor = Floor(network, images, features, min(training.batch_size, len(parts.train)))
    timed = TimedEncoder(encoder, floor, Splits(*map(len, parts)), search.critic_steps)
    warm_start = WarmStart(origin=Origin("merged into", 0))  # an arbitrary target, which skips the trial of several
    estimate_vulnerability(timed, parts, training, Adversary(Linf(args.eps / 255), search), 0, warm_start)
    collapse = timed.turns(1, args.turns)
    rounds = timed.turns(search.collapse_steps + search.mixing_steps + 1, args.turns)
    return {"collapse-step": [turn._replace(critic=0.0) for turn in collapse], "search-round": rounds}


def mean_shift_steps(network: nn.Module, images: Images, args: argparse.Namespace) -> dict[str, list[Timing]]:
    """Return timings of single mean-shift steps from the clean images."""
    settings, draws, encoder = Sandwich(), keyed_generator(0), Representation(network, "logits").encode
    features = encode(encoder, images, settings.batch_size).features
    smoothing = settings.smoothing(features)
    scaled = smoothing.of(features)
    descent = FeatureDescent(encoder, images, Linf(args.eps / 255), settings.relative_step, settings.batch_size)
    floor, sizes = Floor(network, images, features, settings.batch_size), _sizes(len(images), settings.batch_size)
    start = Candidate(images, features)

    def feature_gradient(found: Features) -> Features:
        return mean_shift(smoothing.of(found), draws, 1)

    turns = [
        Timing(
            seconds(lambda: descent.run(feature_gradient, start, STEPS_PER_CALL)) / STEPS_PER_CALL,
            seconds(lambda: [floor.passes(size) for size in sizes]),
            seconds(lambda: mean_shift(scaled, draws, 1)),
        )
        for _ in range(args.turns + 1)
    ]
    return {"mean-shift-step": turns[1:]}


def _sizes(count: int, batch: int) -> list[int]:
    return [len(part) for part in torch.arange(count).split(batch)]


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


MEASURES = {"search-round": worst_case_search, "mean-shift-step": mean_shift_steps}


def row(name: str, part: str, turns: list[Timing], images: int) -> dict[str, Any]:
    """Return the row of one part: medians over the repetitions."""
    ratio = median(turn.ours / (turn.passes + turn.critic) for turn in turns)
    sys.stderr.write(f"{name} {part}: {ratio:.3f}\n")
    medians = [f"{median(each):.4f}" for each in zip(*turns, strict=True)]
    return {
        "network": name,
        "part": part,
        "images": images,
        "batch": CriticTraining.batch_size,
        "passes": images,
        "critic_steps": WorstCaseSearch.critic_steps if part == "search-round" else 0,
        "turns": len(turns),
        **dict(zip(FIELDS[7:10], medians, strict=True)),
        "ratio": f"{ratio:.3f}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def options() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = third_party_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=512, help="number of images, such that each part is one batch")
    parser.add_argument("--eps", type=float, default=1.0, help="grey levels of 255")
    parser.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


def known(path: Path) -> set[tuple[str, str]]:
    """Return the keys of the rows in a file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["network"], row["part"]) for row in csv.DictReader(file)}


def main() -> None:
    """Append the missing rows as they are measured."""
    args = options()
    torch.set_num_threads(1)
    data = load_images(f"parquet:{args.data}", ImageRequest(count=args.images))
    new, finished = not args.out.exists(), known(args.out)
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            table.writeheader()
        for name, (part, measure) in product(args.networks, MEASURES.items()):
            if (name, part) in finished:
                continue
            ref = f"file:{args.checkpoints}/{NETWORKS[name].format(nets=NETS)}&num_classes=10"
            network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
            turns = measure(network, data.images, args)
            table.writerows(row(name, part, each, len(data.images)) for part, each in turns.items())
            file.flush()


if __name__ == "__main__":
    main()
