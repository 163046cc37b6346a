"""The paper's estimator: a critic that sees the whole image, trained on one part of the images and read on another.

Source: Zhu, Zhang & Evans 2020, section 4.1; Belghazi et al. 2018 (MINE).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from audit.adversary.threat import ThreatModel
from audit.information.critic_descent import Adversary, WorstCaseSearch, estimate_vulnerability
from audit.information.critic_training import (
    CriticTraining,
    EncodedSplits,
    encode_clean,
    fit_critic,
    split_images,
    split_indices,
)
from audit.information.critics import CriticShape
from audit.information.estimator import NOTHING_KNOWN, Estimator, Known, MIEstimate, Subject, Vulnerability
from audit.types import Encoded


@dataclass(frozen=True)
class Mine(Estimator):
    """A critic's held-out value, or the entropy of the network's answers where that is larger."""

    training: CriticTraining = field(default_factory=CriticTraining)
    search: WorstCaseSearch = field(default_factory=WorstCaseSearch)

    quantity: ClassVar[str] = "I(X; g(X))"

    @property
    def name(self) -> str:
        """Return the estimator as tables show it, such as `mine-infonce`."""
        critic = self.training.shape.name
        return f"mine-{self.training.bound}" + (f"-{critic}" if critic != CriticShape.name else "")

    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the held-out value on the images as they are."""
        parts = split_indices(len(subject.images), seed)
        known = encode_clean(subject, self.training.batch_size)
        encoded = EncodedSplits(*(Encoded(*(said[part.to(said.device)] for said in known)) for part in parts))
        return fit_critic(split_images(subject.images, seed), encoded, self.training, seed)[1]

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; the worst-case images are those of the held-out part."""
        images, adversary = split_images(subject.images, seed), Adversary(threat, self.search)
        parts = split_indices(len(subject.images), seed)
        order = torch.cat([*parts])
        if known.start is not None:
            known = known._replace(start=known.start[order])
        found = estimate_vulnerability(subject.encoder, images, self.training, adversary, seed, known)
        others = None if found.others is None else found.others[order[: -len(parts.test)].argsort()]
        return found._replace(which=parts.test, others=others)
