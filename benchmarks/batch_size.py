"""Compare the chosen batch with the rate of bare passes over batch sizes, for one model on images of its size.

Run from the repository root, with a model reference as `rvaudit audit` takes it:
    python benchmarks/batch_size.py "file:efficientnet_lite0.pth?arch=tests/third_party_nets.py:efficientnet_lite0&..."
        --dataset folder:photos --images 8 --largest 32

Printed is the CPU time of an image's forward and backward pass in bare loops, for batches of 1, 2, 4, ... images, and
in steps of the search on the margin at the chosen batch, through the network itself and through its fused copy. All
are measured in turns in one process, `--rounds` times, and the least time of each counts. `share` is the rate
relative to the best bare rate; peak memory is that of the process so far. One thread; on a GPU, wall time.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

import click
import torch
from torch import Tensor, nn

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import margin_objective
from audit.adversary.memory.batch_size import fitting_batch, fitting_batches, saved_bytes
from audit.adversary.passes import frozen_parameters
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.threat import Linf
from audit.run.loading import RunOptions, open_images_for, open_model
from model_zoo.load import SourceSettings

STEPS = 3
MIB = 1 << 20


def bare_passes(network: nn.Module, images: Tensor, size: int) -> None:
    """Pass images forward and backward through a network, in batches."""
    for batch in images.split(size):
        leaf = batch.clone().requires_grad_()
        torch.autograd.grad(network(leaf).sum(), leaf)


def search(network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Take steps of projected gradient descent on the margin."""
    objective = without_early_stopping(margin_objective(network, labels))
    with fitting_batches(network, images):
        minimise(objective, images, Linf(1 / 255), PGD(STEPS), torch.Generator())


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the CPU time of some work, or its wall time on a GPU."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def measure(network: nn.Module, images: Tensor, labels: Tensor, largest: int, rounds: int) -> None:
    """Measure all kinds of passes in turns, and print a table."""
    size = fitting_batch(network, images)
    click.echo(f"saved activations {saved_bytes(network, images[:1]) / MIB:.1f} MiB an image, chosen batch {size}")
    fused = fused_copy(network, images)
    kinds: dict[str, tuple[Callable[[], None], float]] = {}
    for power in range(largest.bit_length()):
        batch = images[torch.arange(max(len(images), 1 << power)) % len(images)]
        kinds[f"bare, batches of {1 << power}"] = partial(bare_passes, network, batch, 1 << power), len(batch)
    # clean images and last iterates are evaluated by half a pass each
    for name, searched in (("network itself", network), ("fused copy", fused)):
        passes = (STEPS + 1.0) * len(images)
        kinds[f"search step, {name}"] = partial(search, searched, images, labels), passes
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name, (work, passes) in kinds.items():
            taken = seconds(work, images.device) / passes
            best[name] = min(taken, best.get(name, taken))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            click.echo(f"  {name}: {1000 * taken:.1f} ms an image, peak {peak:.0f} MiB")
    least = min(taken for name, taken in best.items() if name.startswith("bare"))
    for name, taken in best.items():
        click.echo(f"{name:32} {1000 * taken:8.2f} ms an image, share {least / taken:.2f}")


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--largest", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    options = RunOptions(SourceSettings(trust_code=True), device=chosen.device)
    images = open_images_for(chosen.model, chosen.dataset, options, options.request(chosen.images))
    network = open_model(chosen.model, images, options, min_images=1).network
    with frozen_parameters(network):
        measure(network, images.images, images.labels, chosen.largest, chosen.rounds)


if __name__ == "__main__":
    main()
