"""Training objectives for encoders: a critic of images and features, and a variational bound on their MI.

The critic's image branch is a separate method, so that a search that follows the features alone evaluates it without
gradients, once a step or once in all.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from audit.errors import UnknownNameError, UsageError
from audit.information.bounds import BOUNDS, infonce
from audit.information.critics import DotProductCritic, build_critic
from audit.information.released.critic import ReferenceCritic, reference_value
from audit.information.settings import CriticShape
from audit.types import Features, Images

OBJECTIVE_BOUNDS = ("donsker-varadhan", "infonce")
OBJECTIVE_CRITICS = ("dot-product", "ref-local", "ref-mean")


@dataclass(frozen=True)
class ObjectiveSettings:
    """The critic, its width, and the bound that turns its scores into nats.

    `ref-local` and `ref-mean` are the critics of the released code (width 2048 in the paper); `dot-product` sees the
    whole image.
    """

    name: str = "ref-local"
    width: int = 2048
    objective: str = "donsker-varadhan"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVE_CRITICS:
            raise UnknownNameError("critic", self.name, OBJECTIVE_CRITICS)
        if self.objective not in OBJECTIVE_BOUNDS:
            raise UnknownNameError("objective", self.objective, OBJECTIVE_BOUNDS)
        if self.width < 1:
            raise UsageError(f"critic width {self.width!r} must be at least 1")


class VariationalObjective(nn.Module):
    """A critic T with a variational bound: maps images (N, C, H, W) and features (N, D) to a value () in nats.

    A `ref-*` critic with `donsker-varadhan` gives the value of the released code. With several positions the value is
    their mean.
    """

    def __init__(
        self, images: Images, features: Features, settings: ObjectiveSettings, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.settings = settings
        # constructors of torch's layers draw from the global generator, before the weights are drawn from ours
        with torch.random.fork_rng(devices=[]):
            self.critic = _build_critic(images, features, settings, generator).to(images.device)

    def embed_images(self, images: Images) -> Tensor:
        """Return the output (N, ...) of the critic's image branch."""
        if isinstance(self.critic, ReferenceCritic):
            return self.critic.view(images)
        return cast(Tensor, cast(DotProductCritic, self.critic).of_image(images))

    def value(self, embedded: Tensor, features: Features) -> Tensor:
        """Return the value () in nats of embedded images against features (N, D), in float32 under autocast too."""
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return self.value(embedded.float(), features.float())
        if isinstance(self.critic, ReferenceCritic):
            return self._reduce_positions(self.critic.scores(embedded, features))
        critic = cast(DotProductCritic, self.critic)
        return BOUNDS[self.settings.objective](embedded @ critic.of_feature(features).T * critic.scale)

    def forward(self, images: Images, features: Features) -> Tensor:
        """Return the value () in nats of images (N, C, H, W) against features (N, D)."""
        return self.value(self.embed_images(images), features)

    def _reduce_positions(self, scores: Tensor) -> Tensor:
        per_position = self.settings.name == "ref-local"
        if self.settings.objective == "donsker-varadhan":
            return reference_value(scores, per_position=per_position)
        pooled = scores if per_position else scores.mean(0, keepdim=True)
        return torch.vmap(infonce)(pooled).mean()


def _build_critic(
    images: Images, features: Features, settings: ObjectiveSettings, generator: torch.Generator
) -> nn.Module:
    if settings.name == "dot-product":
        return build_critic(images, features, CriticShape(width=settings.width), generator)
    return ReferenceCritic(images, features, settings.width, generator)
