"""The ledger of images: proved to be kept by the network, broken by a stored adversarial image, or undecided.

    share proved <= adversarial accuracy <= share not broken

holds for the network itself, whatever attack measures its adversarial accuracy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from audit.adversary.label_attack import margin
from audit.adversary.threat import ThreatModel
from audit.certificate.proof.numbers import Unprovable
from audit.certificate.robust_images.margins import bound_margins, check_margins
from audit.certificate.robust_images.network import BoundedNetwork
from audit.certificate.robust_images.results import METHODS, BoundEffort, Ledger, Method, Slopes
from audit.errors import InvalidModelError
from audit.types import Images, Labels

_BATCH = 8  # images that are bounded at once
_PATIENCE = 2  # batches one after the other in which lines prove no image
_INSIDE = 1 - 1e-9  # stored adversarial images are a little inside the ball, so that rounding leaves none outside


@dataclass(frozen=True, eq=False)
class LedgerInputs:
    """A classifier in working precision, its float64 copy, and clean images (N, C, H, W) with labels (N,)."""

    network: nn.Module
    precise: nn.Module
    clean: Images
    labels: Labels


@torch.no_grad()
def keep_ledger(
    inputs: LedgerInputs, threat: ThreatModel, candidates: Images, effort: BoundEffort | None = None
) -> Ledger:
    """Return the ledger of images, with adversarial candidates (N, C, H, W) from an attack.

    An image is broken if its candidate is legal and the float64 network does not classify it as the label. The others
    are bounded by intervals, then by lines, in the precision of the images; what that proves counts if float64 proves
    it again. Images are tried in the order of the margins that the attack has left, largest first, and by lines only
    until none of two batches is proved. A network that cannot be read proves nothing, and `reason` says why.
    """
    effort, clean = effort or BoundEffort(), inputs.clean
    moved = _inside(candidates, clean, threat)
    is_broken = broken_rows(inputs.precise, (clean, inputs.labels), threat, moved)
    broken, remaining = is_broken.nonzero().flatten(), _most_promising(inputs, moved, ~is_broken)
    proved: dict[Method, Tensor] = dict.fromkeys(METHODS, remaining[:0])
    slopes, reason, passes = Slopes.none(), "", 0.0
    try:
        fast, exact = (
            BoundedNetwork(net, clean[:1].to(_dtype(net)), effort) for net in (inputs.network, inputs.precise)
        )
        for method in METHODS:
            found, used = _prove(fast, exact, inputs, threat, (remaining, method))
            proved[method] = found
            slopes = used if method == "lines" else slopes
            remaining = remaining[~torch.isin(remaining, found)]
        passes = fast.passes + exact.passes
    except (Unprovable, InvalidModelError) as error:
        reason = str(error)
    return Ledger(
        len(clean), broken, moved[is_broken], proved["intervals"], proved["lines"], slopes, effort, reason, passes
    )


def _most_promising(inputs: LedgerInputs, moved: Images, chosen: Tensor) -> Tensor:
    """Return the indices of chosen images, by the margin that the label keeps on the moved images, largest first."""
    index = chosen.nonzero().flatten()
    if len(index) == 0:
        return index
    images = moved[index].to(inputs.clean.dtype)
    logits = torch.cat([inputs.network(batch) for batch in images.split(128)])
    return index[margin(logits, inputs.labels[index]).argsort(descending=True, stable=True)]


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters()), torch.float32)


def _inside(candidates: Images, clean: Images, threat: ThreatModel) -> Images:
    """Return candidates in float64, moved strictly inside the ball where they are at or over its edge."""
    smaller = type(threat)(threat.eps * _INSIDE, threat.pixel_range)
    return smaller.project(candidates.double(), clean.double())


@torch.no_grad()
def broken_rows(precise: nn.Module, sample: tuple[Images, Labels], threat: ThreatModel, moved: Images) -> Tensor:
    """Return which images (N,) are broken by legal images `moved` (N, C, H, W), in float64.

    `sample` is the clean images (N, C, H, W) and labels (N,). A tie of the two largest logits counts as broken.
    """
    clean, labels = sample
    if len(clean) == 0:
        return torch.zeros(0, dtype=torch.bool, device=clean.device)
    low, high = threat.pixel_range
    legal = (threat.distance(moved, clean.double()) <= threat.eps) & ((moved >= low) & (moved <= high)).flatten(1).all(
        1
    )
    logits = torch.cat([precise(batch) for batch in moved.split(128)])
    return legal & ~(margin(logits, labels) > 0)


def _prove(
    fast: BoundedNetwork,
    exact: BoundedNetwork,
    inputs: LedgerInputs,
    threat: ThreatModel,
    task: tuple[Tensor, Method],
) -> tuple[Tensor, Slopes]:
    """Return the indices of images that a method proves, of those given, and the slopes of the proofs."""
    remaining, method = task
    proved, slopes, failures, directly = [remaining[:0]], [Slopes.none()], 0, False
    for index in remaining.split(_BATCH) if len(remaining) else ():
        clean, labels = inputs.clean[index], inputs.labels[index]
        # where most images are proved, a search in float32 only adds to the cost of float64
        network = exact if directly else fast
        found = bound_margins(network, clean.to(_dtype(network.network)), labels, threat, method)
        sure = (found.least > 0).nonzero().flatten()
        used = found.slopes.of_images(sure)
        if len(sure) and not directly:  # the bound counts only in float64
            holds = check_margins(exact, (clean[sure].double(), labels[sure]), threat, method, used) > 0
            sure, used = sure[holds], used.of_images(holds.nonzero().flatten())
        proved.append(index[sure])
        slopes.append(used.renamed(index[sure]))
        directly = 2 * len(sure) > len(index)
        failures = 0 if len(sure) else failures + 1
        if method == "lines" and failures == _PATIENCE:
            break  # the images of later batches have less of a margin to lose
    return torch.cat(proved).sort().values, Slopes.joined(slopes)


@torch.no_grad()
def proved_rows(ledger: Ledger, precise: nn.Module, sample: tuple[Images, Labels], threat: ThreatModel) -> Tensor:
    """Return which of all images (N,) the ledger's proofs hold for, computed again in float64 from its slopes alone.

    `sample` is the clean images (N, C, H, W) and labels (N,). Raises Unprovable for a network that cannot be read.
    """
    clean, labels = sample
    exact = BoundedNetwork(precise, clean[:1].double(), ledger.effort)
    holds = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
    for method in METHODS:
        claimed = ledger.of_method(method)
        for index in claimed.split(_BATCH) if len(claimed) else ():
            used = ledger.slopes.of_images(index) if method == "lines" else Slopes.none()
            part = clean[index].double(), labels[index]
            holds[index] = check_margins(exact, part, threat, method, used) > 0
    return holds
