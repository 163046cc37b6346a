"""Estimator `mine`: mutual information between images and representation by a critic, as in the paper.

Source: Zhu, Zhang & Evans 2020, section 4.1; Belghazi et al. 2018 (MINE).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from audit.adversary.threat import ThreatModel
from audit.information.critic_search.descent import estimate_vulnerability
from audit.information.critic_search.merging import Adversary
from audit.information.critic_training import estimate_fixed
from audit.information.encoding import EncodedSplits, encode_clean, split_images, split_indices
from audit.information.estimator import (
    COLD_START,
    Estimator,
    EstimatorInputs,
    MIEstimate,
    Vulnerability,
    WarmStart,
)
from audit.information.settings import MineSettings
from audit.types import Encoded


@dataclass(frozen=True)
class Mine(MineSettings, Estimator):
    """Estimate of I(X; g(X)) in nats by a critic T(x, z), evaluated on held-out images.

    max(E_i[T(x_i, z_i) - ln (1/N) sum_j exp T(x_i, z_j)], H(argmax)), the InfoNCE bound of N held-out pairs or the
    entropy of the predicted classes, whichever is larger; at most ln N. Images are (N, C, H, W) in [0, 1], features
    (N, D). Half of the images train the critic, a fifth chooses its step, the rest (at least ten) is held out. The
    value is the mean over critics with different divisions of the images.

    The worst case moves all images inside their eps-balls: to one class, then to where a kernel between features tells
    least of which images are alike, and then down the values of critics, until twice as many steps bring little; new
    critics are fitted on the result. Every candidate is an upper bound on the minimum, up to the critics' error.

    Raises UsageError for fewer than 50 images or a setting that is not legal; InvalidModelError if a feature or a
    gradient is not finite.

    Source: Zhu, Zhang & Evans 2020, section 4.1; van den Oord et al. 2018 (InfoNCE).
    """

    quantity: ClassVar[str] = "I(X; g(X))"
    version: ClassVar[int] = 3

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the held-out value on the clean images."""
        parts = split_indices(len(inputs.images), seed)
        clean = encode_clean(inputs, self.training.batch_size)
        encoded = EncodedSplits(*(Encoded(*(each[part.to(each.device)] for each in clean)) for part in parts))
        images = split_images(inputs.images, seed)
        return estimate_fixed(images, encoded, self.training, self.search.repeats, seed)

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return both cases; the adversarial images are those of the held-out part."""
        images, adversary = split_images(inputs.images, seed), Adversary(threat, self.search)
        parts = split_indices(len(inputs.images), seed)
        order = torch.cat([*parts])
        if warm_start.images is not None:
            warm_start = warm_start._replace(images=warm_start.images[order])
        found = estimate_vulnerability(inputs.encoder, images, self.training, adversary, seed, warm_start)
        others = None if found.others is None else found.others[order[: -len(parts.test)].argsort()]
        return found._replace(indices=parts.test, others=others)
