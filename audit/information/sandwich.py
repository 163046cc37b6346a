"""Critic-free mutual information of a noise-smoothed representation, Z = g(X) + N(0, s^2): nothing is trained.

On n images the smoothed features are a mixture of n Gaussians, whose information about the image is known between
two guaranteed bounds and, by drawing from the mixture, nearly exactly.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.errors import UsageError
from audit.information.critic_training import encode, encode_clean
from audit.information.estimator import (
    CLEAN,
    NOTHING_KNOWN,
    Estimator,
    FloorKind,
    Known,
    MIEstimate,
    Subject,
    Vulnerability,
)
from audit.information.feature_merging import Moved, Mover, hub, k_means, towards
from audit.information.gaussian_mixture import exponents, guaranteed_pair, mean_shift, plug_in_terms, precise
from audit.random_keys import Purpose, keyed_generator
from audit.types import Features, Images, Judged, Objective

_CARRIED, _SHIFTED = "carried", "mean shift from "
_CARRIED_STEPS = 0.9  # of a search from scratch: what eight layers for the price of three leave room for
_WIDE = 0.7  # of a search: by then the noise is itself again, and steps begin to shrink
_VARIES = 1e-6  # of the largest feature: less deviation is rounding


@dataclass(frozen=True)
class Sandwich(Estimator):
    """The plug-in value of the smoothed representation; its worst case merges features by mean shift.

    `noise` is s in layer standard deviations (root mean square over features, on the clean images), or in feature
    units where `absolute`. A search starts wide: it is drawn to where features are dense under `widths` times the noise
    to begin with, which shrinks to the noise itself, in `annealing_steps` steps. Beside that, images go to the nearest
    of `quantisers` centres each or to one hub in `start_steps` steps, and from the best of these on by mean shift in
    `steps` more. `draws` noise draws give the value. `batch_size` bounds memory and decides nothing else.
    """

    noise: float = 0.5
    absolute: bool = False
    steps: int = 30
    start_steps: int = 10
    relative_step: float = 0.2
    quantisers: tuple[int, ...] = (2, 8, 32)
    widths: tuple[float, ...] = (4.0, 8.0)
    annealing_steps: int = 40
    draws: int = 4
    batch_size: int = 256

    quantity: ClassVar[str] = "I(X; g(X) + noise)"
    floor_kind: ClassVar[FloorKind] = "smoothed"
    reads_answers: ClassVar[bool] = False
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __post_init__(self) -> None:
        for name in ("steps", "start_steps", "annealing_steps", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"sandwich {name} {getattr(self, name)!r} must be at least 1")
        if not 0 < self.noise < float("inf"):
            raise UsageError(f"sandwich noise {self.noise!r} must be above 0 and finite")
        if not 0 < self.relative_step <= 2:
            raise UsageError(f"sandwich relative_step {self.relative_step!r} is outside (0, 2]: a multiple of eps")
        if any(count < 1 for count in self.quantisers):
            raise UsageError(f"sandwich quantisers {self.quantisers!r} must have at least 1 centre each")
        if not all(1 <= width < float("inf") for width in self.widths):
            raise UsageError(f"sandwich widths {self.widths!r} must be at least 1 and finite: multiples of the noise")

    @property
    def name(self) -> str:
        """Return the estimator as tables show it."""
        return "sandwich"

    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the plug-in value on the images as they are."""
        features = encode_clean(subject, self.batch_size).features
        return self._read(features, self.scale(features), seed)

    def objective(self, subject: Subject) -> Objective | None:
        """Return an image's row of the upper guaranteed bound beside all other images, in nats: its own is left out.

        It is small where the image's features lie among those of others. None where features hardly vary.
        """
        clean = encode_clean(subject, self.batch_size).features
        if not float(clean.var(0, correction=0).mean().sqrt()) > _VARIES * float(clean.abs().max()):
            return None
        middle, scale = clean.mean(0), self.scale(clean)
        rows = precise((clean - middle) / scale)

        def objective(images: Images, index: Tensor) -> Judged:
            features = precise((subject.encoder(images).features - middle) / scale)
            powers = exponents(features, rows, 1.0).scatter(1, index[:, None], -torch.inf)
            value = log(len(rows) - 1) - powers.logsumexp(1)
            return Judged(value.to(images), torch.zeros_like(index, dtype=torch.bool))

        return objective

    def vulnerability(
        self, subject: Subject, threat: ThreatModel, seed: int, known: Known = NOTHING_KNOWN
    ) -> Vulnerability:
        """Return both cases; the worst is the smallest candidate, chosen by other noise draws than it is read with."""
        clean = encode_clean(subject, self.batch_size).features
        scale, which = self.scale(clean), torch.arange(len(clean))
        normal = known.normal or self._read(clean, scale, seed)
        unmoved = Moved(subject.images, clean, 0.5 * len(clean))
        if threat.eps == 0:
            return Vulnerability(normal, normal, unmoved.images, which, unmoved.passes)
        mover = Mover(subject.encoder, subject.images, threat, self.relative_step, self.batch_size)
        search = _Search(self, mover, unmoved, scale, seed)
        candidates = search.carried(known.start) if known.start is not None else search.candidates(known.served)
        served = min(candidates, key=lambda name: search.value(candidates[name]))
        found = candidates[served]
        worst = self._read(found.features, scale, seed)
        return Vulnerability(normal, worst, found.images, which, unmoved.passes + search.passes, served)

    def scale(self, features: Features) -> float:
        """Return s in feature units; where features vary by rounding alone, one so large that they tell nothing."""
        if self.absolute:
            return self.noise
        deviation, largest = float(features.var(0, correction=0).mean().sqrt()), float(features.abs().max())
        return self.noise * deviation if deviation > _VARIES * largest else max(1.0, largest)

    def _read(self, features: Features, scale: float, seed: int) -> MIEstimate:
        scaled = (features - features.mean(0)) / scale
        lower, upper = plug_in_terms(scaled, keyed_generator(seed, Purpose.SANDWICH_READING), self.draws)
        chosen_by = plug_in_terms(scaled, keyed_generator(seed, Purpose.SANDWICH_CHOICE), self.draws)[0]
        bounds, value, above = guaranteed_pair(scaled), float(lower.mean()), float(upper.mean())
        flags = []
        if above - value > 0.2:
            flags.append(f"saturated: the plug-in pair is {above - value:.1f} nats apart: more images would say more")
        return MIEstimate(
            nats=value, stderr=float(lower.std()) / sqrt(len(lower)), images=len(lower), ceiling=log(len(lower)),
            validated=float(chosen_by.mean()),
            parts={"plug_in_upper": above, "guaranteed_lower": bounds.lower, "guaranteed_upper": bounds.upper,
                   "noise": scale},
            flags=tuple(flags),
        )  # fmt: skip


