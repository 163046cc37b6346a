"""Information elimination: a penalty on label information in representations conditioned on a label hypothesis.

Inference supplies the hypothesis, so under the true one the representation need not contain the label. Its dependence
on the label is measured by the maximum mean discrepancy (MMD) between the representations of one label and of all.

Source: Zhu, An & Niu 2020; Gretton et al. 2012 for the MMD.
"""

import torch
from torch import Tensor

from audit.errors import UsageError
from audit.types import Features, Labels


def mmd2(first: Features, second: Features, bandwidth: float | Tensor) -> Tensor:
    """Return the unbiased estimate () of the squared MMD of two samples (N, D) and (M, D); it may be negative.

    The kernel is exp(-|x - y|^2 / (2 bandwidth^2)). Raises UsageError if a sample has fewer than two rows.

    Source: Gretton et al. 2012, eq. 3.
    """
    if min(len(first), len(second)) < 2:
        raise UsageError(f"MMD of {len(first)} and {len(second)} samples: each side needs at least 2")
    own = torch.cat([first.new_ones(len(first)), first.new_zeros(len(second))])
    kernel = _kernel(_squared_distances(torch.cat([first, second])), bandwidth)
    return _mmd2(kernel, own[None])[0]


def information_elimination(representation: Features, labels: Labels, bandwidth: float | None = None) -> Tensor:
    """Return the sum () over labels of the squared MMD between one label's representations and all of them.

    `representation` (N, D) is that of each image under its true hypothesis. All representations are a mixture of the
    label's own, with weight p, and the others', with weight 1 - p, so MMD^2(own, all) = (1 - p)^2 MMD^2(own, others).
    The right-hand side compares disjoint samples, so its estimate on a random batch is unbiased given the number of
    images of the label; labels with fewer than two images, or with all but one, are left out. The bandwidth defaults to
    the median distance between different samples of the batch, without a gradient.
    """
    distances = _squared_distances(representation)
    width = _median_distance(distances) if bandwidth is None else bandwidth
    own = torch.nn.functional.one_hot(labels).T.to(representation)
    counts = own.sum(1)
    own = own[(counts >= 2) & (counts <= len(labels) - 2)]
    shares = own.mean(1)
    return ((1 - shares).square() * _mmd2(_kernel(distances, width), own)).sum()


@torch.no_grad()
def _median_distance(squared: Tensor) -> Tensor:
    """Return the median distance () between different samples, at least 1e-6, from squared distances (N, N)."""
    rows, columns = torch.triu_indices(len(squared), len(squared), 1, device=squared.device)
    return squared[rows, columns].median().sqrt().clamp_min(1e-6)


def _squared_distances(samples: Features) -> Tensor:
    squares = samples.square().sum(1)
    return (squares[:, None] + squares[None] - 2 * samples @ samples.T).clamp_min(0)


def _kernel(squared: Tensor, bandwidth: float | Tensor) -> Tensor:
    return torch.exp(-squared / (2 * bandwidth**2))


def _mmd2(kernel: Tensor, own: Tensor) -> Tensor:
    """Return the unbiased squared MMD (L,) between the samples marked 1 and 0 in each row of `own` (L, N)."""
    kernel = kernel - torch.diag(kernel.diagonal())  # no sample is compared with itself
    others = 1 - own
    n, m = own.sum(1), others.sum(1)
    within = ((own @ kernel) * own).sum(1) / (n * (n - 1)) + ((others @ kernel) * others).sum(1) / (m * (m - 1))
    return within - 2 * ((own @ kernel) * others).sum(1) / (n * m)
