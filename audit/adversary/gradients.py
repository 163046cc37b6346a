"""The gradient that every search follows: to the images, never to the parameters."""

import torch
from torch import Tensor

from audit.errors import InvalidModelError
from audit.types import Images


def input_gradient(value: Tensor, images: Images, weights: Tensor | None = None, *, keep: bool = False) -> Tensor:
    """Return the gradient (N, C, H, W) of a value, or of features weighted by `weights`, at the leaf images.

    `keep` leaves the graph for another gradient of it. Raises InvalidModelError where there is no gradient or it is
    not finite: a search that follows it would find nothing and say so to nobody.
    """
    found = None
    if value.requires_grad:
        # autograd.grad, not backward: parameters keep no gradient and cost nothing
        (found,) = torch.autograd.grad(value, images, weights, retain_graph=keep, allow_unused=True)
    if found is None:
        raise InvalidModelError("the network gives no gradient to its input: something in its forward pass cuts it off")
    # one sum reads the gradient once; the careful look is for where it is not finite, be it by overflow
    bad = 0 if found.sum().isfinite() else int((~found.isfinite()).flatten(1).any(1).sum())
    if bad:
        raise InvalidModelError(f"the gradient to the input is not finite for {bad} of {len(images)} images")
    return found
