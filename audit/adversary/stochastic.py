"""Networks that draw at random: attacked through the mean of many draws, judged by what most draws say.

Source: Athalye et al. 2018, "Synthesizing Robust Adversarial Examples" (expectation over transformation).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.random_keys import Purpose, keyed_generator
from audit.types import Images

DRAWS = 20


class MeanOfDraws(nn.Module):
    """A network's mean output over 20 draws (N, K): its gradient is the mean of theirs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the mean outputs."""
        return torch.stack([self.network(images) for _ in range(DRAWS)]).mean(0)


class Majority(nn.Module):
    """How many of 20 draws name each class (N, K): the label has a margin above 0 where most draws name it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """Return the votes; a draw that is not a number gives rows that are not."""
        votes = images.new_zeros(1)
        for _ in range(DRAWS):
            logits = self.network(images)
            unfit = (~logits.isfinite()).any(1, keepdim=True)
            vote = F.one_hot(logits.argmax(1), logits.shape[1]).to(images)
            votes = votes + vote.masked_fill(unfit, torch.nan)
        return votes


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Give a network that draws noise its own, the same for the same seed, and put the global generators back."""
    key = keyed_generator(seed, Purpose.NETWORK_NOISE).initial_seed()
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(key)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield
