"""Worst-case search of label information: a repeated game between images and probes (fictitious play).

A round fits probes on the present images and moves the images against the probes of the last rounds. Information is
convex in the distribution of the moved images, so images that each stand where a random one of several rounds left
them carry at most the mean information of these rounds: such mixtures end oscillations between two strategies.

Source: Brown 1951, "Iterative Solution of Games by Fictitious Play".
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from audit.information.estimator import CARRIED, CLEAN, Origin
from audit.information.probing.opponents import KINDS, Field, Opponent, ProbeDescent, fit_opponent
from audit.information.probing.panel import Panel
from audit.information.probing.positions import Mixture, Position, PositionReader
from audit.information.probing.settings import LabelInformationSettings
from audit.information.probing.starts import MERGED, MIXED, PUSHED, OwnStarts, nothing_left, round_sizes
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Images

PLAYED = Origin("game")
_CHOOSING = ("own", "neighbours", "linear", "hidden", "forest")  # by their cost; without boosting, like the forest
_FEWEST_ROUNDS = 4  # before the search may end because it stalls
_JOINING = 2  # opponents that a round adds
_SHORTEST = 0.03  # least share of a step that an image takes in every second round
_MUCH_LESS = 0.25  # share of what pushed images tell below which the game is played from mixed ones
_MIXED_ROUNDS = (2, 4, 8)  # last rounds that images are mixed from


class Found(NamedTuple):
    """The best position, the passes spent, and the least value in nats after so many passes an image, by round.

    `slope` is what the second half of the passes brought, in nats; the search has `converged` if that is small.
    """

    best: Position
    passes: float
    curve: tuple[tuple[int, float], ...]
    slope: float
    converged: bool


class ProbeGame:
    """One search over one encoder, sample and ball.

    Labels are 0 to K - 1, and the encoder's log-probabilities, if there are any, are (N, K).
    """

    def __init__(self, settings: LabelInformationSettings, field: Field, panel: Panel, seed: int) -> None:
        self.settings, self.field, self.seed = settings, field, seed
        choosing = panel._replace(members=_CHOOSING, quick=True)
        self.reader = PositionReader(field.encoder, field.labels, choosing, seed, settings.batch_size)

    def search(self, clean: Encoded, starts: Mapping[Origin, Images], only: Origin | None = None) -> Found:
        """Return the best position found from clean images, `starts`, and starts of its own.

        These are images pushed past a linear probe, images moved to where densities of the classes are alike, and
        images moved to one point; a start carried over from another search replaces all three. `only` is the origin of
        another seed's worst case: other kinds of searches are left out.
        """
        best = self.reader.read(self.field.clean, clean, CLEAN)
        curve = [self._point(best)]
        for origin, images in starts.items():
            best = _better(best, self.reader.at(images, origin))
        kinds = {PUSHED, MIXED, MERGED}
        if only not in (None, CARRIED):
            kinds = {MERGED} if only == MERGED else {PUSHED, MIXED}
        own = OwnStarts(self.settings, self.field, self.reader).find(clean, set() if CARRIED in starts else kinds, best)
        best = _better(best, own.get(PUSHED, best))
        if MIXED in own and own[MIXED].nats < _MUCH_LESS * best.nats:
            # else the mixed images are islands that the game would not leave, as features of one dimension show
            best = own.pop(MIXED)
        curve.append(self._point(best))
        # not from the merged images, which neighbours of one class surround: the game stalls there
        if PUSHED in kinds and not nothing_left(self.settings, best.nats, *(each.nats for each in own.values())):
            best = self._play(best, curve)
        slope = self._slope(curve)
        aside = min(own.values(), key=lambda each: each.nats, default=best)
        if aside.nats < best.nats:
            best = aside
            curve.append(self._point(best))
        converged = slope <= max(self.settings.tolerance, best.reading.stderr) or nothing_left(self.settings, best.nats)
        return Found(best, self.reader.passes, tuple(curve), slope, converged)

    def _play(self, best: Position, curve: list[tuple[int, float]]) -> Position:
        position, rounds, opponents = best, [best], list[Opponent]()
        for number in range(self.settings.rounds):
            opponents = [*opponents, *self._joining(position)][-self.settings.memory :]
            position = self._round(position.images, opponents, number)
            rounds = [*rounds, position][-max(_MIXED_ROUNDS) :]
            position = _better(position, self._mixture(rounds, best, number, position.nats))
            best = _better(best, position)
            curve.append(self._point(best))
            if self._ended(curve, best.reading.stderr):
                break
        return best

    def _joining(self, position: Position) -> list[Opponent]:
        """Return the opponents that read most of the position, fitted on it."""
        parts = position.reading.parts
        kinds = sorted((kind for kind in KINDS if kind in parts), key=parts.__getitem__, reverse=True)
        readers, labels = self.reader.panel.readers, self.field.labels
        return [fit_opponent(kind, position.encoded, labels, readers) for kind in kinds[:_JOINING]]

    def _round(self, start: Images, opponents: Sequence[Opponent], number: int) -> Position:
        share = None
        if number % 2:
            # images that take steps of different lengths leave a boundary in no order that tells their class
            generator = keyed_generator(self.seed, Purpose.PROBE_STRIDES, number)
            share = _SHORTEST ** torch.rand(len(start), generator=generator)
        sizes = round_sizes(self.settings, self.field.threat.eps, number)
        images = self.reader.moved(ProbeDescent(self.field, opponents), start, sizes, share)
        return self.reader.at(images, PLAYED)

    def _mixture(self, rounds: Sequence[Position], best: Position, number: int, enough: float) -> Position:
        """Return the mixture of rounds of which neighbours read least, read until it holds `enough` nats."""
        generator = keyed_generator(self.seed, Purpose.PROBE_MIXES, number)
        groups = [rounds[-count:] for count in _MIXED_ROUNDS if count <= len(rounds)]
        groups += [[best, rounds[-1]], [best, best, best, rounds[-1]]]
        mixtures = [Mixture.draw(group, generator) for group in groups]
        best_mixture = min(mixtures, key=lambda mixture: self.reader.quickly(mixture.encoded()))
        return self.reader.read(best_mixture.images(), best_mixture.encoded(), PLAYED, enough)

    def _point(self, best: Position) -> tuple[int, float]:
        return round(self.reader.passes / len(best.images)), best.nats

    def _ended(self, curve: Sequence[tuple[int, float]], stderr: float) -> bool:
        if nothing_left(self.settings, curve[-1][1]):
            return True
        stalled = len(curve) > _FEWEST_ROUNDS + 1 and curve[-4][1] - curve[-1][1] <= self.settings.gain
        return stalled and self._slope(curve) <= max(self.settings.tolerance, stderr)

    def _slope(self, curve: Sequence[tuple[int, float]]) -> float:
        """Return what the second half of the passes brought in nats, or all that is left if that is less."""
        passes, left = curve[-1]
        before = [nats for earlier, nats in curve if earlier <= passes / 2]
        return min(left, before[-1] - left) if before else 0.0


def _better(one: Position, other: Position) -> Position:
    return other if other.nats < one.nats else one
