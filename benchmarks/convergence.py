"""Compare the convergence of the worst-case search with best-response PGD: estimate against passes.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/convergence.py --data cifar10-test.parquet --checkpoints checkpoints --out convergence.csv

ResNet-20, logits, l-inf. Both methods use the same images, split, default dot-product critic, bound, learning rate,
batch size and network (its folded copy, whose logits agree within 1e-4). A pass is one image forward and backward;
a forward pass alone counts as half.

`search` is that of `audit.information.critic_search`, until a cycle brings no more than a standard error. At every
evaluation its images are frozen, a new critic is fitted to them, and the smallest candidate on validation images is
taken, as if the run had stopped there. The passes are those of such a run: the choice of the target, collapse, mixing,
rounds and encodings, without earlier evaluations.

`best-response` follows the paper's authors: before every critic step, a new batch is moved
from its clean images by seven PGD steps of 2.5 eps / 7 down the value of the critic, and the iterate of smallest
value is kept; an evaluation attacks the held-out images in the same way and takes the value of the current critic.
Its passes are those of training alone. In both methods the gradient passes through both arguments of the critic.

`smoothed` is the median of `WINDOW` consecutive evaluations, `converged` the mean of the last quarter of a curve,
`drift` its difference from the mean of the preceding quarter. `reached` marks the evaluations from the first one on
whose smoothed value is within `TOLERANCE` nats of `converged`, `within` those after which it stays there. Complete
curves in the file are not computed again.
"""

import argparse
import csv
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch
from attacks import NETS, NETWORKS, third_party_parser
from convergence_curve import Evaluation, curve
from torch import Tensor, nn

from audit.adversary.fused import fused_copy
from audit.adversary.passes import input_gradient
from audit.adversary.threat import Linf, ThreatModel
from audit.information.bounds import BOUNDS, infonce_terms
from audit.information.critic_search.descent import estimate_vulnerability
from audit.information.critic_search.merging import Adversary
from audit.information.critic_training import critic_optimiser, fit_critic
from audit.information.critics import build_critic
from audit.information.encoding import Splits, encode, encode_splits, split_images
from audit.information.estimator import MIEstimate
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.types import Encoder, Features, Images
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

STEPS = 7
METHODS = ("search", "best-response")
FIELDS = (
    "method",
    "eps",
    "seed",
    "images",
    "batch",
    "step",
    "passes",
    "nats",
    "smoothed",
    "converged",
    "drift",
    "reached",
    "within",
    "machine",
    "torch",
    "date",
)


class Case(NamedTuple):
    """The inputs of both methods."""

    encoder: Encoder
    images: Splits
    training: CriticTraining
    threat: Linf
    seed: int


@dataclass(frozen=True)
class RecordingThreat(Linf):
    """A threat model that records every image after every `every` steps from its clean start."""

    every: int = 1
    always: tuple[int, ...] = ()
    steps: dict[bytes, int] = field(default_factory=dict)
    recorded: dict[bytes, dict[int, Tensor]] = field(default_factory=dict)
    moves: list[int] = field(default_factory=list)

    step_bounds, step_into = ThreatModel.step_bounds, ThreatModel.step_into  # both call `step`

    def step(self, images: Images, gradient: Tensor, clean: Images, size: float) -> Images:
        """Return and record the step of the threat model."""
        moved, starts = super().step(images, gradient, clean, size), torch.equal(images, clean)
        self.moves.append(len(images))
        for image, origin in zip(moved, clean, strict=True):
            key = origin.numpy().tobytes()
            if starts:  # earlier records were trials
                self.steps[key], self.recorded[key] = 0, {}
            self.steps[key] += 1
            if self.steps[key] % self.every == 0 or self.steps[key] in self.always:
                self.recorded[key][self.steps[key]] = image.clone()
        return moved

    def after(self, step: int, clean: Splits) -> Splits:
        """Return all images after a step."""
        return clean.map(lambda part: torch.stack([self.recorded[image.numpy().tobytes()][step] for image in part]))

    @property
    def trial(self) -> int:
        """The number of passes before the final start of every image."""
        return sum(self.moves) - sum(self.steps.values())


def search(case: Case, settings: WorstCaseSearch, every: int) -> Iterator[Evaluation]:
    """Yield the evaluations of the worst-case search, which first runs to its end."""
    merging, total = settings.collapse_steps, sum(len(part) for part in case.images)
    start = merging + settings.mixing_steps
    recording = RecordingThreat(case.threat.eps, every=every, always=(merging, start + settings.rounds))
    estimate_vulnerability(case.encoder, case.images, case.training, Adversary(recording, settings), case.seed)
    clean = fitted(case, case.images)
    yield Evaluation(0, recording.trial + 0.5 * total, clean.nats)
    merged = fitted(case, recording.after(merging, case.images))
    for step in sorted(next(iter(recording.recorded.values()))):
        found = fitted(case, recording.after(step, case.images)) if step != merging else merged
        candidates = [clean, merged, found] if step > merging else [clean, found]
        worst = min(candidates, key=lambda candidate: candidate.validated)
        blocks = ceil(max(0, step - start) / settings.every)  # each begins with an encoding of the moved images
        encodings = 0.5 * (len(candidates) + (step > merging) + (step > start) + blocks)
        yield Evaluation(step, recording.trial + total * (step + encodings), worst.nats)


