"""The worst-case search beside best-response PGD: how many passes until the estimate stays near its own end?

Run from the repository root (see benchmarks/README.md):
    python benchmarks/convergence.py --data cifar10-test.parquet --checkpoints checkpoints --out convergence.csv

ResNet-20, logits, l-inf. Both have the same images, split, default dot-product critic, bound, learning rate, batch
size and network (its folded copy, which gives the same logits within 1e-4). A pass is one image once forward and once
backward; a forward pass alone counts as half of one.

`search` is the fixed schedule of `audit.information.critic_descent`: at every reading its images are frozen, a fresh critic is
fitted to them, and the smallest candidate is taken on validation images, as if the run had been stopped there. The
passes are those that such a run makes: finding the target, collapse, rounds and encodings, not those of readings
before. `best-response` does as the paper's authors do: before every critic step a fresh batch leaves from its clean
images in seven PGD steps of 2.5 eps / 7 down the critic's value and the iterate with the smallest value is kept; a
reading attacks the held-out images in the same way and takes the current critic's value. Its passes are those of
training alone. The gradient goes through both arguments of the critic in either.

`smoothed` is the median of `WINDOW` readings in a row, `converged` the mean of the last quarter of a curve's readings,
`drift` how far that is from the mean of the quarter before. `reached` marks the readings from the first one on at which
the smoothed curve is within `TOLERANCE` nats of `converged`, `within` those from which on it stays there. A curve that
the file has in whole is not computed again.
"""

import argparse
import csv
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from attacks import NETS, NETWORKS, third_party_parser
from torch import Tensor, nn

from audit.adversary.fused import faster
from audit.adversary.gradients import input_gradient
from audit.adversary.threat import Linf, ThreatModel
from audit.information.bounds import BOUNDS, infonce_terms
from audit.information.critic_descent import Adversary, WorstCaseSearch, estimate_vulnerability
from audit.information.critic_training import (
    CriticTraining,
    Splits,
    critic_optimiser,
    encode,
    encode_splits,
    fit_critic,
    split_images,
)  # fmt: skip
from audit.information.critics import build_critic
from audit.information.estimator import MIEstimate
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.types import Encoder, Features, Images
from model_zoo.images.load import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

TOLERANCE, WINDOW, STEPS = 0.05, 5, 7
METHODS = ("search", "best-response")
FIELDS = ("method", "eps", "seed", "images", "batch", "step", "passes", "nats", "smoothed", "converged", "drift",
          "reached", "within", "machine", "torch", "date")  # fmt: skip


class Case(NamedTuple):
    """What both methods are given."""

    encoder: Encoder
    images: Splits
    training: CriticTraining
    threat: Linf
    seed: int


class Reading(NamedTuple):
    """The estimate in nats after so many steps (collapse and rounds, or critic steps) and passes."""

    step: int
    passes: float
    nats: float


@dataclass(frozen=True)
class Watched(Linf):
    """The threat model, which notes where every image stands after every so many steps from its clean self."""

    every: int = 1
    always: tuple[int, ...] = ()
    steps: dict[bytes, int] = field(default_factory=dict)
    seen: dict[bytes, dict[int, Tensor]] = field(default_factory=dict)
    moves: list[int] = field(default_factory=list)

    walls, step_into = ThreatModel.walls, ThreatModel.step_into  # which come back to `step`

    def step(self, images: Images, gradient: Tensor, clean: Images, size: float) -> Images:
        """Return what the threat model does, and note it."""
        moved, starts = super().step(images, gradient, clean, size), torch.equal(images, clean)
        self.moves.append(len(images))
        for image, origin in zip(moved, clean, strict=True):
            key = origin.numpy().tobytes()
            if starts:  # what was noted before was a trial
                self.steps[key], self.seen[key] = 0, {}
            self.steps[key] += 1
            if self.steps[key] % self.every == 0 or self.steps[key] in self.always:
                self.seen[key][self.steps[key]] = image.clone()
        return moved

    def after(self, step: int, clean: Splits) -> Splits:
        """Return where all images stood after a step."""
        return clean.map(lambda part: torch.stack([self.seen[image.numpy().tobytes()][step] for image in part]))

    @property
    def trial(self) -> int:
        """How many passes were spent before the images left for good."""
        return sum(self.moves) - sum(self.steps.values())


