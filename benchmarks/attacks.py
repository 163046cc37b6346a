"""Compare time and verdicts of PGD-20 in rvaudit and other packages, with the same images, eps, step and start.

Run from the repository root, in a separate environment (see benchmarks/requirements.txt):
    python benchmarks/attacks.py --data cifar10-test.parquet --checkpoints checkpoints --out attacks.csv

All packages run in one process on one thread, in turn on each batch, with a rotating order so that load on the
machine affects all equally. Seconds are CPU time of the process. The floor is the minimal cost of such a search: as
many forward and backward passes to the input as steps. The reference is the plain loop.
"""

import argparse
import csv
import logging
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import cross_entropy_objective, margin
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf
from audit.random_keys import keyed_generator
from audit.types import Images, Labels
from model_zoo.images.datasets import ImageRequest, load_images
from model_zoo.load import SourceSettings, load_model

RELATIVE_STEP, WARM_UP = 0.25, 8
FIELDS = (
    "network",
    "package",
    "version",
    "images",
    "steps",
    "cpu_seconds",
    "ratio_to_floor",
    "robust",
    "differs_from_reference",
)
NETWORKS = {
    "resnet20": "resnet20-12fca82f.th?arch={nets}:resnet20&mean=.485,.456,.406&std=.229,.224,.225",
    "resnet2b": "resnet2b.pth?arch={nets}:resnet2b&mean=.4914,.4822,.4465&std=.2471,.2435,.2616",
    "cnn-a-adv": "cifar_cnn_a_adv.model?arch={nets}:cnn_a&mean=.4914,.4822,.4465&std=.2023,.1994,.2010",
}
NETS = Path(__file__).resolve().parents[1] / "tests" / "third_party_nets.py"

Attack = Callable[[Images, Labels], Images]


def rvaudit(network: nn.Module, threat: Linf, steps: int) -> Attack:
    """Return the search of rvaudit, on its folded copy of the network."""
    folded: list[nn.Module] = []

    def attack(images: Images, labels: Labels) -> Images:
        if not folded:  # created in the first batch, so that its time is included
            folded.append(fused_copy(network, images))
        pgd = PGD(steps, RELATIVE_STEP, random_start=False, batch_size=len(images))
        objective = cross_entropy_objective(folded[0], labels)
        return minimise(objective, images, threat, pgd, keyed_generator(0)).images

    return attack


def floor(network: nn.Module, threat: Linf, steps: int) -> Attack:  # noqa: ARG001
    """Return the passes alone: `steps` gradients at the clean images, without moving them."""

    def passes(images: Images, labels: Labels) -> Images:
        for _ in range(steps):
            _input_gradient(network, images, labels)
        return images

    return passes


def loop(network: nn.Module, threat: Linf, steps: int) -> Attack:
    """Return the reference: a plain PGD loop that keeps the first misclassified iterate of every image."""

    def descend(images: Images, labels: Labels) -> Images:
        current, kept = images, images.clone()
        broken = torch.zeros(len(images), dtype=torch.bool)
        for step in range(steps + 1):
            leaf = current.detach().requires_grad_()
            logits = network(leaf)
            now = ~broken & ~(margin(logits.detach(), labels) > 0)
            kept[now], broken = current[now], broken | now
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), leaf)
            moved = current + RELATIVE_STEP * threat.eps * gradient.sign()
            current = (images + (moved - images).clamp(-threat.eps, threat.eps)).clamp(0, 1)
        return torch.where(broken[:, None, None, None], kept, current)

    return descend


def torchattacks(network: nn.Module, threat: Linf, steps: int) -> Attack:
    """Return the PGD of torchattacks."""
    step = RELATIVE_STEP * threat.eps
    attack = import_module("torchattacks").PGD(network, threat.eps, step, steps, random_start=False)
    return lambda images, labels: attack(images, labels)


def foolbox(network: nn.Module, threat: Linf, steps: int) -> Attack:
    """Return Foolbox's LinfPGD, without the additional forward pass of its `__call__`."""
    library = import_module("foolbox")
    model = library.PyTorchModel(network, bounds=(0, 1), device="cpu")
    step = RELATIVE_STEP * threat.eps
    attack = library.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False)
    return lambda images, labels: attack.run(
        model, images, library.criteria.Misclassification(labels), epsilon=threat.eps
    )


