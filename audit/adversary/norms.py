"""Names of the norms and the one rule for a legal perturbation radius; free of torch."""

from math import inf

NORMS = ("linf", "l2", "l1")


def eps_fault(eps: float, norm: str | None = None) -> str:
    """Return why a radius is not legal, as one sentence, or an empty string if it is legal.

    A radius is in pixel units, finite and at least 0; in the l-inf norm it is at most 1, the length of the pixel
    range. Without a norm, only the first rule is checked.

    >>> eps_fault(8 / 255, "linf"), eps_fault(12.0, "l1")
    ('', '')
    >>> eps_fault(8, "linf")
    'eps 8 is outside [0, 1], the range of pixels: write 8/255 for 8 grey levels'
    """
    if not hasattr(eps, "__float__"):
        return f"eps {eps!r} is not a number: write 8 / 255 for 8 grey levels"
    if not 0 <= eps < inf:
        return f"eps {eps!r} is not a finite radius >= 0 in pixel units (images lie in [0, 1])"
    if norm is not None and norm.lower() == "linf" and eps > 1:
        return f"eps {eps!r} is outside [0, 1], the range of pixels: write 8/255 for 8 grey levels"
    return ""
