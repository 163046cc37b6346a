"""Witness files: the moved images of a certificate, which anybody can check without trusting the search.

A safetensors file with the meetings (targets, members, at, moved), the labels, and one JSON header. Checking it takes
one forward pass over the moved images, in float64, and the optimisation that turns meetings into the bound.
"""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from audit.adversary.threat import THREATS, ThreatModel
from audit.certificate.certificate import Certificate, bound_of, inapplicable
from audit.certificate.collision_search import Layer
from audit.certificate.collisions import Meetings
from audit.certificate.equality import TIERS, Standard, Tier, holds, noise_floor, standing
from audit.certificate.packing import Bound
from audit.errors import EnvironmentFault, IntegrityError, UsageError
from audit.hashing import tensors_sha256
from audit.storage import write_atomically
from audit.types import Images, Labels

FORMAT = "rvaudit-witness-1"
_TENSORS = {"targets": 2, "members": 1, "at": 1, "moved": 4, "labels": 1}
_BATCH = 128


@dataclass(frozen=True)
class Header:
    """What a witness file claims, and of what: layer name, threat, tier, bound, hashes of weights and data."""

    layer: str
    threat: ThreatModel
    tier: Tier
    bound: Bound
    noise: float
    weights_sha256: str
    data_sha256: str


@dataclass(frozen=True, eq=False)
class Witness:
    """A witness file as read: nothing in it is to be believed before `verify` says so."""

    header: Header
    meetings: Meetings
    labels: Labels


def data_sha256(clean: Images, labels: Labels) -> str:
    """Return the sha256 of images and labels: their types, shapes and bytes."""
    return tensors_sha256(clean, labels)


def write(path: Path, certificate: Certificate, header: Header, labels: Labels) -> str:
    """Write a certificate's witness file, whole or not at all, and return the sha256 of its bytes.

    Raises EnvironmentFault where it cannot be written.
    """
    tensors = {**certificate.meetings._asdict(), "labels": labels}
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"rvaudit": _dumped(header)})
    write_atomically(path, content)
    return sha256(content).hexdigest()


def header_of(
    certificate: Certificate, layer: str, threat: ThreatModel, data: tuple[Images, Labels], weights_sha256: str
) -> Header:
    """Return the header for a certificate of a layer, by name, on clean images and labels."""
    return Header(
        layer, threat, certificate.tier, certificate.bound, certificate.noise, weights_sha256, data_sha256(*data)
    )