def art(network: nn.Module, threat: Linf, steps: int) -> Attack:
    """Return ART's ProjectedGradientDescent; its conversions to and from numpy are included."""
    evasion, classifiers = import_module("art.attacks.evasion"), import_module("art.estimators.classification")
    classifier = classifiers.PyTorchClassifier(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, 32, 32),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )

    def attack(images: Images, labels: Labels) -> Images:
        search = evasion.ProjectedGradientDescent(
            classifier,
            eps=threat.eps,
            eps_step=RELATIVE_STEP * threat.eps,
            max_iter=steps,
            batch_size=len(images),
            verbose=False,
        )
        return torch.from_numpy(search.generate(images.numpy(), F.one_hot(labels, 10).numpy()))

    return attack


PACKAGES: dict[str, tuple[Callable[[nn.Module, Linf, int], Attack], str]] = {
    "floor": (floor, "torch"),
    "loop": (loop, "torch"),
    "rvaudit": (rvaudit, "rvaudit"),
    "torchattacks": (torchattacks, "torchattacks"),
    "foolbox": (foolbox, "foolbox"),
    "art": (art, "adversarial-robustness-toolbox"),
}


def _input_gradient(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    leaf = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(leaf), labels, reduction="sum"), leaf)
    return gradient


@torch.no_grad()
def correct_mask(network: nn.Module, images: Images, labels: Labels) -> Tensor:
    """Return which images the network classifies correctly in a plain forward pass: (N,) bool."""
    logits = torch.cat([network(part) for part in images.split(250)])
    return margin(logits, labels) > 0


def measure(network: nn.Module, images: Images, labels: Labels, args: argparse.Namespace) -> dict[str, Any]:
    """Return CPU seconds and robust masks (N,) of every package, run in turn on each batch."""
    threat = Linf(args.eps / 255)
    for name in PACKAGES:
        PACKAGES[name][0](network, threat, 2)(images[:WARM_UP], labels[:WARM_UP])  # imports and kernel compilation
    attacks = {name: PACKAGES[name][0](network, threat, args.steps) for name in PACKAGES}
    seconds, robust_masks = dict.fromkeys(attacks, 0.0), {name: [] for name in attacks}
    batches = list(zip(images.split(args.batch_size), labels.split(args.batch_size), strict=True))
    for number, (x, y) in enumerate(batches):
        names = list(attacks)
        first = number % len(names)
        for name in names[first:] + names[:first]:
            started = time.process_time()
            found = attacks[name](x, y)
            seconds[name] += time.process_time() - started
            check_legal(name, found, x, threat)
            robust_masks[name].append(correct_mask(network, found, y))
        sys.stderr.write(f"batch {number + 1} of {len(batches)}\n")
    return {name: (seconds[name], torch.cat(robust_masks[name])) for name in attacks}


def check_legal(name: str, found: Images, clean: Images, threat: Linf) -> None:
    """Exit where a package leaves the ball or the pixel range, because its verdicts would not be comparable."""
    if float(threat.distance(found, clean).max()) > threat.eps + 1e-6 or found.min() < 0 or found.max() > 1:
        raise SystemExit(f"{name} returned images outside the eps-ball or the pixel range")


def rows(name: str, measured: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Return one row per package; the floor has no verdicts."""
    floor_seconds, reference = measured["floor"][0], measured["loop"][1]
    return [
        {
            "network": name,
            "package": package,
            "version": version_of(package),
            "images": len(robust),
            "steps": steps,
            "cpu_seconds": f"{seconds:.3f}",
            "ratio_to_floor": f"{seconds / floor_seconds:.3f}",
            "robust": "" if package == "floor" else int(robust.sum()),
            "differs_from_reference": "" if package == "floor" else int((robust != reference).sum()),
        }
        for package, (seconds, robust) in measured.items()
    ]


def version_of(package: str) -> str:
    """Return the version of a package; rvaudit runs from the working tree and may not be installed."""
    try:
        return version(PACKAGES[package][1])
    except ImportError:
        return "working tree"


def third_party_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every script on third-party networks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of CIFAR-10 test images")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the third-party checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def options() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = third_party_parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--images", type=int, default=1000, help="images per network, including misclassified ones")
    parser.add_argument("--eps", type=float, default=2.0, help="grey levels of 255")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    """Append the rows of every network as they are measured."""
    args = options()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    data = load_images(f"parquet:{args.data}", ImageRequest(count=args.images))
    new = not args.out.exists()
    with args.out.open("a", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            table.writeheader()
        for name in args.networks:
            ref = f"file:{args.checkpoints}/{NETWORKS[name].format(nets=NETS)}&num_classes=10"
            network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
            table.writerows(rows(name, measure(network, data.images, data.labels, args), args.steps))
            file.flush()


if __name__ == "__main__":
    main()
