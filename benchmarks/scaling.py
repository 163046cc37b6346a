"""Measure passes, CPU time and memory of an audit against the numbers of layers, radii, seeds, images and models.

Run from the repository root:
    python benchmarks/scaling.py --data parquet:cifar10-test.parquet --checkpoints checkpoints --out scaling.csv

ResNet-20 is audited like a benchmark file: `expand` and `run` in a temporary folder, the audit tier, one process
per case, one thread. The base case is one layer (logits), one radius (8/255), one seed and one model; every other
case increases one of these numbers. Models have the same weights and slightly different pixel scales, so that they
cost the same and share no records. A row is written when its case is finished; cases with a row are skipped.

`passes_claimed` is the sum of `passes` over the records. `passes_counted` is measured by hooks on the first
convolution of every copy of the network, which count forward images and backward gradients, half a pass each. A
forward pass that ends at an inner layer counts as a whole pass, so the count is too high for inner layers. Work
shared by two records is claimed by both and counted once. `bare_pass_ms` is the median CPU time of one pass of an
image through the loaded network, in batches of 200, in the same process after the audit; `ratio_cpu` compares CPU
times in this unit, because load on the machine affects both. Peaks are resident memory of the process, before the
audit and in total.
"""

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from audit.commands.display import Display

# Import torch only inside functions: peak memory of a child process includes that of the parent that started it.
NETS = Path(__file__).resolve().parents[1] / "tests" / "third_party_nets.py"
CHECKPOINT, MEAN, STD = "resnet20-12fca82f.th", ".485,.456,.406", (0.229, 0.224, 0.225)
LAYERS = ("bn1", "layer1.0", "layer1.2", "layer2.2", "layer3.0", "layer3.2", "penultimate", "logits")
RADII = (8, 4, 16, 2)  # of 255; the base case has the first one
COUNTS = {"layers": (2, 4, 8), "eps": (2, 4), "seeds": (3, 5), "images": (100, 400, 800), "models": (2, 4)}
ENDS = {"layers": (8,), "eps": (4,), "seeds": (5,)}  # cases of the other estimators
ESTIMATORS = {"sandwich": COUNTS, "mine": ENDS, "label-information": ENDS}


class Case(NamedTuple):
    """The number of layers, radii, seeds, images and models, and the axis that differs from the base case."""

    estimator: str
    axis: str
    layers: int
    eps: int
    seeds: int
    images: int
    models: int

    @property
    def title(self) -> str:
        """The title of the case in progress reports."""
        return self.estimator if self.axis == "base" else f"{self.estimator}, {self.axis} {getattr(self, self.axis)}"


FIELDS = (
    *("date", "machine", "python", "torch"),
    *Case._fields,
    *("passes_claimed", "passes_counted", "forwards", "backwards", "cpu_seconds", "bare_pass_ms"),
    *("peak_before_mib", "peak_mib", "ratio_claimed", "ratio_counted", "ratio_cpu"),
    *("normal_nats", "worst_nats", "worst_nats_se"),
)


