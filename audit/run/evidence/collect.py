"""The images that an audit keeps: collected from its attack and its worst-case searches."""

from collections.abc import Mapping

from audit.adversary.robustness import Robustness
from audit.information.estimator import Vulnerability
from audit.run.evidence.kept import KeptImages
from audit.types import Images, Labels


def kept_images(
    clean: Images, labels: Labels, robustness: Robustness | None, per_seed: Mapping[int, Vulnerability]
) -> KeptImages:
    """Return the clean images (N, C, H, W) of a cell, the adversarial ones, and the worst case of each of its seeds.

    Without an attack, the adversarial images are the clean ones.
    """
    worst = {seed: _all_images(clean, run) for seed, run in per_seed.items()}
    return KeptImages(clean, labels, robustness.accuracy.outcome.images if robustness else clean, worst)


def _all_images(clean: Images, run: Vulnerability) -> Images:
    """Return the worst-case images (N, C, H, W); images that no search moved are the clean ones."""
    if run.others is not None or len(run.adversarial) == len(clean):
        return run.all_adversarial
    found = clean.clone()
    found[run.indices.to(found.device)] = run.adversarial
    return found
