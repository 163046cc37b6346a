"""The settings of an audit: estimator, attack, seeds and reduction."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import get_args

from audit.adversary.label_attack import AUDIT, TIERS, LabelAttack
from audit.errors import UnknownNameError, UsageError
from audit.information.estimator import ESTIMATORS, Estimator
from audit.representation.layers import Reduction


def estimator_of(value: object) -> Estimator:
    """Return an estimator given as an object, as its class (with its defaults), or by name.

    Raises UnknownNameError for an unknown name, UsageError for anything else.
    """
    if isinstance(value, Estimator):
        return value
    if isinstance(value, str):
        if value not in ESTIMATORS:
            raise UnknownNameError("estimator", value, ESTIMATORS)
        return ESTIMATORS[value]
    if isinstance(value, type) and issubclass(value, Estimator):
        return value()
    raise UsageError(
        f"estimator {value!r} is not legal: write one of {', '.join(ESTIMATORS)}, or an object: Sandwich()"
    )


def attack_of(value: object) -> LabelAttack:
    """Return an attack given as an object or by the name of its tier; raises UnknownNameError, UsageError."""
    if isinstance(value, LabelAttack):
        return value
    if isinstance(value, str):
        if value not in TIERS:
            raise UnknownNameError("attack tier", value, TIERS)
        return TIERS[value]
    raise UsageError(f"attack {value!r} is not legal: write one of {', '.join(TIERS)}, or a LabelAttack")


def seeds_of(value: object) -> tuple[int, ...]:
    """Return seeds given as a sequence of whole numbers; raises UsageError without a seed, or for a repeated one."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise UsageError(f"seeds {value!r} is not a sequence of whole numbers: write (0, 1, 2) for three seeds")
    seeds = tuple(value)
    if not all(hasattr(seed, "__index__") for seed in seeds):
        raise UsageError(f"seeds {list(seeds)} must be whole numbers, such as (0, 1, 2)")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds {list(seeds)} must be at least one, each named once")
    return tuple(seed.__index__() for seed in seeds)


@dataclass(frozen=True)
class AuditSettings:
    """Everything that decides the numbers of an audit beside model, images and threat model.

    An estimator and an attack may be given by name: `AuditSettings("label-information", "smoke")`. `certificate` asks
    for the certificate of any head, `ledger` also for the images that the network provably keeps. Raises
    UnknownNameError for an unknown name, UsageError for other values, without a seed, or for a repeated one.
    """

    estimator: Estimator = field(default_factory=lambda: ESTIMATORS["sandwich"])
    attack: LabelAttack = AUDIT
    seeds: tuple[int, ...] = (0, 1, 2)
    reduce: Reduction = "flatten"
    certificate: bool = False
    ledger: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in get_args(Reduction):
            raise UnknownNameError("reduction", str(self.reduce), get_args(Reduction))
        for name, convert in (("estimator", estimator_of), ("attack", attack_of), ("seeds", seeds_of)):
            object.__setattr__(self, name, convert(getattr(self, name)))
