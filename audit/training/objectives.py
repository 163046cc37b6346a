"""Critics in two halves: what is seen of images, and the nats read from that and features.

A search that follows the features alone needs what is seen of the images once a step without a graph, or once in all.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from audit.errors import UnknownNameError, UsageError
from audit.information.bounds import BOUNDS, infonce
from audit.information.critics import CriticShape, DotProductCritic, build_critic
from audit.information.released.critic import ReferenceCritic, reference_value
from audit.types import Features, Images

OBJECTIVES = ("donsker-varadhan", "infonce")
SCORERS = ("dot-product", "ref-local", "ref-mean")


@dataclass(frozen=True)
class ScorerShape:
    """Which critic scores image and feature, how wide it is, and by which bound its scores become nats.

    `ref-local` and `ref-mean` are the authors' (width 2048 in the paper), `dot-product` sees the whole image.
    """

    name: str = "ref-local"
    width: int = 2048
    objective: str = "donsker-varadhan"

    def __post_init__(self) -> None:
        if self.name not in SCORERS:
            raise UnknownNameError("critic", self.name, SCORERS)
        if self.objective not in OBJECTIVES:
            raise UnknownNameError("objective", self.objective, OBJECTIVES)
        if self.width < 1:
            raise UsageError(f"critic width {self.width!r} must be at least 1")


class Scorer(nn.Module):
    """A critic T and a bound: images (N, C, H, W) and features (N, D) to a value () in nats.

    The authors' critic with `donsker-varadhan` gives the value that their code computes; with several positions the
    value is the mean over them.
    """

    def __init__(self, images: Images, features: Features, shape: ScorerShape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        # torch's layers draw weights from the global generator as they are made, before ours replace them
        with torch.random.fork_rng(devices=[]):
            self.critic = _critic(images, features, shape, generator).to(images.device)

    def view(self, images: Images) -> Tensor:
        """Return what the critic sees of images, one row an image: (N, ...)."""
        if isinstance(self.critic, ReferenceCritic):
            return self.critic.view(images)
        return cast(Tensor, cast(DotProductCritic, self.critic).of_image(images))

    def value(self, view: Tensor, features: Features) -> Tensor:
        """Return the nats () that what was seen of images tells of features (N, D), in full precision."""
        if torch.is_autocast_enabled(features.device.type):
            with torch.autocast(features.device.type, enabled=False):
                return self.value(view.float(), features.float())
        if isinstance(self.critic, ReferenceCritic):
            return self._of_positions(self.critic.scores(view, features))
        critic = cast(DotProductCritic, self.critic)
        return BOUNDS[self.shape.objective](view @ critic.of_feature(features).T * critic.scale)

    def forward(self, images: Images, features: Features) -> Tensor:
        """Return the value () in nats of images against features."""
        return self.value(self.view(images), features)

    def _of_positions(self, scores: Tensor) -> Tensor:
        local = self.shape.name == "ref-local"
        if self.shape.objective == "donsker-varadhan":
            return reference_value(scores, local)
        pooled = scores if local else scores.mean(0, keepdim=True)
        return torch.vmap(infonce)(pooled).mean()


def _critic(images: Images, features: Features, shape: ScorerShape, generator: torch.Generator) -> nn.Module:
    if shape.name == "dot-product":
        return build_critic(images, features, CriticShape(width=shape.width), generator)
    return ReferenceCritic(images, features, shape.width, generator)
