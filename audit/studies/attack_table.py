"""Rows of a published attack table for one classifier, each attack compared with an adaptive attack and checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from audit.adversary.label_attack import AUDIT, LabelAttack
from audit.adversary.minimum_norm import DDN, CarliniWagner, MinimumNormResult, carlini_wagner, ddn
from audit.adversary.robustness import TargetModel, measure_eps_curve
from audit.adversary.single_attacks import SingleAttackResult, run_attack
from audit.adversary.threat import L2, Linf, ThreatModel
from audit.config.settings import AuditSettings
from audit.errors import UsageError
from audit.flags import FlagCode, code_of
from audit.information.sandwich import Sandwich
from audit.proportion import Proportion, wilson
from audit.run.assembly import summarise
from audit.run.layer_audit import LayerAudit
from audit.studies.adaptive_attack import (
    AdaptiveResult,
    OtherAttacks,
    TransferImages,
    adaptive_attack,
    correct_mask,
    craft_transfer_images,
    describe_failed_checks,
    excess_broken,
    judge_single_attack,
)

_SINGLE_ATTACKS = ("fgsm", "pgd")
_CURVE_MULTIPLES = (0.5, 1.0, 1.5, 2.0, 10 / 3)  # of the smallest radius, for the accuracy curve

Progress = Callable[[str], None]


def _no_progress(_stage: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class AttackTableSettings:
    """Radii of the table (l-inf, and one in l2) and the number of images of costly attacks.

    Published and transfer attacks run on all images, the adaptive attack and the accuracy curve on the first
    `attack_images`, slow attacks (Carlini & Wagner, DDN, Square alone) and the sandwich on the first `slow_images`.
    """

    radii: tuple[float, ...] = (0.15, 0.3)
    l2: float = 2.0
    attack: LabelAttack = AUDIT
    attack_images: int = 500
    slow_images: int = 200
    nearest: CarliniWagner = field(default_factory=lambda: CarliniWagner(steps=100, searches=5))

    @property
    def name(self) -> str:
        """All settings that determine the rows, as a string for their identity."""
        attack = f"{self.attack.name}, version {self.attack.version}"
        return f"{self.radii} {self.l2} {attack} {self.attack_images} {self.slow_images} {self.nearest}"

    def __post_init__(self) -> None:
        if not self.radii:
            raise UsageError("radii () is empty; give at least one l-inf radius")
        for name in ("attack_images", "slow_images"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} must be at least 1")


@dataclass(frozen=True)
class AttackRow:
    """One row of the table: the accuracy under an attack at a radius, or the information of a layer in nats.

    `access` is "white", "black" or "none"; `excess` is the fraction of images that the adaptive attack breaks beyond a
    single attack. `trusted` is whether the checks support the number, `verdict` the reason. `accuracy_bound` is the
    estimated upper bound of Theorem 3.4.
    """

    attack: str
    norm: str = ""
    eps: float = 0.0
    access: str = "none"
    layer: str = ""
    images: int = 0
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    excess: float | None = None
    normal_nats: float | None = None
    worst_nats: float | None = None
    rv: float | None = None
    rv_se: float | None = None
    accuracy_bound: float | None = None
    passes: int = 0
    trusted: bool = True
    verdict: str = ""
    note: str = ""


class AuditedLayer(NamedTuple):
    """A layer whose information is estimated: its name in the rows, the module, its layer, and the estimator."""

    name: str
    module: nn.Module
    layer: str
    sandwich: Sandwich


class AttackedClassifier(NamedTuple):
    """A classifier with held-out images, the transfer images made from them, and the layers to audit."""

    target: TargetModel
    transfer: Sequence[TransferImages]
    layers: Sequence[AuditedLayer]


def craft_black_box_images(
    substitute: TargetModel, settings: AttackTableSettings, seed: int
) -> tuple[TransferImages, ...]:
    """Return the transfer images of every black-box row, made against a substitute."""
    balls: list[tuple[str, ThreatModel]] = [(name, Linf(eps)) for eps in settings.radii for name in _SINGLE_ATTACKS]
    return tuple(
        craft_transfer_images(substitute, threat, name, seed) for name, threat in (*balls, ("cw", L2(settings.l2)))
    )


def attack_table_rows(
    classifier: AttackedClassifier, settings: AttackTableSettings, seed: int, progress: Progress = _no_progress
) -> list[AttackRow]:
    """Return all rows of the table for one classifier; `progress` receives every stage as it starts.

    Raises the errors of attacks and estimators.
    """
    target, transfer = classifier.target, classifier.transfer
    attacked, slow = _first(target, settings.attack_images), _first(target, settings.slow_images)
    rows = [_mask_row("clean", correct_mask(target.network, target.images, target.labels))]
    unions = []
    for eps in settings.radii:
        progress(f"attacks at {eps:g}")
        found, union = _linf_rows(target, Linf(eps), transfer, settings, seed)
        unions.append(union)
        rows += found
    rows += [_black_box_row(target, each) for each in transfer]
    progress("smallest l2 changes")
    rows += _l2_rows(slow, transfer, settings, seed)
    progress("radii")
    rows += _curve_rows(attacked, settings, seed)
    progress("information")
    for audited in classifier.layers:
        rows += _information_rows(audited, slow, unions, settings, seed)
    return rows


def stage_count(settings: AttackTableSettings) -> int:
    """Return how often `attack_table_rows` reports progress."""
    return len(settings.radii) + 3


def _linf_rows(
    target: TargetModel,
    threat: ThreatModel,
    transfer: Sequence[TransferImages],
    settings: AttackTableSettings,
    seed: int,
) -> tuple[list[AttackRow], AdaptiveResult]:
    """Return the white-box rows of one l-inf radius, and the union they are compared with."""
    attacked, slow = _first(target, settings.attack_images), _first(target, settings.slow_images)
    found = [run_attack(name, target, threat, seed) for name in _SINGLE_ATTACKS]
    square = run_attack("square", slow, threat, seed)
    others = OtherAttacks(
        [each.robust[: len(attacked.images)] for each in found],
        _transfer_images(transfer, threat, len(attacked.images)),
    )
    union = adaptive_attack(attacked, threat, settings.attack, others, seed)
    return [*(_white_box_row(each, union) for each in (*found, square)), _union_row(union)], union


def _first(target: TargetModel, count: int) -> TargetModel:
    return TargetModel(target.network, target.images[:count], target.labels[:count])


def _transfer_images(transfer: Sequence[TransferImages], threat: ThreatModel, count: int) -> list[Tensor]:
    return [each.images[:count] for each in transfer if each.threat == threat]


def _mask_row(attack: str, robust: Tensor, threat: ThreatModel | None = None, access: str = "none") -> AttackRow:
    return _accuracy_row(attack, wilson(int(robust.sum()), len(robust)), threat, access)


def _accuracy_row(attack: str, found: Proportion, threat: ThreatModel | None, access: str) -> AttackRow:
    norm, eps = (threat.norm, threat.eps) if threat else ("", 0.0)
    return AttackRow(
        attack, norm, eps, access, images=found.images, accuracy=found.value, low=found.low, high=found.high
    )


def _white_box_row(found: SingleAttackResult, union: AdaptiveResult) -> AttackRow:
    excess = excess_broken(found.robust, union.robust)
    trusted, verdict = judge_single_attack(excess, len(union.robust))
    row = _mask_row(found.name, found.robust, union.threat, "white")
    return replace(row, excess=excess, trusted=trusted, verdict=verdict, passes=found.passes + found.forwards)


def _union_row(union: AdaptiveResult) -> AttackRow:
    note = "; ".join(part for part in (union.steps, describe_failed_checks(union.tier.checks, "note")) if part)
    row = _mask_row("adaptive", union.robust, union.threat, "white")
    trusted = union.tier.trustworthy
    return replace(row, trusted=trusted, verdict=union.verdict, note=note, passes=union.passes)


def _black_box_row(target: TargetModel, each: TransferImages) -> AttackRow:
    """Return the row of transfer images; the attack uses no gradient of the model."""
    row = _mask_row(each.attack, correct_mask(target.network, each.images, target.labels), each.threat, "black")
    note = f"the substitute itself keeps {each.left:.3f}"
    return replace(row, trusted=not each.failed, verdict=each.failed or "the substitute's gradients hold", note=note)


def _l2_rows(
    target: TargetModel, transfer: Sequence[TransferImages], settings: AttackTableSettings, seed: int
) -> list[AttackRow]:
    """Return the rows of Carlini & Wagner and of the union at the l2 radius."""
    threat = L2(settings.l2)
    arguments = target.network, target.images, target.labels
    found = {"cw": carlini_wagner(*arguments, settings.nearest), "ddn": ddn(*arguments, DDN())}
    masks = [~each.broken(threat.eps) for each in found.values()]
    others = OtherAttacks(masks, _transfer_images(transfer, threat, len(target.images)))
    union = adaptive_attack(target, threat, settings.attack, others, seed)
    return [_white_box_row(_at_radius("cw", found["cw"], threat), union), _union_row(union)]


def _at_radius(name: str, found: MinimumNormResult, threat: ThreatModel) -> SingleAttackResult:
    robust = ~found.broken(threat.eps)
    return SingleAttackResult(name, wilson(int(robust.sum()), len(robust)), robust, found.passes, 0)


def _curve_rows(target: TargetModel, settings: AttackTableSettings, seed: int) -> list[AttackRow]:
    """Return the curve of two losses over radii; its checks are `eps_monotonicity` and `unbounded_eps`."""
    smallest = Linf(settings.radii[0])
    curve = measure_eps_curve(target, smallest, seed, _CURVE_MULTIPLES)
    failed = describe_failed_checks(curve.checks, "note")
    return [
        replace(
            _accuracy_row("two-losses", point.accuracy, Linf(point.eps), "white"), trusted=not failed, verdict=failed
        )
        for point in curve.points
    ]


def _information_rows(
    audited: AuditedLayer,
    target: TargetModel,
    unions: Sequence[AdaptiveResult],
    settings: AttackTableSettings,
    seed: int,
) -> list[AttackRow]:
    """Return RV and the bound of Theorem 3.4 of one layer at each radius, estimated by the sandwich."""
    audit = AuditSettings(audited.sandwich, settings.attack, seeds=(seed,))
    measured = LayerAudit(audited.module, target.images, target.labels, audited.layer, audit)
    rows = []
    for union in unions:
        found = summarise(union.tier, measured.under(union.threat), audit)
        row = AttackRow("sandwich", union.threat.norm, union.threat.eps, "white", audited.name, len(target.images))
        rows.append(
            replace(
                row,
                normal_nats=found.normal.nats,
                worst_nats=found.worst.nats,
                rv=found.rv.nats,
                rv_se=found.rv.stderr,
                accuracy_bound=found.bounds.get("adversarial_accuracy_bound"),
                passes=found.passes,
                trusted=FlagCode.CONTRADICTED not in map(code_of, found.flags),
                verdict="; ".join(found.flags),
                note=_noise_note(audited.sandwich),
            )
        )
    return rows


def _noise_note(sandwich: Sandwich) -> str:
    if sandwich.noise is None:
        return f"noise under which the images hold {sandwich.target_nats:g} nats"
    return f"noise {sandwich.noise:g} layer deviations"