class _Search:
    """The candidates of one worst-case search, by name."""

    def __init__(self, settings: Sandwich, mover: Mover, unmoved: Moved, scale: float, seed: int) -> None:
        self.settings, self.mover, self.unmoved, self.scale, self.seed = settings, mover, unmoved, scale, seed
        self.passes = 0.0

    def candidates(self, served: str = "") -> dict[str, Moved]:
        """Return the clean images and where every kind of search takes them; of one kind, where that served."""
        settings = self.settings
        quantised = {f"quantised {count}": partial(self._quantised, count) for count in settings.quantisers}
        starts = quantised | {"hub": self._hub}
        annealed = {f"annealed {width:g}": partial(self._annealed_clean, width) for width in settings.widths}
        wanted = served.removeprefix(_SHIFTED)
        if wanted in starts | annealed:
            starts = {name: make for name, make in starts.items() if name == wanted}
            annealed = {name: make for name, make in annealed.items() if name == wanted}
        elif served == CLEAN:  # where nothing served, one kind is enough to see whether that is so here
            starts, annealed = {}, dict(list(annealed.items())[-1:])
        found = {CLEAN: self.unmoved, **{name: make() for name, make in (starts | annealed).items()}}
        if starts:
            best = min(starts, key=lambda name: self.value(found[name]))
            found[_SHIFTED + best] = self._shifted(found[best], [1.0] * settings.steps, self.mover)
        return found

    def carried(self, images: Images) -> dict[str, Moved]:
        """Return the worst-case images of a smaller ball or a later layer, and where one annealing takes them."""
        start, settings = self._fresh(images), self.settings
        steps, width = ceil(_CARRIED_STEPS * settings.annealing_steps), min(settings.widths, default=1.0)
        annealed = self._annealed(start, width, steps, settings.relative_step / 2)
        return {CLEAN: self.unmoved, _CARRIED: start, f"{_CARRIED}, annealed": annealed}

    def _quantised(self, count: int) -> Moved:
        centres, nearest = k_means(
            self.unmoved.features, count, keyed_generator(self.seed, Purpose.SANDWICH_CENTRES, count)
        )
        steps = self.settings.start_steps
        return self._fresh(self.mover.along(towards(centres[nearest]), self.unmoved, steps).images, steps)

    def _hub(self) -> Moved:
        """Return all images driven to one place: the one of a few that a short trial reaches best."""
        clean, steps = self.unmoved, self.settings.start_steps
        centres, _ = k_means(clean.features, 6, keyed_generator(self.seed, Purpose.SANDWICH_CENTRES, 1))
        common, cost = hub(self.mover, clean, torch.cat([clean.features.mean(0, keepdim=True), centres]))
        self.passes += cost
        mover = replace(self.mover, relative_step=2 * self.mover.relative_step)
        return self._fresh(mover.along(towards(common), clean, steps).images, steps)

    def _annealed_clean(self, width: float) -> Moved:
        # wide at the start is far to go at the end: smaller steps get nearer (measured on three networks)
        step = self.settings.relative_step * min(1.0, 4 / width)
        return self._annealed(self.unmoved, width, self.settings.annealing_steps, step)

    def _annealed(self, start: Moved, width: float, steps: int, relative_step: float) -> Moved:
        mover = replace(self.mover, relative_step=relative_step, hold=_WIDE)
        last = max(1, steps - 1)
        return self._shifted(start, [width ** max(0.0, 1 - k / last / _WIDE) for k in range(steps)], mover)

    def _shifted(self, start: Moved, widths: list[float], mover: Mover) -> Moved:
        """Return where mean shift takes a start, one step for each width of the noise."""
        draws, scales = keyed_generator(self.seed, Purpose.SANDWICH_SEARCH), iter(widths)

        def pull(features: Features) -> Features:
            return mean_shift((features - features.mean(0)) / (next(scales) * self.scale), draws, 1)

        reached = mover.along(pull, start, len(widths))
        return self._fresh(reached.images, len(widths))

    def value(self, candidate: Moved) -> float:
        """Return the plug-in value by draws that no reported number uses."""
        scaled = (candidate.features - candidate.features.mean(0)) / self.scale
        terms, _ = plug_in_terms(scaled, keyed_generator(self.seed, Purpose.SANDWICH_CHOICE), self.settings.draws)
        return float(terms.mean())

    def _fresh(self, images: Tensor, steps: float = 0.0) -> Moved:
        features = encode(self.mover.encoder, images, self.settings.batch_size).features
        passes = (steps + 0.5) * len(images)
        self.passes += passes  # also of starts that are dropped
        return Moved(images, features, passes)