def fitted(case: Case, images: Splits) -> MIEstimate:
    """Return the estimate of a new critic on fixed images."""
    encoded = encode_splits(case.encoder, images, case.training.batch_size)
    return fit_critic(images, encoded, case.training, case.seed)[1]


@dataclass
class BestResponse:
    """A critic trained on a newly attacked batch at every step; its state can be stored and resumed."""

    case: Case
    steps: int = 0
    passes: float = 0.0
    evaluations: list[Evaluation] = field(default_factory=list)

    def __post_init__(self) -> None:
        train, training = self.case.images.train, self.case.training
        features = encode(self.case.encoder, train, training.batch_size).features
        self.critic = build_critic(train, features, training.shape, keyed_generator(self.case.seed, 1))
        self.optimiser, self.batches = critic_optimiser(self.critic, training), keyed_generator(self.case.seed, 2)
        self.passes = 0.5 * len(train)

    def step(self) -> None:
        """Attack a batch and run one critic step on it."""
        train, training = self.case.images.train, self.case.training
        chosen = torch.randperm(len(train), generator=self.batches)[: training.batch_size]
        moved = attacked(self.case, self.critic, train[chosen])
        value = BOUNDS[training.bound](self.critic.train()(*moved))
        self.optimiser.zero_grad()
        (-value).backward()
        self.optimiser.step()
        self.steps, self.passes = self.steps + 1, self.passes + (STEPS + 0.5) * len(chosen)

    def evaluate(self) -> Evaluation:
        """Return the value of the critic on held-out images attacked like its batches."""
        with torch.no_grad():
            scores = self.critic.eval()(*attacked(self.case, self.critic, self.case.images.test))
        return Evaluation(self.steps, self.passes, float(infonce_terms(scores).mean()))


def best_response(case: Case, steps: int, every: int, state: Path) -> Iterator[Evaluation]:
    """Yield the evaluations of best-response PGD; the state is stored after each, so that a run can resume."""
    response = BestResponse(case)
    kept = ("critic", "optimiser", "batches", "steps", "passes", "evaluations")
    if state.exists():
        vars(response).update(torch.load(state, weights_only=False))
        yield from response.evaluations
    while response.steps <= steps:
        if response.steps % every == 0 and (not response.evaluations or response.evaluations[-1].step < response.steps):
            response.evaluations.append(response.evaluate())
            torch.save({name: getattr(response, name) for name in kept}, state)
            yield response.evaluations[-1]
        response.step()


def attacked(case: Case, critic: nn.Module, clean: Images) -> tuple[Images, Features]:
    """Return a batch moved from its clean images down the value of the critic, with its features."""
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


def known(path: Path) -> set[tuple[str, str, str]]:
    """Return the keys of the curves in a file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["method"], row["eps"], row["seed"]) for row in csv.DictReader(file)}


def options() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = third_party_parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--eps", type=float, nargs="+", default=[1.0], help="grey levels of 255")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-size", type=int, default=128, help="of critic and attack alike; the authors' is 128")
    parser.add_argument("--rounds", type=int, default=WorstCaseSearch.rounds)
    parser.add_argument("--critic-steps", type=int, default=330, help="of best-response PGD")
    parser.add_argument("--every", type=int, default=5, help="rounds between evaluations; 5 times as many critic steps")
    return parser.parse_args()


def main() -> None:
    """Append every curve when it is complete."""
    args = options()
    torch.set_num_threads(1)
    data = load_images(f"parquet:{args.data}", ImageRequest(count=args.images))
    ref = f"file:{args.checkpoints}/{NETWORKS['resnet20'].format(nets=NETS)}&num_classes=10"
    network = fused_copy(load_model(ref, SourceSettings(trust_code=True, offline=True)).network, data.images)
    encoder, training = Representation(network, "logits").encode, CriticTraining(batch_size=args.batch_size)
    new, there = not args.out.exists(), known(args.out)
    for eps, seed, method in product(args.eps, args.seeds, args.methods):
        name = f"search-{args.rounds}" if method == "search" else method
        if (name, f"{eps:g}/255", str(seed)) in there:
            continue
        state = args.out.with_suffix(f".{method}-{eps:g}-{seed}.part")
        case = Case(encoder, split_images(data.images, seed), training, Linf(eps / 255), seed)
        evaluated = (
            search(case, WorstCaseSearch(rounds=args.rounds, gain=0.0, tolerance=0.0), args.every)
            if method == "search"
            else best_response(case, args.critic_steps, 5 * args.every, state)
        )
        evaluations = []
        for evaluation in evaluated:
            evaluations.append(evaluation)
            sys.stderr.write(f"{name} {eps:g}/255 seed {seed}: {evaluation}\n")
        shared = {
            "method": name,
            "eps": f"{eps:g}/255",
            "seed": seed,
            "images": args.images,
            "batch": args.batch_size,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
        }
        with args.out.open("a", newline="") as file:
            table = csv.DictWriter(file, FIELDS, lineterminator="\n")
            if new:
                table.writeheader()
            table.writerows(shared | row for row in curve(evaluations))
        state.unlink(missing_ok=True)
        new = False


if __name__ == "__main__":
    main()
