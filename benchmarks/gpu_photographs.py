"""Audit one model on photographs on a GPU, in float32, and compare its throughput with bare passes of the network.

Run from the repository root, with a model reference and a data set as `rvaudit audit` takes them:
    python benchmarks/gpu_photographs.py "file:efficientnet_lite0.pth?arch=tests/third_party_nets.py:efficientnet_lite0&
        num_classes=1000&mean=.498,.498,.498&std=.502,.502,.502&resize=256&crop=224&interpolation=bicubic"
        --dataset folder:photos --images 100 --eps 1/255

Printed are bare forward and backward passes a second for batches of 1, 2, 4, ... images up to what is chosen for the
audit (`--largest` limits it), each the best of `--rounds`, then the audit of the layer: accuracies, nats, the passes
that the record claims, those counted (checks included; a pass without gradients counts as one), wall seconds, the peak
of the device's memory, and the counted passes a second as a share of the best bare rate, which may be above 1: searches
take a faster copy of the network. TensorFloat-32 is turned off: matrix products and convolutions are in float32, as on
a CPU.

With three seeds of `sandwich`, 100 photographs take about 54,000 passes of EfficientNet-Lite0: at 500 passes a second,
a tenth of what its arithmetic allows a data-centre GPU, two minutes.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn

from audit.adversary.memory.batch_size import fitting_batch
from audit.adversary.memory.counting import counted_by
from audit.adversary.passes import frozen_parameters
from audit.adversary.threat import Linf
from audit.config.settings import AuditSettings
from audit.config.values import parse_number
from audit.errors import EnvironmentFault
from audit.information.estimator import ESTIMATORS
from audit.records import AuditRecord
from audit.run.cell import Cell
from audit.run.loading import RunOptions, device_of, open_images_for, open_model
from audit.run.run_loop import run
from model_zoo.load import SourceSettings

MIB = 1 << 20


class Audited(NamedTuple):
    """The record of an audit, the passes counted in it, and its wall seconds."""

    record: AuditRecord
    counted: float
    seconds: float


def waited(device: torch.device) -> float:
    """Return the time when the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def bare_rate(network: nn.Module, images: Tensor, size: int, rounds: int) -> float:
    """Return passes of images (N, C, H, W) a second, forward and backward in batches of a size: the best round's."""
    batch = images[torch.arange(size, device=images.device) % len(images)]
    best = 0.0
    for turn in range(rounds + 1):
        began = waited(images.device)
        leaf = batch.clone().requires_grad_()
        torch.autograd.grad(network(leaf).sum(), leaf)
        if turn:  # the first one loads kernels
            best = max(best, size / (waited(images.device) - began))
    return best


def bare_rates(network: nn.Module, images: Tensor, largest: int, rounds: int) -> dict[int, float]:
    """Return the bare rate for batches of 1, 2, 4, ... images up to the largest, and of that."""
    sizes = sorted({*(1 << power for power in range(largest.bit_length())), largest})
    with frozen_parameters(network):
        return {size: bare_rate(network, images, size, rounds) for size in sizes}


def audited(cell: Cell, options: RunOptions) -> Audited:
    """Audit one cell in a temporary folder; raises EnvironmentFault where it has no record."""
    device, passes = device_of(options.device), [0.0]

    def count(images: float) -> None:
        passes[0] += images

    with tempfile.TemporaryDirectory() as folder, counted_by(count):
        began = waited(device)
        (record,) = run([cell], Path(folder), options)
        seconds = waited(device) - began
    if not record.valid:
        raise EnvironmentFault(f"the audit failed: {record.reason}")
    return Audited(record, passes[0], seconds)


def report(found: Audited, rates: dict[int, float], device: torch.device) -> None:
    """Print both rates, and what the audit found."""
    record, best = found.record, max(rates.values())
    for size, rate in rates.items():
        click.echo(f"bare, batches of {size:5}: {rate:10.1f} passes a second")
    nats = f"normal {record.normal_nats:.3f} nats, worst {record.worst_nats:.3f}, RV {record.rv:.3f}"
    click.echo(f"natural {record.natural_accuracy:.3f}, adversarial {record.adversarial_accuracy:.3f}, {nats}")
    rate = found.counted / found.seconds
    click.echo(f"{record.passes:,} passes claimed, {found.counted:,.0f} counted, {found.seconds:.1f} s")
    click.echo(f"audit: {rate:.1f} passes a second, {rate / best:.2f} of the best bare rate")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / MIB
        click.echo(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, peak {peak:.0f} MiB")


def main(arguments: list[str] | None = None, settings: AuditSettings | None = None) -> None:
    """Parse the command line and measure; settings may be given in place of the product's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--layer", default="logits")
    parser.add_argument("--eps", default="1/255")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--estimator", default="sandwich")
    parser.add_argument("--largest", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args(arguments)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    options = RunOptions(SourceSettings(trust_code=True), device=chosen.device)
    images = open_images_for(chosen.model, chosen.dataset, options, options.request(chosen.images))
    network = open_model(chosen.model, images, options).network
    size = min(chosen.largest, fitting_batch(network, images.images))
    rates = bare_rates(network, images.images, size, chosen.rounds)
    if images.images.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(images.images.device)
    threat = Linf(parse_number(chosen.eps))
    settings = settings or AuditSettings(ESTIMATORS[chosen.estimator], seeds=tuple(range(chosen.seeds)))
    cell = Cell(chosen.model, None, chosen.dataset, chosen.images, chosen.layer, threat, settings)
    report(audited(cell, options), rates, images.images.device)


if __name__ == "__main__":
    main()
