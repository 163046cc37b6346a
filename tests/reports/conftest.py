"""Synthetic records: a small zoo of four families by three trainings, a suite of estimators, and hostile names."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.records import AuditRecord, CalibrationRow, RecordStore
from audit.theory import fano_accuracy_bound
from reports.page.html import render_report

FAMILIES = ("baseline-h", "densenet", "resnet", "vgg")
EPS = 0.2

# name: what its nats are nats of, whether it ranks, the normal case, RV of a standard model at EPS, its error
ESTIMATORS = {
    "sandwich": ("I(X; g(X) + noise)", True, 5.5, 3.2, 0.01),
    "label-information": ("I(Y; g(X))", True, 1.9, 1.5, 0.02),
    "label-level": ("H(argmax g(X))", True, 2.28, 2.1, 0.0),
    "mine-infonce": ("I(X; g(X))", True, 2.6, 1.9, 0.12),
    "ref-local": ("I(X; g(X))", False, 0.9, 0.3, 0.05),
    "ref-mean": ("I(X; g(X))", False, 1.1, 0.4, 0.05),
}

HOSTILE_NAMES = (
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    '=HYPERLINK("http://example.org","x")',
    "@SUM(1+1)",
    "\t=1+1",
    "{{7*7}}",
    "{% raw %}",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "evil\u202egnp.exe",
    "[bold]markup[/bold] $x^2$ \ud800",
)


def make_record(**changes: Any) -> AuditRecord:
    """A healthy record of a standard ResNet, with any field changed."""
    base = AuditRecord(
        cell_id="c-resnet-0",
        model="bundled:resnet-standard",
        source="bundled",
        family="resnet",
        training="standard",
        trained_eps=0.0,
        dataset="digits",
        layer="penultimate",
        dimension=64,
        norm="linf",
        eps=EPS,
        num_classes=10,
        weights_sha256="ab" * 32,
        weights_pinned=True,
        estimator="mine",
        attack="pgd-20",
        seeds=3,
        images=500,
        critic_images=1000,
        normal_nats=2.2,
        normal_nats_se=0.04,
        worst_nats=0.9,
        worst_nats_se=0.05,
        rv=1.3,
        rv_se=0.06,
        ceiling_nats=6.2,
        floor_nats=0.4,
        adversarial_accuracy_bound=0.69,
        fano_accuracy_bound=0.66,
        adversarial_risk_bound=0.31,
        natural_accuracy=0.98,
        natural_accuracy_low=0.965,
        natural_accuracy_high=0.99,
        adversarial_accuracy=0.05,
        adversarial_accuracy_low=0.035,
        adversarial_accuracy_high=0.07,
        adversarial_gap=0.93,
        details={
            "identity": {"seed": 0, "eps": EPS},
            "per_seed": [
                {"seed": 0, "rv": 1.3, "normal_nats": 2.2, "worst_nats": 0.9},
                {"seed": 1, "rv": 1.4, "normal_nats": 2.3, "worst_nats": 0.9},
                {"seed": 2, "rv": 1.2, "normal_nats": 2.1, "worst_nats": 0.9},
            ],
            "curves": {"normal": [0.1 * step for step in range(20)], "worst": [2.0 - 0.05 * s for s in range(20)]},
            "provenance": {"torch": "2.10.0", "python": "3.11"},
            "renames": ["module.conv1.weight -> conv1.weight"],
            "notes": ["trained on the first 1,000 digits"],
        },
    )
    return replace(base, **changes)


def zoo_member(position: int, family: str, trained_eps: float) -> AuditRecord:
    """One model of the zoo: the more robust its training, the smaller its RV and its gap."""
    share = trained_eps / EPS
    wobble = 0.03 * position
    rv, gap = 1.3 - 0.8 * share + wobble, 0.93 - 0.5 * share + 0.4 * wobble * (1 - 2 * (position % 2))
    label = {0.0: "standard", EPS / 4: "robust", EPS: "robust"}[trained_eps]
    worst, natural = 2.2 - rv, 0.98 - 0.02 * share - 0.003 * position
    adversarial = natural - gap
    return make_record(
        cell_id=f"c-{family}-{trained_eps:g}",
        model=f"bundled:{family}-{label if trained_eps in (0.0, EPS) else 'quarter'}",
        family=family,
        training=label,
        trained_eps=trained_eps,
        worst_nats=worst,
        rv=rv,
        adversarial_accuracy_bound=min(1.0, (worst + 0.6931) / 2.3026),
        natural_accuracy=natural,
        natural_accuracy_low=natural - 0.015,
        natural_accuracy_high=min(natural + 0.01, 1.0),
        adversarial_accuracy=adversarial,
        adversarial_accuracy_low=max(adversarial - 0.03, 0.0),
        adversarial_accuracy_high=adversarial + 0.03,
        adversarial_gap=gap,
    )


def make_zoo() -> list[AuditRecord]:
    """Twelve healthy records: four families, each standard, robust at a quarter of eps, robust at eps."""
    return [zoo_member(i, family, eps) for i, family in enumerate(FAMILIES) for eps in (0.0, EPS / 4, EPS)]


def suite_member(position: int, estimator: str, eps: float, seeds: int = 3) -> AuditRecord:
    """One model under one estimator: every second one robust, its RV growing with eps."""
    quantity, ranks, normal, largest, error = ESTIMATORS[estimator]
    model = zoo_member(position // 2, f"{FAMILIES[position // 2 % 4]}{position // 8 or ''}", EPS * (position % 2))
    share = (model.rv or 0.0) / 1.4 * eps / EPS
    wobble = error * math.sin(7 * position + 3 * len(estimator))
    rv = largest * share + wobble
    worst, limits = normal - rv, estimator != "label-level"
    by_seed = [{"seed": s, "rv": rv + error * math.sin(5 * position + 11 * s)} for s in range(seeds)]
    gap = (model.adversarial_gap or 0.0) * eps / EPS
    adversarial = (model.natural_accuracy or 0.0) - gap
    return replace(
        model,
        cell_id=f"{model.cell_id}-{estimator}-{eps:g}",
        estimator=estimator,
        quantity=quantity,
        ranks=ranks,
        eps=eps,
        seeds=seeds,
        normal_nats=normal,
        normal_nats_se=error,
        worst_nats=worst,
        worst_nats_se=error,
        rv=rv,
        rv_se=error,
        adversarial_accuracy_bound=min(1.0, (worst + 0.6931) / 2.3026) if limits else None,
        adversarial_risk_bound=max(0.0, 1 - (worst + 0.6931) / 2.3026) if limits else None,
        fano_accuracy_bound=fano_accuracy_bound(max(worst, 0.0), 0.1) if limits else None,
        adversarial_accuracy=adversarial,
        adversarial_accuracy_low=max(adversarial - 0.03, 0.0),
        adversarial_accuracy_high=adversarial + 0.03,
        adversarial_gap=gap,
        details={**model.details, "per_seed": by_seed},
    )


def make_suite(
    models: int = 8, estimators: Sequence[str] = tuple(ESTIMATORS), radii: Sequence[float] = (EPS,), seeds: int = 3
) -> list[AuditRecord]:
    """Every model under every estimator at every radius."""
    members = itertools.product(range(models), estimators, radii)
    return [suite_member(model, estimator, eps, seeds) for model, estimator, eps in members]


def make_calibration(estimator: str = "sandwich", error: float = 0.02, channels: int = 9) -> list[CalibrationRow]:
    """An estimator that errs by at most `error` nats on channels with a tolerance of 0.1, and one without verdict."""
    rows = [
        CalibrationRow(
            channel=("gaussian", "two-points", "bits")[i % 3],
            parameters=f"sigma {i}",
            estimator=estimator,
            samples=1000,
            true_normal_nats=0.4 * i,
            normal_nats=0.4 * i + error * (-1) ** i * (i + 1) / channels,
            normal_nats_se=0.01,
            true_worst_nats=0.3 * i if i % 3 else None,
            worst_nats=0.3 * i - error / 2 if i % 3 else None,
            worst_nats_se=0.01 if i % 3 else None,
            normal_tolerance=0.1,
            worst_tolerance=0.1 if i % 3 else None,
        )
        for i in range(channels)
    ]
    shown = replace(rows[0], channel="uniform", normal_nats=9.0, true_normal_nats=1.0, normal_tolerance=None)
    return [*rows, shown]


def make_mixed_zoo() -> list[AuditRecord]:
    """The zoo with one contradicted and one failed model."""
    records = make_zoo()
    flags = ("contradicted: worst_nats 0.30 is under its floor 0.52", "saturated")
    records[2] = replace(records[2], flags=flags)
    empty = dict.fromkeys(("normal_nats", "worst_nats", "rv", "rv_se", "adversarial_accuracy_bound", "floor_nats"))
    records[7] = replace(records[7], status="failed", reason="the weights hold NaN", **empty)
    return records


@pytest.fixture
def zoo() -> list[AuditRecord]:
    return make_zoo()


@pytest.fixture
def mixed_zoo() -> list[AuditRecord]:
    return make_mixed_zoo()


@pytest.fixture(scope="session")
def mixed_page() -> str:
    """The page of the mixed zoo, drawn once."""
    return render_report(make_mixed_zoo())


@pytest.fixture
def hostile() -> list[AuditRecord]:
    return [
        make_record(cell_id=f"c-{i}", model=name, family=name, layer=name, flags=(name,), rv=1.0 + i / 10)
        for i, name in enumerate(HOSTILE_NAMES)
    ]


@pytest.fixture
def suite() -> Callable[..., list[AuditRecord]]:
    return make_suite


@pytest.fixture
def calibrated() -> Callable[..., list[CalibrationRow]]:
    return make_calibration


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[[list[AuditRecord]], Path]:
    """Write records as a run folder and return the folder."""

    def write(records: list[AuditRecord], name: str = "run") -> Path:
        store = RecordStore(tmp_path / name)
        for record in records:
            store.write(record)
        return tmp_path / name

    return write
