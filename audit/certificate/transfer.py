"""One certificate's meetings tried elsewhere: in a larger ball, and at another layer of the same network.

What meets at a layer meets at every later one, and what a ball allows a larger ball allows. That is how it should be;
here it is looked at, with a plain forward pass, before it counts.
"""

import torch

from audit.certificate.certificate import Certificate, CertificateSettings, bound_of, edges_and_hubs
from audit.certificate.collision_search import FeatureMap
from audit.certificate.collisions import Meetings
from audit.certificate.population import sample_limit
from audit.types import Labels

_BATCH = 128


@torch.no_grad()
def at_layer(precise: FeatureMap, meetings: Meetings) -> Meetings:
    """Return meetings with the targets that their images have at another layer, whether they meet there or not."""
    if len(meetings.members) == 0:
        width = precise(meetings.moved.new_zeros(1, *meetings.moved.shape[1:])).shape[1]
        return meetings._replace(targets=meetings.targets.new_zeros(0, width))
    features = torch.cat([precise(batch) for batch in meetings.moved.split(_BATCH)])
    groups = range(len(meetings.targets))
    # the middle one, not the mean: one image that went astray must not take the others with it
    targets = torch.stack([features[meetings.at == group].median(0).values for group in groups])
    return meetings._replace(targets=targets)


def joined(first: Meetings, second: Meetings) -> Meetings:
    """Return the meetings of both."""
    both = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    return Meetings(*both)._replace(at=torch.cat([first.at, second.at + len(first.targets)]))


def strengthened(
    certificate: Certificate, others: Meetings, labels: Labels, settings: CertificateSettings
) -> Certificate:
    """Return the certificate that its own meetings and others, which stand at its place too, give together.

    It is the same certificate where the others add nothing.
    """
    meetings = joined(certificate.meetings, others)
    bound = bound_of(meetings, labels, settings.seconds)
    if bound.kept >= certificate.bound.kept:
        return certificate
    edges, stars = edges_and_hubs(meetings, labels)
    return certificate._replace(
        bound=bound,
        population=sample_limit(bound.kept, bound.images, settings.confidence),
        meetings=meetings,
        at_hubs=tuple(len(star) for star in stars),
        pairs=len(edges),
    )
