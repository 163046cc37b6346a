"""The ledger of images in a witness file: its tensors and claims, and the verification of both sides."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from audit.adversary.threat import ThreatModel
from audit.certificate.proof.numbers import Unprovable
from audit.certificate.robust_images.ledger import broken_rows, proved_rows
from audit.certificate.robust_images.results import BoundEffort, Ledger, Slopes
from audit.errors import IntegrityError
from audit.types import Images, Labels

_TENSORS = {
    "ledger_broken": (1, torch.int64),
    "ledger_adversarial": (4, torch.float64),
    "ledger_intervals": (1, torch.int64),
    "ledger_lines": (1, torch.int64),
    "ledger_slope_image": (1, torch.int64),
    "ledger_slope_other": (1, torch.int64),
    "ledger_slope_levels": (2, torch.uint8),
}


def ledger_tensors(ledger: Ledger) -> dict[str, Tensor]:
    """Return the tensors that a witness file holds of a ledger, by name."""
    proofs = (ledger.broken, ledger.adversarial, ledger.intervals, ledger.lines)
    return dict(zip(_TENSORS, (*proofs, *ledger.slopes), strict=True))


def ledger_claims(ledger: Ledger) -> dict[str, Any]:
    """Return the claims of a witness file about a ledger, as JSON data."""
    counts = {"images": ledger.images, "proved": ledger.proved, "broken": len(ledger.broken)}
    return {**counts, "passes": ledger.effort.passes}


def take_ledger(claims: Mapping[str, Any] | None, tensors: dict[str, Tensor]) -> Ledger | None:
    """Take the tensors of a ledger out of those of a witness file, and return the unverified ledger, None without one.

    Raises IntegrityError for claims and tensors that do not fit each other.
    """
    stored = {name: tensors.pop(name) for name in sorted(set(_TENSORS) & set(tensors))}
    expected = set() if claims is None else set(_TENSORS)
    if set(stored) != expected:
        raise IntegrityError(f"the file holds the tensors {sorted(stored)} of a ledger, not {sorted(expected)}")
    return None if claims is None else _read_ledger(claims, stored)


def _read_ledger(claims: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ledger:
    for name, (rank, dtype) in _TENSORS.items():
        tensor = tensors[name]
        if tensor.dim() != rank or tensor.dtype != dtype:
            shape = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise IntegrityError(f"{name} is {shape}, not {dtype} with {rank} dimensions")
    try:
        images, passes = int(claims["images"]), float(claims["passes"])
        counts = int(claims["proved"]), int(claims["broken"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the ledger's claims {dict(claims)} are not complete: {error}") from error
    broken, adversarial, intervals, lines, *slopes = (tensors[name] for name in _TENSORS)
    ledger = Ledger(images, broken, adversarial, intervals, lines, Slopes(*slopes), BoundEffort(passes=passes))
    if (ledger.proved, len(broken)) != counts:
        found = f"{ledger.proved} proved and {len(broken)} broken"
        raise IntegrityError(f"the ledger claims {counts[0]} images proved and {counts[1]} broken, but holds {found}")
    if len(adversarial) != len(broken) or len({len(part) for part in slopes}) > 1:
        raise IntegrityError("the tensors of the ledger have different lengths")
    return ledger


def check_ledger(ledger: Ledger, precise: nn.Module, sample: tuple[Images, Labels], threat: ThreatModel) -> None:
    """Verify both sides of a ledger with the float64 network, clean images (N, C, H, W) and labels (N,).

    Every adversarial image has to be legal and classified otherwise than labelled; every proof is computed again, from
    the stored slopes. Raises IntegrityError naming the first image that disagrees.
    """
    clean, labels = sample
    device = clean.device
    moved = ledger._replace(
        broken=ledger.broken.to(device),
        adversarial=ledger.adversarial.to(device),
        intervals=ledger.intervals.to(device),
        lines=ledger.lines.to(device),
    )
    _check_indices(moved, len(clean))
    if moved.adversarial.shape[1:] != clean.shape[1:] and len(moved.broken):
        shape = tuple(moved.adversarial.shape[1:])
        raise IntegrityError(f"adversarial images have the shape {shape}, not {tuple(clean.shape[1:])}")
    holds = broken_rows(precise, (clean[moved.broken], labels[moved.broken]), threat, moved.adversarial)
    if len(wrong := (~holds).nonzero()):
        image = int(moved.broken[wrong[0]])
        raise IntegrityError(
            f"image {image} is claimed to be broken, but its adversarial image is not legal at {threat.norm} "
            f"{threat.eps:.9g} or the network classifies it as labelled"
        )
    if not ledger.proved:
        return
    try:
        proved = proved_rows(moved, precise, sample, threat)
    except (Unprovable, RuntimeError) as error:  # slopes of another network do not fit its activations
        raise IntegrityError(f"the proofs of the ledger do not fit this network: {error}") from error
    claimed = torch.cat([moved.intervals, moved.lines]).sort().values
    if len(wrong := claimed[~proved[claimed]]):
        raise IntegrityError(
            f"image {int(wrong[0])} is claimed to be proved at {threat.norm} {threat.eps:.9g}, but its bound is not "
            "positive"
        )


def _check_indices(ledger: Ledger, count: int) -> None:
    if ledger.images != count:
        raise IntegrityError(f"the ledger is for {ledger.images} images, not {count}")
    named = torch.cat([ledger.broken, ledger.intervals, ledger.lines])
    outside = named[(named < 0) | (named >= count)]
    if len(outside):
        raise IntegrityError(f"the ledger names image {int(outside[0])}, outside 0 to {count - 1}")
    if len(named.unique()) < len(named):
        twice = int((named.bincount() > 1).nonzero()[0])
        raise IntegrityError(f"the ledger names image {twice} twice: an image is either proved or broken")
