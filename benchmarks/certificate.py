"""Measure the cost of a certificate relative to PGD-40 on the same images, and its growth with their number.

Run from the repository root (see benchmarks/README.md):
    python benchmarks/certificate.py --data cifar10-test.parquet --checkpoints checkpoints --out certificate.csv

ResNet-20, logits, 8/255, one hub, in one process on one thread. PGD-40 is that of rvaudit, on the folded copy of
the network, without dropping images. Seconds are CPU time; a pass is one image forward and backward, and a forward
or backward pass alone counts as half.
"""

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch

from audit.adversary.fused import fused_copy
from audit.adversary.label_attack import cross_entropy_objective, without_early_stopping
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import Linf
from audit.certificate.certificate import certify
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.results import NotApplicable
from audit.certificate.settings import CertificateSettings
from audit.random_keys import keyed_generator
from audit.representation.layers import Representation
from model_zoo.images.datasets import ImageRequest, ImageSet, load_images
from model_zoo.load import SourceSettings, load_model

NETWORK = "resnet20-12fca82f.th?arch={nets}:resnet20&mean=.485,.456,.406&std=.229,.224,.225&num_classes=10"
NETS = Path(__file__).resolve().parents[1] / "tests" / "third_party_nets.py"
THREAT, STEPS = Linf(8 / 255), 40
FIELDS = (
    "images",
    "certified_bound",
    "passes_an_image",
    "cpu_seconds",
    "pgd40_passes_an_image",
    "pgd40_cpu_seconds",
    "ratio_of_passes",
    "ratio_of_cpu_seconds",
)


def certified(network: torch.nn.Module, data: ImageSet) -> tuple[float, float, float]:
    """Return the bound, the passes per image and the CPU seconds of a certificate."""
    started = time.process_time()
    settings = CertificateSettings(effort=SearchEffort(hubs=1, neighbours=0))
    layer = DualPrecisionLayer.of(Representation(network, "logits"))
    found = certify(layer, data.images, data.labels, THREAT, settings)
    if isinstance(found, NotApplicable):
        raise SystemExit(found.reason)
    return found.bound.certified, found.passes / len(data.images), time.process_time() - started


def attacked(network: torch.nn.Module, data: ImageSet) -> tuple[float, float]:
    """Return the passes per image and the CPU seconds of PGD-40 without early stopping."""
    started = time.process_time()
    objective = without_early_stopping(cross_entropy_objective(fused_copy(network, data.images), data.labels))
    found = minimise(objective, data.images, THREAT, PGD(STEPS, 0.1), keyed_generator(0))
    passes = found.passes + found.forwards / 2
    return passes / len(data.images), time.process_time() - started


def row(network: torch.nn.Module, data: ImageSet) -> dict[str, Any]:
    """Return one row; the attack is timed before and after the certificate, so that drift cancels."""
    before = attacked(network, data)
    bound, passes, seconds = certified(network, data)
    after = attacked(network, data)
    attack_seconds = (before[1] + after[1]) / 2
    values = (bound, passes, seconds, before[0], attack_seconds, passes / before[0], seconds / attack_seconds)
    return {"images": len(data.images)} | {name: f"{value:.3f}" for name, value in zip(FIELDS[1:], values, strict=True)}


def main() -> None:
    """Write a row for every number of images as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file of CIFAR-10 test images")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the third-party checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 300, 1000])
    args = parser.parse_args()
    torch.set_num_threads(1)
    ref = f"file:{args.checkpoints}/{NETWORK.format(nets=NETS)}"
    network = load_model(ref, SourceSettings(trust_code=True, offline=True)).network
    with args.out.open("w", newline="") as file:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        table.writeheader()
        for count in args.images:
            data = load_images(f"parquet:{args.data}", ImageRequest(count=count, balanced=True))
            table.writerow(row(network, data))
            file.flush()
            sys.stderr.write(f"{count} images done\n")


if __name__ == "__main__":
    main()
