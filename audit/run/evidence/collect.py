"""The images that an audit keeps: collected from its attack and its worst-case searches."""

from collections.abc import Sequence

from audit.adversary.robustness import Robustness
from audit.information.estimator import Vulnerability
from audit.run.evidence.kept import KeptImages
from audit.run.loading import CellInputs
from audit.types import Images


def kept_images(inputs: CellInputs, robustness: Robustness, per_seed: Sequence[Vulnerability]) -> KeptImages:
    """Return the images of a cell: clean and adversarial ones, and the worst case of each of its seeds."""
    clean, seeds = inputs.images.images, inputs.cell.settings.seeds
    worst = {seed: _all_images(clean, run) for seed, run in zip(seeds, per_seed, strict=True)}
    return KeptImages(clean, inputs.images.labels, robustness.accuracy.outcome.images, worst)


def _all_images(clean: Images, run: Vulnerability) -> Images:
    """Return the worst-case images (N, C, H, W); images that no search moved are the clean ones."""
    if run.others is not None or len(run.adversarial) == len(clean):
        return run.all_adversarial
    found = clean.clone()
    found[run.indices.to(found.device)] = run.adversarial
    return found
