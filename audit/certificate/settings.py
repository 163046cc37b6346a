"""Settings of a certificate."""

from dataclasses import dataclass, field
from math import inf

from audit.certificate.collision_search import SearchEffort
from audit.certificate.equality import EqualityTier, find_tier
from audit.errors import UsageError

CERTIFICATE_VERSION = 4  # raised when the same settings may find other collisions or train other heads
LEDGER_VERSION = 2  # raised when the same settings may prove other images


@dataclass(frozen=True)
class CertificateSettings:
    """Equality tier, search effort, confidence of the population bound, and resources.

    `seconds` limits branch and bound: stopped early, it gives a looser but still valid bound. A layer is not applicable
    if a single Jacobian costs more than `jacobian_passes` forward+backward passes an image. Raises UnknownNameError for
    an unknown tier, UsageError for a confidence outside (0, 1).
    """

    tier: EqualityTier = "bit-identical at float32"
    effort: SearchEffort = field(default_factory=SearchEffort)
    confidence: float = 0.95
    seconds: float = 60.0
    seed: int = 0
    batch_size: int = 64  # on a CPU a larger one is slower for large networks, a smaller one for small networks
    jacobian_passes: float = inf

    def __post_init__(self) -> None:
        find_tier(self.tier)
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence {self.confidence!r} is not between 0 and 1: write 0.95 for 95 %")
