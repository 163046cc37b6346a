"""Witness files: the moved images of a certificate, for verification independent of the search.

A safetensors file with the collisions (targets, members, at, moved), the labels, and a JSON header. Verification takes
one float64 forward pass of the moved images and solves the packing problem that turns collisions into the bound.
"""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from audit.adversary.memory.limit import allowed
from audit.adversary.threat import THREATS, ThreatModel
from audit.certificate.collisions import Collisions
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import EQUALITY_TIERS, EqualityCriterion, EqualityTier, features_equal, noise_floor
from audit.certificate.packing import PackingBound, collision_bound
from audit.certificate.results import Certificate
from audit.certificate.robust_images.results import Ledger
from audit.certificate.validity import reason_not_applicable, valid_rows
from audit.errors import EnvironmentFault, IntegrityError, UsageError
from audit.hashing import tensors_sha256
from audit.representation.layers import Representation
from audit.storage import write_atomically
from audit.types import Images, Labels

FORMAT = "rvaudit-witness-1"
WITH_LEDGER = "rvaudit-witness-2"
_RANKS = {"targets": 2, "members": 1, "at": 1, "moved": 4, "labels": 1}
_BATCH = 128
_RANDOMISED_TOLERANCE = 1e-6  # in images: the linear relaxation is solved in floating point


@dataclass(frozen=True)
class WitnessHeader:
    """Claims of a witness file: layer name, threat model, tier, bound, noise floor, hashes of weights and data.

    `ledger` are the claims about the ledger of images, None without one.
    """

    layer: str
    threat: ThreatModel
    tier: EqualityTier
    bound: PackingBound
    noise: float
    weights_sha256: str
    data_sha256: str
    ledger: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Witness:
    """The unverified content of a witness file: header, collisions, labels (N,), and the ledger of images if any."""

    header: WitnessHeader
    collisions: Collisions
    labels: Labels
    ledger: Ledger | None = None


def data_sha256(clean: Images, labels: Labels) -> str:
    """Return the sha256 of images and labels: their types, shapes and bytes."""
    return tensors_sha256(clean, labels)


def witness_header(
    certificate: Certificate, layer: str, threat: ThreatModel, data: tuple[Images, Labels], weights_sha256: str
) -> WitnessHeader:
    """Return the header for a certificate of a layer, by name, on clean images and labels."""
    return WitnessHeader(
        layer, threat, certificate.tier, certificate.bound, certificate.noise, weights_sha256, data_sha256(*data)
    )


def write_witness(
    path: Path, certificate: Certificate, header: WitnessHeader, labels: Labels, ledger: Ledger | None = None
) -> str:
    """Write the witness file of a certificate, and of a ledger of images, atomically; return the sha256 of its bytes.

    Raises EnvironmentFault if it cannot be written.
    """
    tensors = {**certificate.collisions._asdict(), "labels": labels}
    if ledger is not None:
        from audit.certificate.robust_images.stored import ledger_claims, ledger_tensors

        tensors |= ledger_tensors(ledger)
        header = replace(header, ledger=ledger_claims(ledger))
    content = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, {"rvaudit": _dump(header)})
    write_atomically(path, content)
    return sha256(content).hexdigest()


