"""Passes through networks: batches limited by memory, gradients to images, and draws of randomised networks.

Randomised networks are attacked through the mean over draws, and evaluated by the majority vote of draws.

Source: Athalye et al. 2018, "Synthesizing Robust Adversarial Examples" (expectation over transformation).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import EnvironmentFault, InvalidModelError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images

DRAWS = 20
"""Draws of a randomised network, of which the mean or the majority vote is taken."""

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


class MemoryWarning(UserWarning):
    """A batch did not fit into memory; smaller ones are used from now on."""


class Batches:
    """Apply functions in batches of `size` entries; running out of memory halves `size` permanently, with a warning."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return a function's concatenated results (N, ...) on tensors of equal length N > 0.

        Raises EnvironmentFault if a single entry does not fit into memory.
        """
        results, done = [], 0
        while done < len(tensors[0]):
            try:
                results.append(function(*(tensor[done : done + self.size] for tensor in tensors)))
            except RuntimeError as error:
                if not any(message in str(error) for message in _MESSAGES):
                    raise
                self._halve(len(tensors[0]) - done)
            else:
                done += self.size
        return torch.cat(results)

    def _halve(self, remaining: int) -> None:
        tried = min(self.size, remaining)
        if tried == 1:
            raise EnvironmentFault("not enough memory to pass a single image through this network")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = (tried + 1) // 2
        message = f"not enough memory for batches of {tried}: reducing the batch size to {self.size}"
        warnings.warn(message, MemoryWarning, stacklevel=4)


def input_gradient(value: Tensor, images: Images, weights: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """Return the gradient (N, C, H, W) of a scalar, or of features weighted by `weights`, at the leaf images.

    `keep` retains the graph for another backward pass. Raises InvalidModelError if there is no gradient or it is not
    finite: otherwise the search would fail silently.
    """
    gradient = None
    if value.requires_grad:
        # autograd.grad, not backward: parameters keep no gradient and cost nothing
        (gradient,) = torch.autograd.grad(value, images, weights, retain_graph=keep, allow_unused=True)
    if gradient is None:
        raise InvalidModelError("the network gives no gradient to its input: its forward pass detaches the graph")
    # one sum reads the gradient once; count per image only if that sum is not finite, which may be by overflow
    bad = 0 if gradient.sum().isfinite() else int((~gradient.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the gradient to the input is not finite for {bad} of {len(images)} images")
    return gradient


class MeanOfDraws(nn.Module):
    """A network's mean output over 20 draws, (N, K); its gradient is the mean gradient of the draws."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the mean outputs."""
        return torch.stack([self.network(images) for _ in range(DRAWS)]).mean(0)


class MajorityVote(nn.Module):
    """Votes of 20 draws for each class, (N, K): the margin of the label is positive if it has the most votes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    @torch.no_grad()
    def forward(self, images: Images) -> Tensor:
        """Return the votes; an image with a non-finite output in any draw gets NaN votes."""
        votes = images.new_zeros(1)
        for _ in range(DRAWS):
            logits = self.network(images)
            invalid = (~logits.isfinite()).any(1, keepdim=True)
            vote = F.one_hot(logits.argmax(1), logits.shape[1]).to(images)
            votes = votes + vote.masked_fill(invalid, torch.nan)
        return votes


@contextmanager
def seeded_noise(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random numbers that a network draws from global generators, and restore these generators at exit."""
    key = keyed_generator(seed, Purpose.NETWORK_NOISE).initial_seed()
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(key)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield
