"""A step of learning in the worst case beside the passes it is made of: what does the trainer itself cost?

Run from the repository root:
    python benchmarks/learning.py --out learning.csv

Step after step of `train_representation` on one batch, and between any two of them the floor, in the same process on
one thread, so that a busy machine slows both alike. Seconds are CPU time of the process. The floor is what no such
step can do without: as many passes of the bare encoder and critic to the images as the search has steps, and one
forward and backward pass of both to the weights with the optimiser's step. `in_passes` is the step in units of one
bare forward and backward pass of the encoder alone; the authors' code takes 27 of those for ResNet-20 with their
critic of width 2048 (there the encoder does not learn). Weights and images are random: nothing here depends on them.
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
from audit.training.mutual_information import MITraining, learning_mode, train_representation
from audit.training.objectives import Scorer, ScorerShape
from audit.types import Images
from model_zoo.architectures.encoders import PaperEncoder

NETS = Path(__file__).resolve().parents[1] / "tests" / "third_party_nets.py"
FIELDS = ("encoder", "critic", "width", "image_branch", "batch", "search_steps", "steps_timed", "step_seconds",
          "floor_seconds", "ratio", "pass_seconds", "in_passes")  # fmt: skip


class Case(NamedTuple):
    """An encoder by name, and the critic and search it learns with."""

    encoder: str
    width: int
    image_branch: str


CASES = {
    "small": (Case("paper-w16", 64, "detached"), Case("paper-w16", 64, "cached")),
    "paper": (Case("paper-w64", 2048, "detached"),),
    "resnet20": (Case("resnet20", 2048, "detached"), Case("resnet20", 2048, "cached")),
}  # fmt: skip


def resnet20() -> nn.Module:
    """Return the 64 features of an untrained CIFAR ResNet-20."""
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
    """The bare passes of one step, on copies of encoder and critic that nothing else moves."""

    def __init__(self, encoder: nn.Module, images: Images, case: Case) -> None:
        self.encoder, self.images, self.cached = copy.deepcopy(encoder), images, case.image_branch == "cached"
        with torch.no_grad():
            features = self.encoder.eval()(images)
        self.scorer = Scorer(images, features, ScorerShape(width=case.width), keyed_generator(0))
        self.learners = [*self.encoder.parameters(), *self.scorer.parameters()]
        self.optimiser = torch.optim.Adam(self.learners, 1e-6)

    def search(self, steps: int) -> None:
        """Take so many gradients of the critic's value at the images; the image branch is looked at, not followed."""
        self.encoder.eval()
        self.scorer.eval()
        with torch.no_grad():
            view = self.scorer.view(self.images)
        for number in range(steps):
            if number and not self.cached:
                with torch.no_grad():
                    view = self.scorer.view(self.images)
            leaf = self.images.detach().requires_grad_()
            torch.autograd.grad(self.scorer.value(view, self.encoder(leaf)), leaf)

    def learn(self) -> None:
        """Take one step of encoder and critic."""
        learning_mode(self.encoder)
        self.scorer.train()
        self.optimiser.zero_grad()
        (-self.scorer(self.images, self.encoder(self.images))).backward()
        self.optimiser.step()

    def bare(self) -> None:
        """Take one forward and backward pass of the encoder alone, to images and weights."""
        self.encoder.eval()
        leaf = self.images.detach().requires_grad_()
        torch.autograd.grad(self.encoder(leaf).sum(), [leaf, *_reached(self.encoder)], allow_unused=True)


def _reached(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def seconds(work: Callable[[], None]) -> float:
    """Return the CPU time that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


def measure(case: Case, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one case: steps and floors taken by turns, the median of each; the first round is a warm-up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ENCODERS[case.encoder]()
    images = torch.rand(chosen.batch, 3, 32, 32, generator=keyed_generator(1))
    floor, steps, floors, passes = Floor(encoder, images, case), list[float](), list[float](), list[float]()
    started = 0.0

    def between(_epoch: int, _nats: float) -> None:
        nonlocal started
        steps.append(time.process_time() - started)
        floors.append(seconds(lambda: floor.search(chosen.search_steps)) + seconds(floor.learn))
        passes.append(seconds(floor.bare))
        sys.stderr.write(f"{case}: step {len(steps)} of {chosen.rounds + 1}\n")
        started = time.process_time()

    training = MITraining(
        threat=Linf(8 / 255), pgd=PGD(chosen.search_steps, 0.32, random_start=False), epochs=chosen.rounds + 1,
        critic=ScorerShape(width=case.width), batch_size=chosen.batch,
        image_branch=case.image_branch,  # type: ignore[arg-type]
    )  # fmt: skip
    started = time.process_time()
    train_representation(encoder, images, training, between)
    step, least, once = (statistics.median(each[1:]) for each in (steps, floors, passes))
    values = (
        case.encoder, "ref-local", case.width, case.image_branch, chosen.batch, chosen.search_steps, chosen.rounds,
        f"{step:.3f}", f"{least:.3f}", f"{step / least:.3f}", f"{once:.4f}", f"{step / once:.1f}",
    )  # fmt: skip
    return dict(zip(FIELDS, values, strict=True))


def options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--search-steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Write the rows of every case, as they come."""
    chosen = options()
    torch.set_num_threads(1)
    with chosen.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for name in chosen.cases:
            for case in CASES[name]:
                table.writerow(measure(case, chosen))
                file.flush()


if __name__ == "__main__":
    main()
