"""Transfer collisions to a larger ball or to another layer of the same network, and combine them with a certificate.

A collision at a layer is a collision at every later layer, and one inside a ball lies inside every larger ball. The
caller verifies both with `validity.valid_rows` before transferred collisions count.
"""

import torch

from audit.adversary.memory.limit import allowed
from audit.certificate.collisions import Collisions, concatenate, pairs_and_hubs
from audit.certificate.packing import collision_bound
from audit.certificate.population import sample_limit
from audit.certificate.results import Certificate
from audit.certificate.settings import CertificateSettings
from audit.types import FeatureMap, Labels

_BATCH = 128


@torch.no_grad()
def transfer_to_layer(precise: FeatureMap, collisions: Collisions) -> Collisions:
    """Return collisions with their targets replaced by the median features at another layer, given in float64.

    The images of a target need not collide there.
    """
    if len(collisions.members) == 0:
        image = collisions.moved.new_zeros(1, *collisions.moved.shape[1:])
        return collisions._replace(targets=collisions.targets.new_zeros(0, precise(image).shape[1]))
    features = torch.cat([precise(batch) for batch in collisions.moved.split(allowed(_BATCH))])
    # the median, not the mean: one outlier must not invalidate the other images of its target
    targets = [features[collisions.at == target].median(0).values for target in range(len(collisions.targets))]
    return collisions._replace(targets=torch.stack(targets))


def strengthen(
    certificate: Certificate, others: Collisions, labels: Labels, settings: CertificateSettings
) -> Certificate:
    """Return the certificate from its own and other valid collisions; the same object if they do not tighten it.

    Labels (N,).
    """
    collisions = concatenate([certificate.collisions, others])
    bound = collision_bound(collisions, labels, settings.seconds)
    if bound.kept >= certificate.bound.kept:
        return certificate
    pairs, hubs = pairs_and_hubs(collisions, labels)
    return certificate._replace(
        bound=bound,
        population=sample_limit(bound.kept, bound.images, settings.confidence),
        collisions=collisions,
        at_hubs=tuple(len(hub) for hub in hubs),
        pairs=len(pairs),
    )
