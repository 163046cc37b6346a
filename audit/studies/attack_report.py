"""Report on attacks of one model: accuracies, checks of the attack, accuracy against eps, single attacks, transfer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from torch import Tensor

from audit.adversary.attack_checks import Check, trustworthy, verdict
from audit.adversary.comparison_checks import check_transfer
from audit.adversary.label_attack import TIERS
from audit.adversary.passes import frozen_parameters
from audit.adversary.robustness import (
    EPS_MULTIPLES,
    EpsCurve,
    EpsPoint,
    Robustness,
    TargetModel,
    compare_attacks,
    evaluate_robustness,
    measure_eps_curve,
    measure_target,
)
from audit.adversary.single_attacks import ATTACKS, SingleAttackResult, run_attack, transfer_matrix
from audit.adversary.staged.outcome import Accuracy
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError
from audit.run.cell import DEFAULT_RULES, InputRules
from audit.run.loading import RunOptions, batches_for, open_images_for, open_model
from audit.run.upkeep.pass_meter import StageMeter, expected_attack_passes

CHECKS = ("all", "trust", "none")
_SINGLE, _COMPARED = 100, 400  # passes of an image in a single attack, and in the comparison of attacks
STAGES = 4  # of a report, beside the single attacks


@dataclass(frozen=True)
class AttackRequest:
    """A model, its data set and threat model, and the attacks on it.

    `tier` is the name of the attack tier, `attacks` are further attacks, each run by itself, and `sources` are models
    whose adversarial images are transferred. `images` limits the number of images (None: all); they are preprocessed
    and labelled for `model` under `rules`. `checks` are the checks to make: `all`, also against weaker and stronger
    attacks and over radii; `trust`, those that decide whether the attack can be trusted; `none`. Raises
    UnknownNameError for an unknown attack, tier or set of checks.
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
    checks: str = "all"

    def __post_init__(self) -> None:
        if self.checks not in CHECKS:
            raise UnknownNameError("set of checks", self.checks, CHECKS)
        if self.tier not in TIERS:
            raise UnknownNameError("attack tier", self.tier, TIERS)
        for name in self.attacks:
            if name not in ATTACKS and name != "autoattack":
                raise UnknownNameError("attack", name, ATTACKS)


_UNCHECKED: dict[str, Any] = {"trustworthy": None, "verdict": "not checked", "checks": []}


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
    watch("loading", 0)
    targets = _targets(request, options)
    network, images, stages = targets[request.model].network, targets[request.model].images, StageMeter(watch)
    with batches_for(network, images, options), stages.counting(_expected_passes(request, len(images))):
        return _report(request, targets, stages)


def _expected_passes(request: AttackRequest, images: int) -> float:
    """Return about how many passes a report takes."""
    norm = request.threat.norm
    found = expected_attack_passes(TIERS[request.tier], images, norm) + _SINGLE * images * len(request.attacks)
    if request.checks == "all":
        curve = len(EPS_MULTIPLES) * expected_attack_passes(TIERS["smoke"], images, norm)
        found += _COMPARED * min(images, 100) + curve
    return found


def _report(request: AttackRequest, targets: dict[str, TargetModel], watch: Watch) -> AttackReport:
    attack, seed, threat = TIERS[request.tier], request.seed, request.threat
    target = targets[request.model]
    watch(f"{request.model}: {attack.name_in(threat.norm)}", 0)
    robustness, curve, checks = _attacked(request, target), None, list[Check]()
    if request.checks == "trust":
        checks += [check for check in robustness.checks if check.level == "trust"]
    if request.checks == "all":
        watch("comparison of attacks", 1)
        comparison = compare_attacks(target, threat, attack, seed)
        watch("accuracy against eps", 2)
        curve = measure_eps_curve(target, threat, seed)
        checks += [*robustness.checks, *comparison, *curve.checks]
    singles = []
    for done, name in enumerate(request.attacks):
        watch(name, 3 + done)
        singles.append(run_attack(name, target, threat, seed))
    watch("transfer", 3 + len(request.attacks))
    matrix = transfer_matrix(targets, threat, seed) if request.sources else {}
    accuracy = robustness.accuracy
    robust = accuracy.robust
    if request.checks != "none":
        checks += [check_transfer(robust, robust & matrix[source][request.model]) for source in request.sources]
    summary = {
        "model": request.model,
        "dataset": request.dataset,
        "norm": threat.norm,
        "eps": threat.eps,
        "seed": seed,
        **_accuracy_entries(accuracy),
        **(_verdict_entries(checks) if request.checks != "none" else _UNCHECKED),
        "eps_curve": [_point_entries(point) for point in curve.points] if curve else [],
        "attacks": [_single_entries(each) for each in singles],
        "transfer": {source: _shares(row) for source, row in matrix.items()},
    }
    return AttackReport(summary, _image_rows(target, accuracy, curve))


def _attacked(request: AttackRequest, target: TargetModel) -> Robustness:
    """Return the accuracies under the tier, with its checks unless none is asked for."""
    attack, threat, seed = TIERS[request.tier], request.threat, request.seed
    if request.checks != "none":
        return evaluate_robustness(target, threat, attack, seed)
    with frozen_parameters(target.network):
        found = target.detect_randomness(seed)
        return Robustness(measure_target(found, threat.within(found.images), attack, seed), ())


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


def _image_rows(target: TargetModel, found: Accuracy, curve: EpsCurve | None) -> list[dict[str, Any]]:
    """Return one row per image: its label, the stage and step that broke it, and the smallest radius that did.

    Without a curve over radii the smallest one is not known.
    """
    outcome = found.outcome
    columns = zip(
        target.labels.tolist(),
        outcome.correct.tolist(),
        outcome.robust.tolist(),
        outcome.stage.tolist(),
        outcome.step.tolist(),
        outcome.margin.tolist(),
        curve.smallest.tolist() if curve else [inf] * len(target.labels),
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
