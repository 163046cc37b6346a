"""Representation vulnerability by a critic: normal-case minus worst-case mutual information of one split.

The worst-case search keeps the perturbed images as its state. It moves them to one class, mixes their features, and
then takes steps down the value of critics. New critics are fitted on the result. The information of any images inside
the balls is an upper bound on the minimum; the critics' value is an upper bound up to the critics' own error.

Source: Zhu, Zhang & Evans 2020, Definition 3.1 and section 4.1.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

import torch

from audit.flags import FlagCode, flag
from audit.information.critic_search.merging import MERGED, Adversary, CountingEncoder, Merging
from audit.information.critic_search.opponents import CriticGame, HeldClass, Mixing
from audit.information.critic_training import estimate_fixed
from audit.information.encoding import EncodedSplits, Splits
from audit.information.estimator import CARRIED, CLEAN, COLD_START, MIEstimate, Origin, Vulnerability, WarmStart
from audit.information.settings import CriticTraining, WorstCaseSearch
from audit.types import Encoder

_HIDDEN = "{}, hidden"  # refinement of the origin of merged images


def estimate_vulnerability(
    encoder: Encoder,
    images: Splits,
    training: CriticTraining,
    adversary: Adversary,
    seed: int,
    warm_start: WarmStart = COLD_START,
) -> Vulnerability:
    """Return normal- and worst-case mutual information in nats of one split; `indices` counts the held-out images.

    The worst case is the candidate with the smallest validation value: the clean images, those merged into one class,
    and those of the game against critics. At eps = 0 both cases are equal. Images of `warm_start`, and
    `others` of the result, are ordered training, validation (held-out). `passes` counts forward+backward passes of
    single images; a forward pass alone counts as half. Raises InvalidModelError if a feature or a gradient is not
    finite.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1.
    """
    network = CountingEncoder(encoder, training.batch_size)
    search = _WorstCase(network, images, training, adversary, seed, warm_start)
    normal = warm_start.normal or search.estimate(images)
    indices = torch.arange(len(images.test))
    if adversary.threat.eps == 0:
        return Vulnerability(normal, normal, images.test, indices, 0.5 * sum(map(len, images)), CLEAN)
    candidates = {CLEAN: (normal, images), **search.candidates()}
    origin = min(candidates, key=lambda each: candidates[each][0].validated)
    worst, adversarial = candidates[origin]
    worst = replace(worst, flags=(*worst.flags, *search.flags(worst)))
    others = torch.cat([adversarial.train, adversarial.validation])
    return Vulnerability(normal, worst, adversarial.test, indices, network.passes, origin, others)


@dataclass
class _WorstCase:
    """Search of the worst case of one split: candidates, each with the estimate of a critic fitted on it."""

    network: CountingEncoder
    clean: Splits
    training: CriticTraining
    adversary: Adversary
    seed: int
    warm_start: WarmStart
    slope: float = field(default=0.0, init=False)

    def candidates(self) -> dict[Origin, tuple[MIEstimate, Splits]]:
        """Return the warm start if there is one, the merged images, and those after each cycle of the game."""
        start, found, search = self.clean, {}, self.adversary.search
        sizes = [len(part) for part in self.clean]
        if self.warm_start.images is not None:
            start = Splits(*self.warm_start.images.split(sizes))
            found[CARRIED] = self.estimate(start), start
            search = _shortened(search)
        merging = Merging(self.network, self.clean, self.adversary, self.warm_start)
        merged, target = merging.run(start, search.collapse_steps), merging.target.label
        # records show the missing class of an encoder without log-probabilities, too
        origin = Origin(f"{MERGED} None") if target is None else Origin(MERGED, target)
        found[origin] = self.estimate(merged), merged
        if found[origin][0].validated > search.tolerance:
            mixing = Mixing(self.network, torch.cat([*self.clean]), self.adversary)
            mixed = Splits(*mixing.run(torch.cat([*merged]), target, search.mixing_steps).split(sizes))
            found[origin.refined(_HIDDEN)] = self._played(mixed, target, search.rounds)
        return found

    def _played(self, start: Splits, target: int | None, rounds: int) -> tuple[MIEstimate, Splits]:
        """Return the best result of cycles of rounds, none of whose critics `estimate` uses.

        Each cycle after the first doubles the number of rounds. The search ends when a cycle brought little, or nothing
        is left; `slope` is what the last one brought, in nats.
        """
        moved, best = start, None
        held = HeldClass.of(self.network.encode(torch.cat([*start])), target)
        game = CriticGame(
            self.network, self.clean, self.training, self.adversary, self.seed, held, self.adversary.search.repeats
        )
        for number in _cycles(rounds):
            moved, nothing_left = game.play(moved, number)
            found = self.estimate(moved), moved
            if best is not None:
                self.slope = max(0.0, best[0].validated - found[0].validated)
            converged = best is not None and self._is_little(found[0])
            best = min((each for each in (best, found) if each), key=lambda each: each[0].validated)
            if nothing_left or converged:
                break
        assert best is not None
        return best

    def _is_little(self, estimate: MIEstimate) -> bool:
        return self.slope <= max(self.adversary.search.gain, estimate.stderr)

    def flags(self, worst: MIEstimate) -> tuple[str, ...]:
        """Return a flag if the last cycle of the search brought much, and much is left."""
        if self._is_little(worst) or worst.validated <= self.adversary.search.tolerance:
            return ()
        particulars = f"the second half of the search lowered worst_nats by {self.slope:.3f} nats"
        return (flag(FlagCode.SEARCH_NOT_CONVERGED, particulars),)

    def estimate(self, images: Splits) -> MIEstimate:
        """Return the mean held-out estimate of new critics on images, each with its own division of them."""
        encoded = EncodedSplits(*map(self.network.encode, images))
        return estimate_fixed(images, encoded, self.training, self.adversary.search.repeats, self.seed)


def _shortened(search: WorstCaseSearch) -> WorstCaseSearch:
    """Return the settings of a search that continues another one: a quarter of all steps and rounds."""
    names = ("collapse_steps", "mixing_steps", "rounds")
    return replace(search, **{name: ceil(getattr(search, name) / 4) for name in names})


def _cycles(rounds: int) -> Iterator[int]:
    """Yield the rounds of each cycle: a quarter of all, and then as many as before, so that their number doubles."""
    done, cycle = 0, ceil(rounds / 4)
    while done < rounds:
        cycle = min(max(cycle, done), rounds - done)
        yield cycle
        done += cycle
