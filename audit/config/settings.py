"""The settings of an audit: estimator, attack, seeds and reduction."""

from dataclasses import dataclass, field

from audit.adversary.label_attack import AUDIT, LabelAttack
from audit.errors import UsageError
from audit.information.estimator import ESTIMATORS, Estimator
from audit.representation.layers import Reduction


@dataclass(frozen=True)
class AuditSettings:
    """Everything that decides the numbers of an audit beside model, images and threat model.

    `certificate` asks for the certificate of any head, `ledger` also for the images that the network provably keeps.
    Raises UsageError without a seed, or for a repeated one.
    """

    estimator: Estimator = field(default_factory=lambda: ESTIMATORS["sandwich"])
    attack: LabelAttack = AUDIT
    seeds: tuple[int, ...] = (0, 1, 2)
    reduce: Reduction = "flatten"
    certificate: bool = False
    ledger: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds {list(self.seeds)} must be at least one, each named once")
