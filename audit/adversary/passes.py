"""Passes through networks: batches limited by memory, gradients to images, and draws of randomised networks.

Randomised networks are attacked through the mean over draws, and evaluated by the majority vote of draws.

Source: Athalye et al. 2018, "Synthesizing Robust Adversarial Examples" (expectation over transformation).
"""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.adversary.memory.counting import count_passes
from audit.adversary.memory.limit import allowed
from audit.errors import EnvironmentFault, InvalidModelError
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, relieved

DRAWS = 20
"""Draws of a randomised network, of which the mean or the majority vote is taken."""

_TOLERANCE = 1e-4  # of a rewrite: of the spread of values, and of the length of gradients
_NARROWEST = 1e-6  # rows of logits
_SHORTEST = 1e-18  # squares of smaller numbers lose digits in float32
_HALF_TYPES = (torch.float16, torch.bfloat16)
_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")


class MemoryWarning(UserWarning):
    """A batch did not fit into memory; smaller ones are used from now on."""


class Batches:
    """Apply functions in batches of at most `size` entries, fewer where `fitting_batches` limits them.

    Running out of memory halves `size` permanently, with a warning. With `exactly`, a size that decides what is
    compared is not limited.
    """

    def __init__(self, size: int, *, exactly: bool = False) -> None:
        self.size = size if exactly else allowed(size)

    def run(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Return a function's concatenated results (N, ...) on tensors of equal length N > 0.

        Raises EnvironmentFault if a single entry does not fit into memory.
        """
        results, done, passed = [], 0, 0
        while done < len(tensors[0]):
            try:
                results.append(function(*(tensor[done : done + self.size] for tensor in tensors)))
            except RuntimeError as error:
                if not any(message in str(error) for message in _MESSAGES):
                    raise
                self._halve(len(tensors[0]) - done)
            else:
                count_passes(min(self.size, len(tensors[0]) - done))
                done += self.size
                passed = relieved(passed + self.size, tensors[0])
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


def outputs_of(network: Callable[[Images], Tensor], images: Images) -> Tensor:
    """Return a network's outputs for a copy of the images (N, C, H, W), so that it cannot change ours in place.

    Outputs of 16 bits, such as those of a network that uses autocast, become float32.
    """
    outputs = in_full_precision(network(images.clone()))
    if images.requires_grad and isinstance(outputs, Tensor):
        _look_for_checkpoints(network, outputs)
    return outputs


_examined: WeakSet[Callable[[Images], Tensor]] = WeakSet()
_checkpoints_seen = threading.Event()


def _look_for_checkpoints(network: Callable[[Images], Tensor], outputs: Tensor) -> None:
    """Note whether a network uses reentrant checkpoints, the first time that it builds a graph."""
    if network in _examined or outputs.grad_fn is None:
        return
    _examined.add(network)
    left, seen = [outputs.grad_fn], {outputs.grad_fn}
    while left:
        node = left.pop()
        if node.name() == "CheckpointFunctionBackward":
            _checkpoints_seen.set()
            return
        following = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= following
        left += following


def in_full_precision(values: Tensor) -> Tensor:
    """Return values of 16 bits as float32, and others, even no tensors, unchanged."""
    return values.float() if isinstance(values, Tensor) and values.dtype in _HALF_TYPES else values


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-probabilities (N, K) of logits, of which the most likely class is that of the largest logit.

    Rows that differ by less than 1e-6 are stretched by a power of two: float32 has no room for their log-probabilities,
    and all classes would be equally likely.
    """
    ranges = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    narrow = (ranges > 0) & (ranges < _NARROWEST)
    if narrow.any():
        logits = torch.where(narrow, logits * torch.exp2(-ranges.clamp_min(1e-37).log2().ceil()), logits)
    return logits.log_softmax(1)


def deviations(samples: Tensor, correction: int = 1) -> Tensor:
    """Return the standard deviation of each feature (D,) of samples (N, D).

    Where float32 has no room for its square, it is computed in float64.
    """
    spread = samples.std(0, correction=correction)
    if spread.is_meta:
        return spread
    fits = spread.isfinite() & ((spread > 1e-18) | (samples == samples[:1]).all(0))
    return (
        spread if fits.all() else torch.where(fits, spread, samples.double().std(0, correction=correction).to(spread))
    )


def row_lengths(rows: Tensor) -> Tensor:
    """Return the Euclidean length of each row (N, D), as (N, 1), also where float32 has no room for its square."""
    lengths = rows.norm(dim=1, keepdim=True)
    fits = (lengths > _SHORTEST) & lengths.isfinite()
    return lengths if fits.all() else torch.where(fits, lengths, rows.double().norm(dim=1, keepdim=True).to(rows))


def input_gradient(value: Tensor, images: Images, weights: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """Return the gradient (N, C, H, W) of a scalar, or of features weighted by `weights`, at the leaf images.

    `keep` retains the graph for another backward pass. Raises InvalidModelError if there is no gradient or it is not
    finite: otherwise the search would fail silently.
    """
    gradient = gradient_or_none(value, images, weights, keep=keep)
    if gradient is None:
        raise InvalidModelError(
            "the network gives no gradient to its input: its forward pass detaches the graph, or computes this layer "
            "without one (torch.no_grad, or torch.utils.checkpoint with use_reentrant=True)"
        )
    # one sum reads the gradient once; count per image only if that sum is not finite, which may be by overflow
    bad = 0 if gradient.sum().isfinite() else int((~gradient.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the gradient to the input is not finite for {bad} of {len(images)} images")
    return gradient


def gradient_or_none(
    value: Tensor, images: Images, weights: Tensor | None = None, *, keep: bool = False
) -> Tensor | None:
    """Return the gradient of `input_gradient`, finite or not; None if the value does not depend on the images."""
    if not value.requires_grad:
        return None
    retain = keep or _checkpoints_seen.is_set()  # an attempt that fails must not free what the next one needs
    try:
        # autograd.grad, not backward: parameters keep no gradient and cost nothing
        return torch.autograd.grad(value, images, weights, retain_graph=retain, allow_unused=True)[0]
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    # reentrant checkpoints only allow backward passes to all leaves; parameters are frozen by `frozen_parameters`
    before, images.grad = images.grad, None
    value.backward(weights, retain_graph=keep)
    gradient, images.grad = images.grad, before
    return gradient


def values_and_gradient(function: Callable[[Images], Tensor], images: Images) -> tuple[Tensor, Tensor] | None:
    """Return values (N, ...) and the gradients (N, C, H, W) of a fixed combination of them; None if they are no tensor.

    Values that do not depend on the images have a gradient of zero.
    """
    parts = [_values_and_gradient(function, batch) for batch in images.split(allowed(len(images)))]
    found = [each for each in parts if each is not None]
    return (torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])) if found else None


def _values_and_gradient(function: Callable[[Images], Tensor], images: Images) -> tuple[Tensor, Tensor] | None:
    pixels = images.detach().clone().requires_grad_()
    with frozen_parameters(function) if isinstance(function, nn.Module) else nullcontext():
        values: object = outputs_of(function, pixels)
        if not isinstance(values, Tensor):
            return None
        weights = torch.arange(values[0].numel(), device=values.device, dtype=values.dtype).cos().view(values[0].shape)
        gradient = gradient_or_none((values * weights).sum(), pixels)
    return values.detach(), torch.zeros_like(images) if gradient is None else gradient


def agree(ours: tuple[Tensor, Tensor] | None, theirs: tuple[Tensor, Tensor] | None) -> bool:
    """Return whether values and gradients of `values_and_gradient` agree, so that a search may follow either.

    Values may differ by 1e-4 of their spread. Gradients may differ by 1e-4 of their length in the median image, and by
    a tenth in any: rounding can switch single ReLUs.
    """
    if ours is None or theirs is None or ours[0].shape != theirs[0].shape:
        return False
    spread = (theirs[0] - theirs[0].mean(0)).abs().max()
    # divided by the largest first: squares of features of 1e20 or 1e-30 leave the range of float32
    largest = theirs[1].abs().max().clamp_min(torch.finfo(theirs[1].dtype).tiny)
    difference = ((ours[1] - theirs[1]) / largest).flatten(1).norm(dim=1)
    length = (theirs[1] / largest).flatten(1).norm(dim=1)
    values_agree = (ours[0] - theirs[0]).abs().max() <= _TOLERANCE * spread
    gradients_agree = (difference.median() <= _TOLERANCE * length.median()) & (difference <= 0.1 * length).all()
    return bool(values_agree & gradients_agree)


def outside_inference_mode(network: nn.Module) -> nn.Module:
    """Return the network, or a copy if it was built under inference mode: such tensors cannot be part of a graph."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network) if any(each.is_inference() for each in tensors) else network


_freezing = threading.Lock()
_frozen_by: dict[int, int] = {}  # by id of a parameter: how many measurements in progress keep it frozen


@contextmanager
def frozen_parameters(network: nn.Module) -> Iterator[None]:
    """Freeze the parameters that require a gradient, until the last of several measurements at a time ends."""
    with _freezing:
        parameters = [each for each in network.parameters() if each.requires_grad or id(each) in _frozen_by]
        for each in parameters:
            each.requires_grad_(False)
            _frozen_by[id(each)] = _frozen_by.get(id(each), 0) + 1
    try:
        yield
    finally:
        with _freezing:
            for each in parameters:
                _frozen_by[id(each)] -= 1
                if not _frozen_by[id(each)]:
                    del _frozen_by[id(each)]
                    each.requires_grad_(True)


class MeanOfDraws(nn.Module):
    """A network's mean output over 20 draws, (N, K); its gradient is the mean gradient of the draws."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.eval()

    def forward(self, images: Images) -> Tensor:
        """Return the mean outputs."""
        return torch.stack([outputs_of(self.network, images) for _ in range(DRAWS)]).mean(0)


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
            logits = outputs_of(self.network, images)
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
