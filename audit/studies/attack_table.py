"""One classifier under the attacks of a published table, with what an adaptive attack and the checks make of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from audit.adversary.label_attack import AUDIT, LabelAttack
from audit.adversary.minimum_norm import DDN, CarliniWagner, Nearest, carlini_wagner, ddn
from audit.adversary.robustness import Alone, Target, alone, climb
from audit.adversary.threat import L2, Linf, ThreatModel
from audit.config.settings import AuditSettings
from audit.errors import UsageError
from audit.information.sandwich import Sandwich
from audit.proportion import Proportion, wilson
from audit.run.layer_audit import LayerAudit, assemble
from audit.studies.adaptive import Adaptive, Crafted, Nearby, adaptive, believed, craft, excess, failed_checks, right

_SINGLE = ("fgsm", "pgd")
_MULTIPLES = (0.5, 1.0, 1.5, 2.0, 10 / 3)  # of the smallest radius, for the curve and check 18

Progress = Callable[[str], None]


def _nobody(_stage: str) -> None:
    """Hear nothing."""


@dataclass(frozen=True)
class TableSettings:
    """What the table asks: radii in l-inf and one in l2, and how many images the costly attacks take.

    Published attacks and transfer run on all images given, the adaptive attack and the radii of the curve on the
    first `attack_images`. Slow attacks (Carlini & Wagner, DDN, Square by itself) and the sandwich take the first
    `slow_images`.
    """

    radii: tuple[float, ...] = (0.15, 0.3)
    l2: float = 2.0
    attack: LabelAttack = AUDIT
    attack_images: int = 500
    slow_images: int = 200
    nearest: CarliniWagner = field(default_factory=lambda: CarliniWagner(steps=100, searches=5))

    @property
    def name(self) -> str:
        """Return everything that decides the rows, in words."""
        attack = f"{self.attack.name}, version {self.attack.version}"
        return f"{self.radii} {self.l2} {attack} {self.attack_images} {self.slow_images} {self.nearest}"

    def __post_init__(self) -> None:
        if not self.radii:
            raise UsageError("radii () must be at least one: a table without a radius has no rows")
        for name in ("attack_images", "slow_images"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} must be at least 1")


@dataclass(frozen=True)
class Row:
    """One line of the table: an attack at a radius with its accuracy, or a layer with its nats.

    `access` is "white", "black" or "none"; `excess` the share of images that the adaptive attack breaks beyond a
    single one. `trusted` says whether the checks let a claim rest on the number, and `verdict` why. `accuracy_bound`
    is Theorem 3.4's ceiling, an estimated bound.
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


class Reading(NamedTuple):
    """A layer whose information is estimated: its name in the rows, a module with that layer, and the sandwich."""

    name: str
    module: nn.Module
    layer: str
    sandwich: Sandwich


class Study(NamedTuple):
    """One classifier with held-out images, images made against a substitute from these, and the layers to read."""

    subject: Target
    crafted: Sequence[Crafted]
    readings: Sequence[Reading]


def craft_all(substitute: Target, settings: TableSettings, seed: int) -> tuple[Crafted, ...]:
    """Return the images of every black-box line, made against a substitute."""
    balls: list[tuple[str, ThreatModel]] = [(name, Linf(eps)) for eps in settings.radii for name in _SINGLE]
    return tuple(craft(substitute, threat, name, seed) for name, threat in (*balls, ("cw", L2(settings.l2))))


def table_rows(study: Study, settings: TableSettings, seed: int, progress: Progress = _nobody) -> list[Row]:
    """Return every line of the table for one classifier; `progress` hears each of its `stages` as it starts.

    Raises what attacks and estimators raise.
    """
    subject, crafted = study.subject, study.crafted
    few, slow = _first(subject, settings.attack_images), _first(subject, settings.slow_images)
    rows = [_row("clean", right(subject.network, subject.images, subject.labels))]
    unions = []
    for eps in settings.radii:
        progress(f"attacks at {eps:g}")
        found, union = _attacked(subject, Linf(eps), crafted, settings, seed)
        unions.append(union)
        rows += found
    rows += [_black(subject, each) for each in crafted]
    progress("smallest l2 changes")
    rows += _euclidean(slow, crafted, settings, seed)
    progress("radii")
    rows += _radii(few, settings, seed)
    progress("information")
    for reading in study.readings:
        rows += _information(reading, slow, unions, settings, seed)
    return rows


def stages(settings: TableSettings) -> int:
    """Return how often `table_rows` tells its progress."""
    return len(settings.radii) + 3


def _attacked(
    subject: Target, threat: ThreatModel, crafted: Sequence[Crafted], settings: TableSettings, seed: int
) -> tuple[list[Row], Adaptive]:
    """Return the white-box lines of one radius in l-inf, and the union that they are held against."""
    few, slow = _first(subject, settings.attack_images), _first(subject, settings.slow_images)
    found = [alone(name, subject, threat, seed) for name in _SINGLE]
    square = alone("square", slow, threat, seed)
    nearby = Nearby([each.robust[: len(few.images)] for each in found], _near(crafted, threat, len(few.images)))
    union = adaptive(few, threat, settings.attack, nearby, seed)
    return [*(_white(each, union) for each in (*found, square)), _union(union)], union


def _first(subject: Target, count: int) -> Target:
    return Target(subject.network, subject.images[:count], subject.labels[:count])


def _near(crafted: Sequence[Crafted], threat: ThreatModel, count: int) -> list[Tensor]:
    return [each.images[:count] for each in crafted if each.threat == threat]


def _row(attack: str, robust: Tensor, threat: ThreatModel | None = None, access: str = "none") -> Row:
    return _line(attack, wilson(int(robust.sum()), len(robust)), threat, access)


def _line(attack: str, found: Proportion, threat: ThreatModel | None, access: str) -> Row:
    norm, eps = (threat.norm, threat.eps) if threat else ("", 0.0)
    return Row(attack, norm, eps, access, images=found.images, accuracy=found.value, low=found.low, high=found.high)


def _white(found: Alone, union: Adaptive) -> Row:
    more = excess(found.robust, union.robust)
    trusted, verdict = believed(more, len(union.robust))
    row = _row(found.name, found.robust, union.threat, "white")
    return replace(row, excess=more, trusted=trusted, verdict=verdict, passes=found.passes + found.forwards)


def _union(union: Adaptive) -> Row:
    note = "; ".join(part for part in (union.steps, failed_checks(union.tier.checks, "note")) if part)
    row = _row("adaptive", union.robust, union.threat, "white")
    trusted = union.tier.trustworthy
    return replace(row, trusted=trusted, verdict=union.verdict, note=note, passes=union.passes)


def _black(subject: Target, each: Crafted) -> Row:
    """Return the line of images made against the substitute: no gradient of the model itself enters it."""
    row = _row(each.attack, right(subject.network, each.images, subject.labels), each.threat, "black")
    note = f"the substitute itself keeps {each.left:.3f}"
    return replace(row, trusted=not each.failed, verdict=each.failed or "the substitute's gradients hold", note=note)


def _euclidean(subject: Target, crafted: Sequence[Crafted], settings: TableSettings, seed: int) -> list[Row]:
    """Return Carlini & Wagner's line and the union at the radius in l2."""
    threat = L2(settings.l2)
    arguments = subject.network, subject.images, subject.labels
    found = {"cw": carlini_wagner(*arguments, settings.nearest), "ddn": ddn(*arguments, DDN())}
    masks = [~each.broken(threat.eps) for each in found.values()]
    nearby = Nearby(masks, _near(crafted, threat, len(subject.images)))
    union = adaptive(subject, threat, settings.attack, nearby, seed)
    return [_white(_beyond("cw", found["cw"], threat), union), _union(union)]


def _beyond(name: str, found: Nearest, threat: ThreatModel) -> Alone:
    robust = ~found.broken(threat.eps)
    return Alone(name, wilson(int(robust.sum()), len(robust)), robust, found.passes, 0)


def _radii(subject: Target, settings: TableSettings, seed: int) -> list[Row]:
    """Return cross-entropy and margin at several radii: the curve, whose count must not rise and must end at none."""
    smallest = Linf(settings.radii[0])
    ladder = climb(subject, smallest, seed, _MULTIPLES)
    failed = failed_checks(ladder.checks, "note")
    return [
        replace(_line("two-losses", rung.accuracy, Linf(rung.eps), "white"), trusted=not failed, verdict=failed)
        for rung in ladder.rungs
    ]


def _information(
    reading: Reading, subject: Target, unions: Sequence[Adaptive], settings: TableSettings, seed: int
) -> list[Row]:
    """Return RV and Theorem 3.4 of one layer at each radius, by the sandwich of the smoothed representation."""
    audit = AuditSettings(reading.sandwich, settings.attack, seeds=(seed,))
    measured = LayerAudit(reading.module, subject.images, subject.labels, reading.layer, audit)
    rows = []
    for union in unions:
        found = assemble(union.tier, measured.under(union.threat), reading.layer, union.threat, audit)
        row = Row("sandwich", union.threat.norm, union.threat.eps, "white", reading.name, len(subject.images))
        rows.append(
            replace(row, normal_nats=found.normal_nats, worst_nats=found.worst_nats, rv=found.rv, rv_se=found.rv_se,
                    accuracy_bound=found.adversarial_accuracy_bound, passes=found.passes or 0,
                    trusted=not found.contradicted, verdict="; ".join(found.flags),
                    note=f"noise {reading.sandwich.noise:g} layer deviations")
        )  # fmt: skip
    return rows