def read_witness(path: Path) -> Witness:
    """Return the content of a witness file, checked for its format alone.

    Raises EnvironmentFault if there is no file, IntegrityError if it is not a complete witness file.
    """
    if not path.is_file():
        raise EnvironmentFault(f"there is no witness file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"{path} is not a complete witness file: {error}") from error
    try:
        header = _parse(metadata["rvaudit"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise IntegrityError(f"{path} has no valid witness header: {error}") from error
    from audit.certificate.robust_images.stored import take_ledger

    ledger = take_ledger(header.ledger, tensors)
    _check_shapes(path, tensors)
    labels = tensors.pop("labels")
    return Witness(header, Collisions(**tensors), labels, ledger)


def verify_witness(
    path: Path, layer: DualPrecisionLayer, clean: Images, labels: Labels, weights_sha256: str
) -> Witness:
    """Verify every claim of a witness file against a layer, clean images (N, C, H, W) in [0, 1] and labels (N,).

    `weights_sha256` is the hash of the weights in `layer`, computed by the caller. Checks the hashes of weights and
    data, the labels, that |moved - clean| <= eps in pixel units within the pixel range, that the features of each
    target coincide at the claimed tier, that the packing problem of these collisions gives the claimed bound, and both
    sides of the ledger of images if there is one.
    Nothing in the file is trusted; population bounds and delta curves are not in it.

    Raises IntegrityError naming the first image that disagrees, EnvironmentFault if there is no file.

    Source: Bhagoji, Cullina & Zhao, fixed feature extractors (AdvML-Frontiers 2023), for the bound from collisions.
    """
    witness = read_witness(path)
    header, collisions = witness.header, witness.collisions
    if header.weights_sha256 != weights_sha256:
        raise IntegrityError(f"{path} is for weights with sha256 {header.weights_sha256}, not {weights_sha256}")
    _check_data(witness, clean, labels)
    if reason := reason_not_applicable(layer, clean, labels, header.tier):
        raise IntegrityError(f"this layer cannot be certified: {reason}")
    collisions = Collisions(*(part.to(clean.device) for part in collisions))
    _check_balls(collisions, clean, header.threat)
    if header.tier == "proved":
        _check_proofs(collisions, layer, header.threat, clean)
    else:
        _check_features(collisions, layer, header.tier, clean)
    _check_bound(header.bound, collision_bound(collisions, labels, seconds=60.0))
    if witness.ledger is not None:
        from audit.certificate.robust_images.stored import check_ledger

        if not isinstance(layer.precise, Representation):
            raise IntegrityError("the ledger is about a network, so the layer has to be a Representation of one")
        check_ledger(witness.ledger, layer.precise.model, (clean, labels), header.threat)
    return witness


def _check_data(witness: Witness, clean: Images, labels: Labels) -> None:
    count, stored = len(labels), witness.labels.to(labels)
    if len(clean) != count or len(stored) != count:
        raise IntegrityError(f"the witness is for {len(stored)} images, not {len(clean)} with {count} labels")
    if len(wrong := (stored != labels).nonzero()):
        first = int(wrong[0])
        raise IntegrityError(f"image {first} has class {int(labels[first])}, but {int(stored[first])} in the witness")
    if (found := data_sha256(clean, labels)) != witness.header.data_sha256:
        raise IntegrityError(
            f"the witness is for images and labels with sha256 {witness.header.data_sha256}, not {found}"
        )
    members, moved = witness.collisions.members, witness.collisions.moved
    if len(members) and not 0 <= int(members.min()) <= int(members.max()) < count:
        raise IntegrityError(
            f"the witness moves images {int(members.min())} to {int(members.max())}, outside 0 to {count - 1}"
        )
    if moved.shape[1:] != clean.shape[1:] and len(members):
        raise IntegrityError(f"moved images have the shape {tuple(moved.shape[1:])}, not {tuple(clean.shape[1:])}")


def _check_balls(collisions: Collisions, clean: Images, threat: ThreatModel) -> None:
    if len(collisions.moved) == 0:
        return
    distance = threat.distance(collisions.moved, clean[collisions.members].double())
    low, high = threat.pixel_range
    legal = ((collisions.moved >= low) & (collisions.moved <= high)).flatten(1).all(1)
    # comparisons with NaN are false, so such an image counts as outside
    inside = (distance <= threat.eps) & legal
    if len(wrong := (~inside).nonzero()):
        row = int(wrong[0])
        pixels = collisions.moved[row]
        raise IntegrityError(
            f"image {int(collisions.members[row])} is moved by {float(distance[row]):.9g} in {threat.norm}, "
            f"to pixels from {float(pixels.min()):.9g} to {float(pixels.max()):.9g}; "
            f"legal are {threat.eps:.9g} and [{low}, {high}]"
        )


@torch.no_grad()
def _check_features(collisions: Collisions, layer: DualPrecisionLayer, tier: EqualityTier, clean: Images) -> None:
    if len(collisions.moved) == 0:
        return
    features = torch.cat([layer.precise(batch) for batch in collisions.moved.split(allowed(_BATCH))])
    _check_dimension(collisions, features.shape[1])
    targets = collisions.targets[collisions.at]
    # the noise floor is measured again: the header may claim any
    equal = features_equal(features, targets, EqualityCriterion(tier, noise_floor(layer.working, clean)))
    if len(wrong := (~equal).nonzero()):
        row = int(wrong[0])
        distance = float((features[row] - targets[row]).norm())
        raise IntegrityError(
            f"image {int(collisions.members[row])} does not collide at target {int(collisions.at[row])}: "
            f"its features are {distance:.3g} away, which is not {tier}"
        )


def _check_proofs(collisions: Collisions, layer: DualPrecisionLayer, threat: ThreatModel, clean: Images) -> None:
    if len(collisions.moved):
        _check_dimension(collisions, layer.precise(clean[:1].double()).shape[1])
    valid = valid_rows(layer, clean, collisions, threat, EqualityCriterion("proved", 0.0))
    if len(wrong := (~valid).nonzero()):
        row = int(wrong[0])
        raise IntegrityError(
            f"image {int(collisions.members[row])} is not proved to collide at target {int(collisions.at[row])}: "
            "no exact root was found near its witness"
        )


def _check_dimension(collisions: Collisions, dimension: int) -> None:
    if collisions.targets.shape[1] != dimension:
        raise IntegrityError(f"targets have {collisions.targets.shape[1]} features, but the layer has {dimension}")


def _check_bound(claimed: PackingBound, found: PackingBound) -> None:
    same = claimed.images == found.images and claimed.kept == found.kept
    # a branch and bound that was stopped may have claimed a larger bound, which is still valid
    larger = claimed.images == found.images and not claimed.exact and claimed.kept >= found.kept
    randomised = claimed.randomised >= found.randomised - _RANDOMISED_TOLERANCE * found.images
    too_large = claimed.exact and claimed.randomised > found.randomised + _RANDOMISED_TOLERANCE
    if not (same or larger) or not randomised or too_large:
        raise IntegrityError(
            f"the witness claims an upper bound of {claimed.kept} of {claimed.images} images "
            f"({claimed.randomised:.6f} for randomised heads), but its collisions give {found.kept} of {found.images} "
            f"({found.randomised:.6f})"
        )


def _check_shapes(path: Path, tensors: dict[str, Tensor]) -> None:
    if set(tensors) != set(_RANKS):
        raise IntegrityError(f"{path} holds the tensors {sorted(tensors)}, but a witness holds {sorted(_RANKS)}")
    for name, tensor in tensors.items():
        dtype = torch.float64 if name in ("targets", "moved") else torch.int64
        if tensor.dim() != _RANKS[name] or tensor.dtype != dtype:
            raise IntegrityError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} with {_RANKS[name]} dimensions"
            )
    rows = len(tensors["members"])
    if len(tensors["at"]) != rows or len(tensors["moved"]) != rows:
        raise IntegrityError(f"{path}: members, at and moved have different lengths")
    if rows and not 0 <= int(tensors["at"].min()) <= int(tensors["at"].max()) < len(tensors["targets"]):
        raise IntegrityError(f"{path}: at refers to a target that does not exist")


def _dump(header: WitnessHeader) -> str:
    threat = {"norm": header.threat.norm, "eps": header.threat.eps, "pixel_range": list(header.threat.pixel_range)}
    name = FORMAT if header.ledger is None else WITH_LEDGER
    claims: dict[str, Any] = {
        "format": name,
        "layer": header.layer,
        "threat": threat,
        "tier": header.tier,
        "noise": header.noise,
    }
    claims |= {} if header.ledger is None else {"ledger": header.ledger}
    hashes = {"weights_sha256": header.weights_sha256, "data_sha256": header.data_sha256}
    return json.dumps({**claims, **hashes, "bound": header.bound._asdict()}, sort_keys=True, allow_nan=False)


def _parse(text: str) -> WitnessHeader:
    claims: dict[str, Any] = json.loads(text)
    ledger = claims.get("ledger")
    if claims["format"] != (FORMAT if ledger is None else WITH_LEDGER):
        raise ValueError(f"format {claims['format']!r}, legal: {FORMAT}, or {WITH_LEDGER} with a ledger")
    if claims["tier"] not in EQUALITY_TIERS:
        raise ValueError(f"tier {claims['tier']!r}, legal: {', '.join(EQUALITY_TIERS)}")
    threat, bound = claims["threat"], claims["bound"]
    low, high = map(float, threat["pixel_range"])
    model = THREATS[threat["norm"]](float(threat["eps"]), (low, high))
    claimed = PackingBound(
        int(bound["kept"]), float(bound["randomised"]), int(bound["images"]), bound["kind"], exact=bool(bound["exact"])
    )
    hashes = {name: str(claims[name]) for name in ("weights_sha256", "data_sha256")}
    return WitnessHeader(
        str(claims["layer"]), model, claims["tier"], claimed, float(claims["noise"]), **hashes, ledger=ledger
    )