def read(path: Path) -> Witness:
    """Return what a witness file holds.

    Raises EnvironmentFault where there is none, IntegrityError where it is not a whole witness file.
    """
    if not path.is_file():
        raise EnvironmentFault(f"there is no witness file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is no whole witness file: {error}") from error
    try:
        header = _loaded(metadata["rvaudit"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{path} has no legal witness header: {error}") from error
    _check_shapes(path, tensors)
    labels = tensors.pop("labels")
    return Witness(header, Meetings(**tensors), labels)


def verify(path: Path, layer: Layer, clean: Images, labels: Labels, weights_sha256: str) -> Witness:
    """Return a witness whose every claim was checked against a layer, clean images (N, C, H, W) and labels (N,).

    `weights_sha256` is of the weights in `layer`, as the caller found them. Checks weights, labels, images, balls,
    features and the bound, believing nothing of the file; what is only a search's word is not in it. Raises
    IntegrityError with the first image that does not agree, EnvironmentFault where there is no file.
    """
    witness = read(path)
    header, meetings = witness.header, witness.meetings
    if header.weights_sha256 != weights_sha256:
        raise IntegrityError(f"{path} is of weights {header.weights_sha256}, these are {weights_sha256}")
    _check_data(witness, clean, labels)
    if reason := inapplicable(layer, clean, labels, header.threat, header.tier):
        raise IntegrityError(f"no witness can hold for this layer: {reason}")
    device = clean.device
    meetings = Meetings(*(part.to(device) for part in meetings))
    _check_balls(meetings, clean, header.threat)
    if header.tier == "proved":
        _check_proofs(meetings, layer, header.threat, clean)
    else:
        _check_features(meetings, layer, header.tier, clean)
    _check_bound(header.bound, bound_of(meetings, labels, seconds=60.0))
    return witness


def _check_data(witness: Witness, clean: Images, labels: Labels) -> None:
    count, stored = len(labels), witness.labels.to(labels)
    if len(clean) != count or len(stored) != count:
        raise IntegrityError(f"the witness is of {len(stored)} images, these are {len(clean)} with {count} labels")
    if len(wrong := (stored != labels).nonzero()):
        first = int(wrong[0])
        raise IntegrityError(f"image {first} is of class {int(labels[first])}, the witness says {int(stored[first])}")
    if (found := data_sha256(clean, labels)) != witness.header.data_sha256:
        raise IntegrityError(f"the witness is of images and labels {witness.header.data_sha256}, these are {found}")
    members = witness.meetings.members
    if len(members) and not 0 <= int(members.min()) <= int(members.max()) < count:
        raise IntegrityError(f"the witness moves images {int(members.min())} to {int(members.max())} of {count}")
    if witness.meetings.moved.shape[1:] != clean.shape[1:] and len(members):
        raise IntegrityError(
            f"moved images are {tuple(witness.meetings.moved.shape[1:])}, not {tuple(clean.shape[1:])}"
        )


def _check_balls(meetings: Meetings, clean: Images, threat: ThreatModel) -> None:
    if len(meetings.moved) == 0:
        return
    distance = threat.distance(meetings.moved, clean[meetings.members].double())
    low, high = threat.pixel_range
    legal = ((meetings.moved >= low) & (meetings.moved <= high)).flatten(1).all(1)
    # a comparison with a value that is not a number is false: such an image is outside
    inside = (distance <= threat.eps) & legal
    if len(wrong := (~inside).nonzero()):
        row = int(wrong[0])
        raise IntegrityError(
            f"image {int(meetings.members[row])} is moved by {float(distance[row]):.9g} in {threat.norm}, "
            f"to pixels from {float(meetings.moved[row].min()):.9g} to {float(meetings.moved[row].max()):.9g}; "
            f"legal are {threat.eps:.9g} and [{low}, {high}]"
        )


@torch.no_grad()
def _check_features(meetings: Meetings, layer: Layer, tier: Tier, clean: Images) -> None:
    if len(meetings.moved) == 0:
        return
    features = torch.cat([layer.precise(batch) for batch in meetings.moved.split(_BATCH)])
    if features.shape[1] != meetings.targets.shape[1]:
        raise IntegrityError(f"targets have {meetings.targets.shape[1]} features, the layer has {features.shape[1]}")
    targets = meetings.targets[meetings.at]
    # the noise is measured here and now: a file could name any
    same = holds(features, targets, tier, noise_floor(layer.working, clean))
    if len(wrong := (~same).nonzero()):
        row = int(wrong[0])
        apart = float((features[row] - targets[row]).norm())
        raise IntegrityError(
            f"image {int(meetings.members[row])} does not meet the others at target {int(meetings.at[row])}: "
            f"its features are {apart:.3g} away, which is not {tier}"
        )


def _check_proofs(meetings: Meetings, layer: Layer, threat: ThreatModel, clean: Images) -> None:
    if meetings.targets.shape[1] != (width := layer.precise(clean[:1].double()).shape[1]) and len(meetings.moved):
        raise IntegrityError(f"targets have {meetings.targets.shape[1]} features, the layer has {width}")
    stands = standing(layer, clean, meetings, threat, Standard("proved", 0.0))
    if len(wrong := (~stands).nonzero()):
        row = int(wrong[0])
        raise IntegrityError(
            f"image {int(meetings.members[row])} is not shown to meet the others at target {int(meetings.at[row])}: "
            "no exact root near its witness"
        )


def _check_bound(claimed: Bound, found: Bound) -> None:
    same = claimed.images == found.images and claimed.kept == found.kept
    # a search that was stopped may have ended elsewhere: a larger bound than ours is then still right
    larger = claimed.images == found.images and not claimed.exact and claimed.kept >= found.kept
    drawn = claimed.randomised >= found.randomised - 1e-6 * found.images
    if not (same or larger) or not drawn or (claimed.exact and claimed.randomised > found.randomised + 1e-6):
        raise IntegrityError(
            f"the witness claims that at most {claimed.kept} of {claimed.images} images are kept "
            f"({claimed.randomised:.6f} by randomised heads); its images show {found.kept} of {found.images} "
            f"({found.randomised:.6f})"
        )


def _check_shapes(path: Path, tensors: dict[str, Tensor]) -> None:
    if set(tensors) != set(_TENSORS):
        raise IntegrityError(f"{path} holds {sorted(tensors)}, a witness holds {sorted(_TENSORS)}")
    for name, tensor in tensors.items():
        kind = torch.float64 if name in ("targets", "moved") else torch.int64
        if tensor.dim() != _TENSORS[name] or tensor.dtype != kind:
            raise IntegrityError(f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {kind} of its rank")
    rows = len(tensors["members"])
    if len(tensors["at"]) != rows or len(tensors["moved"]) != rows:
        raise IntegrityError(f"{path}: members, at and moved are not equally many")
    if rows and not 0 <= int(tensors["at"].min()) <= int(tensors["at"].max()) < len(tensors["targets"]):
        raise IntegrityError(f"{path}: at names a target that is not there")


def _dumped(header: Header) -> str:
    threat = {"norm": header.threat.norm, "eps": header.threat.eps, "pixel_range": list(header.threat.pixel_range)}
    claims = {"format": FORMAT, "layer": header.layer, "threat": threat, "tier": header.tier, "noise": header.noise}
    hashes = {"weights_sha256": header.weights_sha256, "data_sha256": header.data_sha256}
    return json.dumps({**claims, **hashes, "bound": header.bound._asdict()}, sort_keys=True, allow_nan=False)


def _loaded(text: str) -> Header:
    claims: dict[str, Any] = json.loads(text)
    if claims["format"] != FORMAT:
        raise ValueError(f"format {claims['format']!r}, legal: {FORMAT}")
    if claims["tier"] not in TIERS:
        raise ValueError(f"tier {claims['tier']!r}, legal: {', '.join(TIERS)}")
    threat, bound = claims["threat"], claims["bound"]
    low, high = map(float, threat["pixel_range"])
    model = THREATS[threat["norm"]](float(threat["eps"]), (low, high))
    claimed = Bound(
        int(bound["kept"]), float(bound["randomised"]), int(bound["images"]), bound["kind"], exact=bool(bound["exact"])
    )
    hashes = {name: str(claims[name]) for name in ("weights_sha256", "data_sha256")}
    return Header(str(claims["layer"]), model, claims["tier"], claimed, float(claims["noise"]), **hashes)
