"""Rigorous proof of collisions: near every witness lies an image whose features equal the target in real arithmetic.

Claim, for a piecewise-linear network whose parameters and normalisation are taken as exact real numbers: there is a
real image x + d, inside the ball of the clean one and the pixel range, whose exact features equal the
float64 target z. Images with one target therefore collide exactly. The claim is about the network as a function, not
about the rounding of a forward pass in float32.

Proof. Near the witness x the network g is one affine map, as long as no ReLU and no maximum changes its active branch.
`proof.arithmetic` encloses g(x) and the derivatives of g along the columns of a matrix A (P, D), an approximate right
inverse of the Jacobian J (D, P): J A = I + E. If ||E|| < 1, there is a w with g(x) + J A w = z and

    |w| <= omega = |z - g(x)| / (1 - ||E||),

so 1 / (||A|| / (1 - ||E||)) is a computed lower bound on the smallest singular value of J. Along d = A w a pixel
changes by at most |A_i| omega and a pre-activation by at most |J_k A| omega. If no pre-activation changes its sign, no
maximum its position, and all pixels stay inside, then g(x + d) = z. Every bound includes all rounding errors.

Source: Krawczyk 1969 and Rump 2010, "Verification methods", for this kind of argument.
"""

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.collisions import Collisions
from audit.certificate.proof.arithmetic import Derivatives, Enclosure
from audit.certificate.proof.numbers import Unprovable
from audit.certificate.proof.pieces import TracedLayer
from audit.errors import InvalidModelError
from audit.representation.layers import Representation
from audit.types import Images

_UP = 1 + 1e-9  # enlarges bounds to cover the rounding of their own computation
_FIXED_BELOW = 1e-7  # pixels with less slack are not moved
_PIXEL_ROUNDING = 1e-15  # maximum rounding error of pixel differences in float64
_MAX_ERROR = 0.5  # of ||E||, below the 1 that the proof requires
_MIN_EIGENVALUE = 1e-13  # of J J^T, relative to the largest


class _Witness(NamedTuple):
    """A moved image (1, C, H, W), its clean image (1, C, H, W), and the target (1, D) of its features, all float64."""

    moved: Images
    clean: Images
    target: Tensor


def reason_unprovable(precise: object, clean: Images) -> str | None:
    """Return why nothing can be proved about the float64 copy of a layer, or None; uses the first of `clean`."""
    try:
        layer = _traced(precise, clean[:1].double())
        layer.forward(Enclosure.of(clean[:1].double().cpu()))
    except (Unprovable, InvalidModelError) as error:
        return str(error)
    return None


def prove_collisions(precise: object, clean: Images, collisions: Collisions, threat: ThreatModel) -> Tensor:
    """Return which rows (R,) of collisions are proved for the float64 copy of a layer.

    `clean` (N, C, H, W) are the images that `collisions.members` indexes. No row is proved if the network contains an
    unsupported operation.
    """
    rows = range(len(collisions.members))
    result = torch.zeros(len(rows), dtype=torch.bool)
    try:
        layer = _traced(precise, clean[:1].double())
    except (Unprovable, InvalidModelError):
        return result.to(clean.device)
    for row in rows:
        member, at = collisions.members[row], collisions.at[row]
        parts = (collisions.moved[row], clean[member].double(), collisions.targets[at])
        with suppress(InvalidModelError):  # non-finite numbers prove nothing
            result[row] = _has_root(layer, _Witness(*(part[None].cpu() for part in parts)), threat)
    return result.to(clean.device)


def _traced(precise: object, image: Images) -> TracedLayer:
    if not isinstance(precise, Representation):
        raise Unprovable("the proof traces the network's modules, so the layer has to be a Representation of one")
    return TracedLayer.of(precise, image)


@torch.no_grad()
def _has_root(layer: TracedLayer, witness: _Witness, threat: ThreatModel) -> bool:
    """Return whether an image in the ball and in the witness's affine piece provably has the target's features."""
    slack = _slack(witness, threat)
    if bool((slack < 0).any()):
        return False
    jacobian = layer.jacobian(witness.moved)
    movable = (jacobian != 0).any(1)  # features that depend on a pixel
    inverse = _right_inverse(jacobian[movable] * (slack > _FIXED_BELOW))
    if inverse is None:
        return False
    value, pattern = layer.forward(Enclosure.of(witness.moved))
    residual = value.add(Enclosure.of(witness.target).negate()).magnitude()[0]
    directions = inverse.T.reshape(-1, *witness.moved.shape[1:])
    derivatives, slopes = layer.derivatives(Derivatives(Enclosure.of(directions)), pattern)
    # features that no pixel moves have to equal the target already
    if bool((residual[~movable] > 0).any()) or bool((derivatives.norm()[0, ~movable] > 0).any()):
        return False
    radius = _root_radius(derivatives, movable, residual)
    if radius is None:
        return False
    changes = inverse.norm(dim=1) * radius * _UP  # of each pixel
    if bool((changes > slack).any()) or not _stays_in_ball(changes, witness, threat):
        return False
    return pattern.is_constant_within(radius, slopes)


def _root_radius(derivatives: Derivatives, movable: Tensor, residual: Tensor) -> float | None:
    """Return omega, a bound on |w|; None if J A is not known to be invertible."""
    product = derivatives.parts.rearrange(lambda part: part[:, movable])
    eye = Enclosure.of(torch.eye(len(product.high), dtype=torch.float64))
    error = float(product.add(eye.negate()).magnitude().norm())
    if not error * _UP < _MAX_ERROR:
        return None
    return float(residual[movable].norm()) / (1 - error * _UP) * _UP


def _slack(witness: _Witness, threat: ThreatModel) -> Tensor:
    """Return a lower bound (P,) on how far each pixel may move in both directions; negative if it is outside.

    The ball limits single pixels in l-inf only; for the other norms see `_stays_in_ball`.
    """
    low, high = threat.pixel_range
    ball = threat.eps - (witness.moved - witness.clean).abs() - _PIXEL_ROUNDING
    # differences from the ends of the range have exact signs; their size only matters where a pixel moves
    ends = torch.minimum(witness.moved - low, high - witness.moved) / _UP
    return torch.minimum(ball, ends).flatten()


def _stays_in_ball(changes: Tensor, witness: _Witness, threat: ThreatModel) -> bool:
    """Return whether the ball contains every image whose pixels differ from the witness by at most `changes` (P,)."""
    if threat.norm == "linf":
        return True  # the slack of every pixel covers it
    pixels = (witness.moved - witness.clean).abs().flatten() + _PIXEL_ROUNDING + changes
    length = pixels.sum() if threat.norm == "l1" else pixels.norm()
    return bool(length * _UP <= threat.eps)


def _right_inverse(jacobian: Tensor) -> Tensor | None:
    """Return an approximation (P, D) of J^T (J J^T)^-1; None if the features cannot be moved independently."""
    if len(jacobian) == 0:
        return jacobian.T
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
    if not float(values[0]) > _MIN_EIGENVALUE * float(values[-1]):
        return None
    return jacobian.T @ (vectors / values) @ vectors.T
