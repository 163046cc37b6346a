"""Report on attacks of one model: accuracies, checks of the attack, accuracy against eps, single attacks, transfer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from audit.adversary.accuracy import Accuracy
from audit.adversary.attack_checks import Check, trustworthy, verdict
from audit.adversary.comparison_checks import check_transfer
from audit.adversary.label_attack import TIERS
from audit.adversary.robustness import (
    EpsCurve,
    EpsPoint,
    TargetModel,
    compare_attacks,
    evaluate_robustness,
    measure_eps_curve,
)
from audit.adversary.single_attacks import ATTACKS, SingleAttackResult, run_attack, transfer_matrix
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError
from audit.run.cell import DEFAULT_RULES, InputRules
from audit.run.loading import RunOptions, open_images_for, open_model

STAGES = 4  # of a report, beside the single attacks


@dataclass(frozen=True)
class AttackRequest:
    """A model, its data set and threat model, and the attacks on it.

    `tier` is the name of the attack tier, `attacks` are further attacks, each run by itself, and `sources` are models
    whose adversarial images are transferred. `images` limits the number of images (None: all); they are preprocessed
    and labelled for `model` under `rules`. Raises
    UnknownNameError for an unknown attack or tier.
    """

    model: str
    dataset: str
    threat: ThreatModel
    tier: str = "audit"
    attacks: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    images: int | None = None
    seed: int = 0
    rules: InputRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise UnknownNameError("attack tier", self.tier, TIERS)
        for name in self.attacks:
            if name not in ATTACKS and name != "autoattack":
                raise UnknownNameError("attack", name, ATTACKS)


class AttackReport(NamedTuple):
    """Summary of the attacks as JSON data, and one row per image."""

    summary: dict[str, Any]
    image_rows: list[dict[str, Any]]


Watch = Callable[[str, int], None]
"""Called with the stage that begins and the number of completed ones."""


def attack_report(
    request: AttackRequest, options: RunOptions, watch: Watch = lambda _stage, _done: None
) -> AttackReport:
    """Attack a model and report on it. Raises what loading and the attacks raise."""
    attack, seed, threat = TIERS[request.tier], request.seed, request.threat
    targets = _targets(request, options)
    target = targets[request.model]
    watch(f"{request.model}: {attack.name_in(threat.norm)}", 0)
    robustness = evaluate_robustness(target, threat, attack, seed)
    watch("comparison of attacks", 1)
    comparison = compare_attacks(target, threat, attack, seed)
    watch("accuracy against eps", 2)
    curve = measure_eps_curve(target, threat, seed)
    singles = []
    for done, name in enumerate(request.attacks):
        watch(name, 3 + done)
        singles.append(run_attack(name, target, threat, seed))
    watch("transfer", 3 + len(request.attacks))
    matrix = transfer_matrix(targets, threat, seed) if request.sources else {}
    accuracy = robustness.accuracy
    robust = accuracy.robust
    transfers = [check_transfer(robust, robust & matrix[source][request.model]) for source in request.sources]
    checks = [*robustness.checks, *comparison, *curve.checks, *transfers]
    summary = {
        "model": request.model,
        "dataset": request.dataset,
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        **_accuracy_entries(accuracy),
        **_verdict_entries(checks),
        "eps_curve": [_point_entries(point) for point in curve.points],
        "attacks": [_single_entries(each) for each in singles],
        "transfer": {source: _shares(row) for source, row in matrix.items()},
    }
    return AttackReport(summary, _image_rows(target, accuracy, curve))


def _targets(request: AttackRequest, options: RunOptions) -> dict[str, TargetModel]:
    asked = options.request(request.images)
    images = open_images_for(request.model, request.dataset, options, asked, request.rules)
    refs = (request.model, *request.sources)
    networks = {ref: open_model(ref, images, options, min_images=1).network for ref in refs}
    return {ref: TargetModel(network, images.images, images.labels) for ref, network in networks.items()}


def _accuracy_entries(found: Accuracy) -> dict[str, Any]:
    stage = found.outcome.stage
    return {
        "attack": "+".join(found.names),
        "images": found.natural.images,
        "natural_accuracy": found.natural.value,
        "natural_accuracy_low": found.natural.low,
        "natural_accuracy_high": found.natural.high,
        "adversarial_accuracy": found.adversarial.value,
        "adversarial_accuracy_low": found.adversarial.low,
        "adversarial_accuracy_high": found.adversarial.high,
        "passes": found.passes,
        "forwards": found.forwards,
        "broken_by": {name: int((stage == number).sum()) for number, name in enumerate(found.names)},
    }


def _verdict_entries(checks: Sequence[Check]) -> dict[str, Any]:
    return {
        "trustworthy": trustworthy(checks),
        "verdict": verdict(checks),
        "checks": [check._asdict() for check in checks],
    }


def _point_entries(point: EpsPoint) -> dict[str, Any]:
    share = point.accuracy
    return {"eps": point.eps, "adversarial_accuracy": share.value, "low": share.low, "high": share.high}


def _single_entries(found: SingleAttackResult) -> dict[str, Any]:
    share = found.accuracy
    return {
        "attack": found.name,
        "adversarial_accuracy": share.value,
        "low": share.low,
        "high": share.high,
        "passes": found.passes,
        "forwards": found.forwards,
    }


def _shares(row: dict[str, Tensor]) -> dict[str, float]:
    return {target: float(correct.float().mean()) for target, correct in row.items()}


def _image_rows(target: TargetModel, found: Accuracy, curve: EpsCurve) -> list[dict[str, Any]]:
    """Return one row per image: its label, the stage and step that broke it, and the smallest radius that did."""
    outcome = found.outcome
    columns = zip(
        target.labels.tolist(),
        outcome.correct.tolist(),
        outcome.robust.tolist(),
        outcome.stage.tolist(),
        outcome.step.tolist(),
        outcome.margin.tolist(),
        curve.smallest.tolist(),
        strict=True,
    )
    return [
        {
            "index": index,
            "label": label,
            "correct": int(correct),
            "robust": int(robust),
            "broken_by": found.names[stage] if stage >= 0 else "",
            "step": step if stage >= 0 else "",
            "margin": f"{margin:.6g}",
            "smallest_eps": "" if smallest == inf else f"{smallest:.6g}",
        }
        for index, (label, correct, robust, stage, step, margin, smallest) in enumerate(columns)
    ]
