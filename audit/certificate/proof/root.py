"""The tier `proved`: near every witness lies an image whose features are the target exactly, in real arithmetic.

What is proved, for a piecewise-linear network whose parameters, normalisation included, are taken as the real numbers
that they are: there is a real image x + d, every pixel within eps of the clean one and within the pixel range, whose
exact features equal the float64 target z to every digit. So images with one target truly meet, and no rounding of
anybody's forward pass is a part of the claim. The forward pass of a working network in float32 is not what it is about.

How. Near the witness x the network is one affine map while no ReLU changes sides and no maximum its place. Its value at
x is enclosed (audit.certificate.proof.arithmetic), and its derivatives along the columns of a matrix A (pixels, features), any approximate
right inverse of the Jacobian J: J A = I + E. Where ||E|| < 1 there is a w with g(x) + J A w = z and |w| <= omega =
|z - g(x)| / (1 - ||E||), so that 1 / (||A|| / (1 - ||E||)) is a computed lower bound of the smallest singular value.
Along d = A w a pixel moves by at most |A_i| omega and a pre-activation by at most |J_k A| omega: where all of them stay
on their side and all pixels inside, the affine map is the network at x + d. Every bound includes all rounding.

Source: Krawczyk 1969 and Rump 2010, "Verification methods", for the kind of argument.
"""

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.certificate.collisions import Meetings
from audit.certificate.proof.arithmetic import Exact, Slope
from audit.certificate.proof.operations import Unprovable
from audit.certificate.proof.pieces import Program
from audit.errors import InvalidModelError
from audit.representation.layers import Representation
from audit.types import Images

_UP = 1 + 1e-9  # bounds are enlarged by this, for the rounding of their own computation
_FREE = 1e-7  # pixels nearer than this to a wall are left where they are
_ROUNDED = 1e-15  # what the difference of two pixels and a radius can lose in float64


class Witnessed(NamedTuple):
    """One witness (1, C, H, W) of a clean image (1, C, H, W), and the target (1, D) it is to reach, all float64."""

    moved: Images
    clean: Images
    target: Tensor


def unprovable(precise: object, clean: Images) -> str | None:
    """Return why nothing can be proved for a layer's float64 copy, or None; `clean` (N, C, H, W), one is looked at."""
    try:
        program = _program(precise, clean[:1].double())
        program.forward(Exact.of(clean[:1].double().cpu()))
    except (Unprovable, InvalidModelError) as error:
        return str(error)
    return None


def proved(precise: object, clean: Images, meetings: Meetings, threat: ThreatModel) -> Tensor:
    """Return which rows (R,) of meetings are proved; `clean` (N, C, H, W) are the images that they count.

    None is where the network is not one that can be read.
    """
    rows = range(len(meetings.members))
    result = torch.zeros(len(rows), dtype=torch.bool)
    try:
        program = _program(precise, clean[:1].double())
    except (Unprovable, InvalidModelError):
        return result.to(clean.device)
    for row in rows:
        member, at = meetings.members[row], meetings.at[row]
        parts = (meetings.moved[row], clean[member].double(), meetings.targets[at])
        with suppress(InvalidModelError):  # a number that is none proves nothing
            result[row] = _has_root(program, Witnessed(*(part[None].cpu() for part in parts)), threat)
    return result.to(clean.device)


def _program(precise: object, image: Images) -> Program:
    if not isinstance(precise, Representation):
        raise Unprovable("a proof reads the network's modules: the layer has to be a Representation of one")
    return Program.of(precise, image)


@torch.no_grad()
def _has_root(program: Program, case: Witnessed, threat: ThreatModel) -> bool:
    """Return whether an image inside the ball and the witness's affine piece has exactly the target's features."""
    slack = _slack(case, threat)
    if bool((slack < 0).any()):
        return False
    jacobian = program.jacobian(case.moved)
    live = (jacobian != 0).any(1)
    inverse = _right_inverse(jacobian[live] * (slack > _FREE))
    if inverse is None:
        return False
    value, pattern = program.forward(Exact.of(case.moved))
    missing = value.add(Exact.of(case.target).negated())
    left = missing.magnitude()[0]
    columns = inverse.T.reshape(-1, *case.moved.shape[1:])
    slopes, steepness = program.along(Slope(Exact.of(columns)), pattern)
    # features that no pixel moves have to be there already, to the last digit
    if bool((left[~live] > 0).any()) or bool((slopes.norm()[0, ~live] > 0).any()):
        return False
    omega = _reach(slopes, live, left)
    if omega is None or bool((inverse.norm(dim=1) * omega * _UP > slack).any()):
        return False
    return pattern.holds(steepness, omega)


def _reach(slopes: Slope, live: Tensor, left: Tensor) -> float | None:
    """Return omega, a bound on the length of w; None where J A is not known to be invertible."""
    product = slopes.parts.shaped(lambda part: part[:, live])
    eye = Exact.of(torch.eye(len(product.high), dtype=torch.float64))
    apart = float(product.add(eye.negated()).magnitude().norm())
    if not apart * _UP < 0.5:
        return None
    return float(left[live].norm()) / (1 - apart * _UP) * _UP


def _slack(case: Witnessed, threat: ThreatModel) -> Tensor:
    """Return how far each pixel (P,) may surely still go in either direction; negative where it is outside already."""
    low, high = threat.pixel_range
    ball = threat.eps - (case.moved - case.clean).abs() - _ROUNDED
    # differences from the range's ends have the right sign; their size is used only where a pixel moves
    ends = torch.minimum(case.moved - low, high - case.moved) / _UP
    return torch.minimum(ball, ends).flatten()


def _right_inverse(jacobian: Tensor) -> Tensor | None:
    """Return about J^T (J J^T)^-1, (P, D); None where features cannot be moved independently."""
    if len(jacobian) == 0:
        return jacobian.T
    values, vectors = torch.linalg.eigh(jacobian @ jacobian.T)
    if not float(values[0]) > 1e-13 * float(values[-1]):
        return None
    return jacobian.T @ (vectors / values) @ vectors.T
