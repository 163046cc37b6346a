"""Measure the overhead of a worst-case training step relative to its passes.

Run from the repository root:
    python benchmarks/learning.py --out learning.csv

Steps of `train_representation` on one batch alternate with the floor, in one process on one thread, so that load on
the machine affects both equally. Seconds are CPU time of the process. The floor is the minimal cost of a step: one
pass of encoder and critic to the images per search step, and one forward and backward pass of both to the weights
with the optimiser step. `in_passes` is the step in units of one forward and backward pass of the encoder; the
authors' code takes 27 for ResNet-20 with a critic of width 2048 (without training the encoder). Weights and images
are random, because the cost does not depend on them.
"""

import argparse
import copy
import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from audit.training.mutual_information import MITraining, set_training_mode, train_representation
from audit.training.objectives import ObjectiveSettings, VariationalObjective
from audit.types import Images
from model_zoo.architectures.paper_encoder import PaperEncoder

NETS = Path(__file__).resolve().parents[1] / "tests" / "third_party_nets.py"
FIELDS = (
    "encoder",
    "critic",
    "width",
    "image_branch",
    "batch",
    "search_steps",
    "steps_timed",
    "step_seconds",
    "floor_seconds",
    "ratio",
    "pass_seconds",
    "in_passes",
)


class Case(NamedTuple):
    """An encoder by name, the width of its critic, and the treatment of the image branch."""

    encoder: str
    width: int
    image_branch: str


CASES = {
    "small": (Case("paper-w16", 64, "detached"), Case("paper-w16", 64, "cached")),
    "paper": (Case("paper-w64", 2048, "detached"),),
    "resnet20": (Case("resnet20", 2048, "detached"), Case("resnet20", 2048, "cached")),
}


def resnet20() -> nn.Module:
    """Return an untrained CIFAR ResNet-20 that outputs its 64 features."""
    spec = importlib.util.spec_from_file_location("third_party_nets", NETS)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Representation(module.resnet20(), "penultimate")


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "paper-w16": lambda: PaperEncoder((3, 32, 32), 16),
    "paper-w64": lambda: PaperEncoder((3, 32, 32), 64),
    "resnet20": resnet20,
}


class Floor:
    """The passes of one step alone, on separate copies of encoder and critic."""

    def __init__(self, encoder: nn.Module, images: Images, case: Case) -> None:
        self.encoder, self.images, self.cached = copy.deepcopy(encoder), images, case.image_branch == "cached"
        with torch.no_grad():
            features = self.encoder.eval()(images)
        self.critic = VariationalObjective(images, features, ObjectiveSettings(width=case.width), keyed_generator(0))
        self.learners = [*self.encoder.parameters(), *self.critic.parameters()]
        self.optimiser = torch.optim.Adam(self.learners, 1e-6)

    def search(self, steps: int) -> None:
        """Compute `steps` gradients of the critic value at the images, with a detached image branch."""
        self.encoder.eval()
        self.critic.eval()
        with torch.no_grad():
            embedded = self.critic.embed_images(self.images)
        for number in range(steps):
            if number and not self.cached:
                with torch.no_grad():
                    embedded = self.critic.embed_images(self.images)
            leaf = self.images.detach().requires_grad_()
            torch.autograd.grad(self.critic.value(embedded, self.encoder(leaf)), leaf)

    def optimiser_step(self) -> None:
        """Run one optimiser step of encoder and critic."""
        set_training_mode(self.encoder)
        self.critic.train()
        self.optimiser.zero_grad()
        (-self.critic(self.images, self.encoder(self.images))).backward()
        self.optimiser.step()

    def encoder_pass(self) -> None:
        """Run one forward and backward pass of the encoder alone, to images and weights."""
        self.encoder.eval()
        leaf = self.images.detach().requires_grad_()
        torch.autograd.grad(self.encoder(leaf).sum(), [leaf, *_trainable(self.encoder)], allow_unused=True)


def _trainable(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def seconds(work: Callable[[], None]) -> float:
    """Return the CPU time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one case: medians of alternating steps and floors; the first repetition is a warm-up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ENCODERS[case.encoder]()
    images = torch.rand(args.batch, 3, 32, 32, generator=keyed_generator(1))
    floor, steps, floors, passes = Floor(encoder, images, case), list[float](), list[float](), list[float]()
    started = 0.0

    def between(_epoch: int, _nats: float) -> None:
        nonlocal started
        steps.append(time.process_time() - started)
        floors.append(seconds(lambda: floor.search(args.search_steps)) + seconds(floor.optimiser_step))
        passes.append(seconds(floor.encoder_pass))
        sys.stderr.write(f"{case}: step {len(steps)} of {args.rounds + 1}\n")
        started = time.process_time()

    training = MITraining(
        threat=Linf(8 / 255),
        pgd=PGD(args.search_steps, 0.32, random_start=False),
        epochs=args.rounds + 1,
        critic=ObjectiveSettings(width=case.width),
        batch_size=args.batch,
        image_branch=case.image_branch,  # type: ignore[arg-type]
    )
    started = time.process_time()
    train_representation(encoder, images, training, between)
    step, floor_time, pass_time = (statistics.median(each[1:]) for each in (steps, floors, passes))
    values = (
        case.encoder,
        "ref-local",
        case.width,
        case.image_branch,
        args.batch,
        args.search_steps,
        args.rounds,
        f"{step:.3f}",
        f"{floor_time:.3f}",
        f"{step / floor_time:.3f}",
        f"{pass_time:.4f}",
        f"{step / pass_time:.1f}",
    )
    return dict(zip(FIELDS, values, strict=True))


def options() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--search-steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Write the rows of every case as they are measured."""
    args = options()
    torch.set_num_threads(1)
    with args.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for name in args.cases:
            for case in CASES[name]:
                table.writerow(measure(case, args))
                file.flush()


if __name__ == "__main__":
    main()