class Counter:
    """Counts of forward images and backward gradients at the first convolution of a network."""

    def __init__(self) -> None:
        self.forwards, self.backwards, self.network = 0, 0, None

    def watching(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loader whose networks, and all their copies, are counted."""

        def loaded(*inputs: Any) -> Any:
            model = load(*inputs)
            self.network = model.network
            self._watch(model.network)
            return model

        return loaded

    def _watch(self, network: Any) -> None:
        from torch import nn

        def back(gradient: Any) -> None:
            self.backwards += len(gradient)

        def ahead(_layer: Any, _images: Any, maps: Any) -> None:
            self.forwards += len(maps)
            if maps.requires_grad:
                maps.register_hook(back)

        # functions, not methods: copying the network would copy a bound counter
        next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d)).register_forward_hook(ahead)


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield the base case of every estimator, followed by the cases that increase one number."""
    for estimator in args.estimators:
        base = Case(estimator, "base", 1, 1, 1, args.images, 1)
        yield base
        for axis, counts in ESTIMATORS[estimator].items():
            if axis in args.axes:
                yield from (base._replace(axis=axis, **{axis: count}) for count in counts)


def benchmark(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return the benchmark of a case; every one contains the logits and 8/255."""
    return {
        "name": "scaling",
        "dataset": args.data,
        "images": case.images,
        "layers": list(LAYERS[len(LAYERS) - case.layers :]),
        "threats": {"norm": "linf", "eps": [f"{eps}/255" for eps in sorted(RADII[: case.eps])]},
        "seeds": list(range(case.seeds)),
        "estimators": [case.estimator],
        "attack": "audit",
        "models": [reference(args.checkpoints, number) for number in range(case.models)],
    }


def reference(checkpoints: Path, number: int) -> str:
    """Return a reference to ResNet-20 with distinct pixel scales; number 0 has those of its training."""
    std = ",".join(f"{deviation * (1 + 0.01 * number):.5f}" for deviation in STD)
    return (
        f"file:{checkpoints}/{CHECKPOINT}?arch={NETS}:resnet20&num_classes=10&mean={MEAN}&std={std}"
        f"&name=resnet20-{number}"
    )


def measured(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return the cost of a case in this process, which must be new."""
    import torch

    import model_zoo.load

    counter = Counter()
    # before the modules of the audit import it by name
    model_zoo.load.load_model = counter.watching(model_zoo.load.load_model)
    from audit.config.benchmark import BenchmarkConfig
    from audit.run.cell import expand
    from audit.run.loading import RunOptions
    from audit.run.run_loop import run
    from model_zoo.load import SourceSettings

    torch.set_num_threads(1)
    options = RunOptions(SourceSettings(trust_code=True, offline=True), device="cpu")
    todo = expand(BenchmarkConfig.model_validate(benchmark(case, args)))
    before = peak()
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        records = run(todo, Path(folder), options)
        seconds = time.process_time() - started
    most, forwards, backwards = peak(), counter.forwards, counter.backwards
    for record in records:
        if not record.valid:
            raise SystemExit(f"{record.layer}, eps {record.eps:.4g}: {record.reason}")
    first = next(r for r in records if r.layer == "logits" and abs(255 * r.eps - RADII[0]) < 1e-6)
    return {
        "torch": torch.__version__,
        "passes_claimed": sum(record.passes or 0 for record in records),
        "passes_counted": (forwards + backwards) / 2,
        "forwards": forwards,
        "backwards": backwards,
        "cpu_seconds": round(seconds, 2),
        "bare_pass_ms": round(bare_pass(counter.network), 4),
        "peak_before_mib": round(before),
        "peak_mib": round(most),
        "normal_nats": first.normal_nats,
        "worst_nats": first.worst_nats,
        "worst_nats_se": first.worst_nats_se,
    }


def peak() -> float:
    """Return the peak resident memory of this process in MiB (Linux reports KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare_pass(network: Any, batch: int = 200, turns: int = 7) -> float:
    """Return the median CPU time in ms of one forward and backward pass of an image."""
    import torch

    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(turns):
        started = time.process_time()
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(network(leaf).sum(), leaf)
        times.append(time.process_time() - started)
    return 1e3 * median(times) / batch


def in_a_process(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Return the cost of a case, measured in a new process."""
    command = [sys.executable, __file__, "--data", args.data, "--checkpoints", str(args.checkpoints)]
    command += ["--out", str(args.out), "--one", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{case.title}: ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def row(case: Case, cost: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """Return the row of a case with its ratios to the base case of the estimator (itself where there is none)."""
    base = base or cost
    ratios = {
        name: round(cost[column] / float(base[column]), 3)
        for name, column in (("ratio_claimed", "passes_claimed"), ("ratio_counted", "passes_counted"))
    }
    in_passes, base_in_passes = (float(each["cpu_seconds"]) / float(each["bare_pass_ms"]) for each in (cost, base))
    ratios["ratio_cpu"] = round(in_passes / base_in_passes, 3)
    nats = {name: f"{cost[name]:.4f}" for name in ("normal_nats", "worst_nats", "worst_nats_se")}
    environment = {"date": date.today().isoformat(), "machine": machine(), "python": platform.python_version()}
    return {**environment, **case._asdict(), **cost, **ratios, **nats}


def machine() -> str:
    """Return the name of the processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def known(path: Path) -> dict[Case, dict[str, Any]]:
    """Return the rows of a file by case."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Case(*(kind(found[name]) for name, kind in Case.__annotations__.items())): found
            for found in csv.DictReader(file)
        }


def options() -> argparse.Namespace:
    """Return the command line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set of CIFAR-10 test images, such as parquet:PATH")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the third-party checkpoints")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--axes", nargs="*", choices=list(COUNTS), default=list(COUNTS))
    parser.add_argument("--images", type=int, default=200, help="images of the base case")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a case, for the child process
    return parser.parse_args()


def main() -> None:
    """Append a row for every case without one as it is measured."""
    args = options()
    if args.one:
        sys.stdout.write(json.dumps(measured(Case(*json.loads(args.one)), args)) + "\n")
        return
    rows = known(args.out)
    left = [case for case in cases(args) if case not in rows]
    new = not args.out.exists()
    with args.out.open("a", newline="") as file, Display(len(left)) as display:
        table = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            table.writeheader()
        for number, case in enumerate(left):
            display.channel(case.title, number)
            base = Case(case.estimator, "base", 1, 1, 1, args.images, 1)
            rows[case] = row(case, in_a_process(case, args), rows.get(base))
            table.writerow(rows[case])
            file.flush()
            summary = f"{rows[case]['ratio_counted']} of the base's passes, {rows[case]['cpu_seconds']} s"
            sys.stderr.write(f"{number + 1} of {len(left)}: {case.title}: {summary}\n")


if __name__ == "__main__":
    main()
