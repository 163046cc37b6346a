"""Single attacks by name, and the transfer of adversarial images between networks."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from audit.adversary.external import EXTERNAL_ATTACKS
from audit.adversary.label_attack import LabelAttack, Stage, cross_entropy_objective, margin
from audit.adversary.minimum_norm import DDN, CarliniWagner, carlini_wagner, ddn
from audit.adversary.passes import seeded_noise
from audit.adversary.pgd import PGD, minimise, without_early_stopping
from audit.adversary.robustness import TargetModel, measure_target
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import ThreatModel
from audit.errors import UnknownNameError, UsageError
from audit.proportion import Proportion, wilson
from audit.random_keys import Purpose, keyed_generator
from audit.types import Images, standard_torch_state

STAGES = {
    "fgsm": Stage("ce", PGD(1, 1.0, random_start=False)),
    "bim": Stage("ce", PGD(10, 0.1, random_start=False)),
    "pgd": Stage("ce", PGD(20, 0.15)),
    "margin": Stage("margin", PGD(20, 0.15)),
}
MINIMUM_NORM_ATTACKS = {"cw": partial(carlini_wagner, settings=CarliniWagner()), "ddn": partial(ddn, settings=DDN())}
ATTACKS = (*STAGES, *MINIMUM_NORM_ATTACKS, *EXTERNAL_ATTACKS)
_ALIASES = {"autoattack": "autoattack-standard"}


class SingleAttackResult(NamedTuple):
    """Adversarial accuracy under one attack, which images are robust (N,), and the cost of the attack."""

    name: str
    accuracy: Proportion
    robust: Tensor
    passes: int
    forwards: int


@standard_torch_state()
def run_attack(name: str, target: TargetModel, threat: ThreatModel, seed: int) -> SingleAttackResult:
    """Run one attack by its name in `ATTACKS`, or `autoattack` for the standard one.

    Minimum-norm attacks break an image if the norm they reach is at most eps. Raises UnknownNameError with the nearest
    legal names, UsageError for an attack that does not support the threat model's norm, InvalidModelError if an output
    or gradient is not finite.
    """
    name = _ALIASES.get(name, name)
    if name in MINIMUM_NORM_ATTACKS:
        return _run_minimum_norm(name, target, threat, seed)
    if name not in ATTACKS:
        raise UnknownNameError("attack", name, ATTACKS)
    attack = LabelAttack((STAGES[name],)) if name in STAGES else LabelAttack(borrowed=(name,))
    found = measure_target(target.detect_randomness(seed), threat, attack, seed)
    return SingleAttackResult(name, found.adversarial, found.robust, found.passes, found.forwards)


@standard_torch_state()
def transfer_matrix(targets: Mapping[str, TargetModel], threat: ThreatModel, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return, for each source and target network, which of the source's adversarial images (N,) the target gets right.

    The attack on the source is PGD-20 without early stopping: images of high loss transfer better than first errors.
    """
    known = {name: target.detect_randomness(seed) for name, target in targets.items()}
    adversarial = {name: _highest_loss(target, threat, seed) for name, target in known.items()}
    return {
        source: {name: _correct(target, images, seed) for name, target in known.items()}
        for source, images in adversarial.items()
    }


def _run_minimum_norm(name: str, target: TargetModel, threat: ThreatModel, seed: int) -> SingleAttackResult:
    if threat.norm != "l2":
        raise UsageError(f"{name} minimises the l2 norm, and the threat model is {threat.norm}; use --norm l2")
    with seeded_noise(target.images.device, seed):
        found = MINIMUM_NORM_ATTACKS[name](target.network, target.images, target.labels)
    robust = ~found.broken(threat.eps)
    return SingleAttackResult(name, wilson(int(robust.sum()), len(robust)), robust, found.passes, 0)


def _highest_loss(target: TargetModel, threat: ThreatModel, seed: int) -> Images:
    objective = without_early_stopping(cross_entropy_objective(target.searched, target.labels))
    with seeded_noise(target.images.device, seed):
        generator = keyed_generator(seed, Purpose.TRANSFER_ATTACK)
        return minimise(objective, target.images, threat, PGD(20, 0.15), generator).images


def _correct(target: TargetModel, images: Images, seed: int) -> Tensor:
    with seeded_noise(images.device, seed):
        return margin(logits_of(target.evaluated, images, 256), target.labels) > 0