def search(case: Case, settings: WorstCaseSearch, every: int) -> Iterator[Reading]:
    """Yield the readings of our search, which is run to its end first."""
    merging, total = settings.collapse_steps, sum(len(part) for part in case.images)
    watched = Watched(case.threat.eps, every=every, always=(merging, merging + settings.rounds))
    estimate_vulnerability(case.encoder, case.images, case.training, Adversary(watched, settings), case.seed)
    unmoved = fitted(case, case.images)
    yield Reading(0, watched.trial + 0.5 * total, unmoved.nats)
    merged = fitted(case, watched.after(merging, case.images))
    for step in sorted(next(iter(watched.seen.values()))):
        found = fitted(case, watched.after(step, case.images)) if step != merging else merged
        candidates = [unmoved, merged, found] if step > merging else [unmoved, found]
        worst = min(candidates, key=lambda candidate: candidate.validated)
        encodings = 0.5 * (len(candidates) + (step > merging))  # the search reads the merged images once more
        yield Reading(step, watched.trial + total * (step + encodings), worst.nats)


def fitted(case: Case, images: Splits) -> MIEstimate:
    """Return what a fresh critic says of images that are moved no more."""
    encoded = encode_splits(case.encoder, images, case.training.batch_size)
    return fit_critic(images, encoded, case.training, case.seed)[1]


@dataclass
class Descent:
    """A critic for whose every step a fresh batch is attacked; it can be put down in a file and taken up again."""

    case: Case
    steps: int = 0
    passes: float = 0.0
    readings: list[Reading] = field(default_factory=list)

    def __post_init__(self) -> None:
        train, training = self.case.images.train, self.case.training
        features = encode(self.case.encoder, train, training.batch_size).features
        self.critic = build_critic(train, features, training.shape, keyed_generator(self.case.seed, 1))
        self.optimiser, self.batches = critic_optimiser(self.critic, training), keyed_generator(self.case.seed, 2)
        self.passes = 0.5 * len(train)

    def step(self) -> None:
        """Attack a batch and take one critic step on it."""
        train, training = self.case.images.train, self.case.training
        chosen = torch.randperm(len(train), generator=self.batches)[: training.batch_size]
        moved = attacked(self.case, self.critic, train[chosen])
        value = BOUNDS[training.bound](self.critic.train()(*moved))
        self.optimiser.zero_grad()
        (-value).backward()
        self.optimiser.step()
        self.steps, self.passes = self.steps + 1, self.passes + (STEPS + 0.5) * len(chosen)

    def read(self) -> Reading:
        """Return what the critic says of held-out images that are attacked as its batches are."""
        with torch.no_grad():
            scores = self.critic.eval()(*attacked(self.case, self.critic, self.case.images.test))
        return Reading(self.steps, self.passes, float(infonce_terms(scores).mean()))


def best_response(case: Case, steps: int, every: int, state: Path) -> Iterator[Reading]:
    """Yield the readings of best-response PGD; the state is on disk after each, so that a killed run goes on."""
    descent = Descent(case)
    kept = ("critic", "optimiser", "batches", "steps", "passes", "readings")
    if state.exists():
        vars(descent).update(torch.load(state, weights_only=False))
        yield from descent.readings
    while descent.steps <= steps:
        if descent.steps % every == 0 and (not descent.readings or descent.readings[-1].step < descent.steps):
            descent.readings.append(descent.read())
            torch.save({name: getattr(descent, name) for name in kept}, state)
            yield descent.readings[-1]
        descent.step()


def attacked(case: Case, critic: nn.Module, clean: Images) -> tuple[Images, Features]:
    """Return a batch, moved from its clean images down the critic's value, with its features."""
    critic.eval()
    current, lowest, size = clean, float("inf"), 2.5 * case.threat.eps / STEPS
    best = (clean, clean)
    for step in range(STEPS + 1):
        leaf = current.detach().requires_grad_(step < STEPS)
        with torch.set_grad_enabled(step < STEPS):
            features = case.encoder(leaf).features
            value = BOUNDS[case.training.bound](critic(leaf, features))
        if float(value.detach()) < lowest:
            lowest, best = float(value.detach()), (current, features.detach())
        if step < STEPS:
            current = case.threat.step(current, input_gradient(value, leaf), clean, size)
    return best


def curve(readings: list[Reading]) -> list[dict[str, Any]]:
    """Return a whole curve's columns: smoothed, where it ends, and from where on it stays near its end."""
    half, quarter = WINDOW // 2, max(1, len(readings) // 4)
    nats = [reading.nats for reading in readings]
    smoothed = [median(nats[max(0, i - half) : i + half + 1]) for i in range(len(nats))]
    converged = fmean(nats[-quarter:])
    drift = converged - fmean(nats[-2 * quarter : -quarter])
    near = [abs(value - converged) <= TOLERANCE for value in smoothed]
    first = near.index(True) if any(near) else len(near)
    stays = len(near) - next((i for i, inside in enumerate(reversed(near)) if not inside), len(near))
    return [
        {"step": reading.step, "passes": f"{reading.passes:.0f}", "nats": f"{reading.nats:.4f}",
         "smoothed": f"{smoothed[i]:.4f}", "converged": f"{converged:.4f}", "drift": f"{drift:.4f}",
         "reached": i >= first, "within": i >= stays}
        for i, reading in enumerate(readings)
    ]  # fmt: skip


def known(path: Path) -> set[tuple[str, str, str]]:
    """Return which curves a file already has."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["method"], row["eps"], row["seed"]) for row in csv.DictReader(file)}


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = third_party_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--eps", type=float, nargs="+", default=[1.0], help="grey levels of 255")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=128, help="of critic and attack alike; the authors' is 128")
    parser.add_argument("--rounds", type=int, default=WorstCaseSearch.rounds)
    parser.add_argument("--critic-steps", type=int, default=330, help="of best-response PGD")
    parser.add_argument("--every", type=int, default=2, help="rounds between readings; five times as many critic steps")
    return parser.parse_args()


def main() -> None:
    """Append curve after curve, each when it is whole."""
    chosen = options()
    torch.set_num_threads(1)
    data = load_images(f"parquet:{chosen.data}", ImageRequest(count=chosen.images))
    ref = f"file:{chosen.checkpoints}/{NETWORKS['resnet20'].format(nets=NETS)}&num_classes=10"
    network = faster(load_model(ref, SourceSettings(trust_code=True, offline=True)).network, data.images)
    encoder, training = Representation(network, "logits").encode, CriticTraining(batch_size=chosen.batch_size)
    new, there = not chosen.out.exists(), known(chosen.out)
    for eps, seed, method in product(chosen.eps, chosen.seeds, chosen.methods):
        name = f"search-{chosen.rounds}" if method == "search" else method
        if (name, f"{eps:g}/255", str(seed)) in there:
            continue
        state = chosen.out.with_suffix(f".{method}-{eps:g}-{seed}.part")
        case = Case(encoder, split_images(data.images, seed), training, Linf(eps / 255), seed)
        taken = (
            search(case, WorstCaseSearch(rounds=chosen.rounds, tolerance=0.0), chosen.every)
            if method == "search"
            else best_response(case, chosen.critic_steps, 5 * chosen.every, state)
        )
        readings = []
        for reading in taken:
            readings.append(reading)
            sys.stderr.write(f"{name} {eps:g}/255 seed {seed}: {reading}\n")
        shared = {
            "method": name, "eps": f"{eps:g}/255", "seed": seed, "images": chosen.images, "batch": chosen.batch_size,
            "machine": platform.machine(), "torch": torch.__version__, "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }  # fmt: skip
        with chosen.out.open("a", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                table.writeheader()
            table.writerows(shared | row for row in curve(readings))
        state.unlink(missing_ok=True)
        new = False


if __name__ == "__main__":
    main()
