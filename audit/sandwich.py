"""Critic-free mutual information of a noise-smoothed representation, Z = g(X) + N(0, s^2): nothing is trained.

On n images the smoothed features are a mixture of n Gaussians, whose information about the image is known between
two guaranteed bounds and, by drawing from the mixture, nearly exactly.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from dataclasses import dataclass
from math import log, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from audit.collapse import Moved, Mover, hub, k_means, towards
from audit.errors import UsageError
from audit.estimates import Estimator, FloorKind, MIEstimate, Subject, Vulnerability
from audit.information import encode
from audit.mixture import exponents, guaranteed_pair, mean_shift, plug_in_terms, precise
from audit.threat import ThreatModel
from audit.types import Features, Images, Judged, Objective, keyed_generator

_READ, _CHOOSE, _SEARCH, _CENTRES = range(41, 45)
_VARIES = 1e-6  # of the largest feature: less deviation is rounding


@dataclass(frozen=True)
class Sandwich(Estimator):
    """The plug-in value of the smoothed representation; its worst case merges features by mean shift.

    `noise` is s in layer standard deviations (root mean square over features, on the clean images), or in feature
    units where `absolute`. The search tries several starts (clean, random, quantised to `quantisers` centres each,
    driven to one hub), keeps the best `kept`, and takes `steps` steps of mean shift from each. `draws` noise draws
    give the value. `batch_size` bounds memory and decides nothing else.
    """

    noise: float = 0.5
    absolute: bool = False
    steps: int = 30
    start_steps: int = 10
    relative_step: float = 0.2
    quantisers: tuple[int, ...] = (2, 8, 32)
    kept: int = 2
    draws: int = 4
    batch_size: int = 256

    quantity: ClassVar[str] = "I(X; g(X) + noise)"
    floor_kind: ClassVar[FloorKind] = "smoothed"
    memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)

    def __post_init__(self) -> None:
        for name in ("steps", "start_steps", "kept", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"sandwich {name} {getattr(self, name)!r} must be at least 1")
        if not 0 < self.noise < float("inf"):
            raise UsageError(f"sandwich noise {self.noise!r} must be above 0 and finite")
        if not 0 < self.relative_step <= 2:
            raise UsageError(f"sandwich relative_step {self.relative_step!r} is outside (0, 2]: a multiple of eps")
        if any(count < 1 for count in self.quantisers):
            raise UsageError(f"sandwich quantisers {self.quantisers!r} must have at least 1 centre each")

    @property
    def name(self) -> str:
        """Return the estimator as tables show it."""
        return "sandwich"

    def normal(self, subject: Subject, seed: int) -> MIEstimate:
        """Return the plug-in value on the images as they are."""
        features = encode(subject.encoder, subject.images, self.batch_size).features
        return self._read(features, self.scale(features), seed)

    def objective(self, subject: Subject) -> Objective | None:
        """Return an image's row of the upper guaranteed bound beside all other images, in nats: its own is left out.

        It is small where the image's features lie among those of others. None where features hardly vary.
        """
        clean = encode(subject.encoder, subject.images, self.batch_size).features
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
        self, subject: Subject, threat: ThreatModel, seed: int, normal: MIEstimate | None = None
    ) -> Vulnerability:
        """Return both cases; the worst is the smallest candidate, chosen by other noise draws than it is read with."""
        clean = encode(subject.encoder, subject.images, self.batch_size).features
        scale, which = self.scale(clean), torch.arange(len(clean))
        normal = normal or self._read(clean, scale, seed)
        unmoved = Moved(subject.images, clean, 0.5 * len(clean))
        if threat.eps == 0:
            return Vulnerability(normal, normal, unmoved.images, which, unmoved.passes)
        mover = Mover(subject.encoder, subject.images, threat, self.relative_step, self.batch_size)
        search = _Search(self, mover, unmoved, scale, seed)
        starts = search.starts()
        best = sorted(starts, key=search.value)[: self.kept]
        candidates = [unmoved, *best, *(search.settled(start) for start in best)]
        found = min(candidates, key=search.value)
        worst = self._read(found.features, scale, seed)
        return Vulnerability(normal, worst, found.images, which, unmoved.passes + search.passes)

    def scale(self, features: Features) -> float:
        """Return s in feature units; where features vary by rounding alone, one so large that they tell nothing."""
        if self.absolute:
            return self.noise
        deviation, largest = float(features.var(0, correction=0).mean().sqrt()), float(features.abs().max())
        return self.noise * deviation if deviation > _VARIES * largest else max(1.0, largest)

    def _read(self, features: Features, scale: float, seed: int) -> MIEstimate:
        scaled = (features - features.mean(0)) / scale
        lower, upper = plug_in_terms(scaled, keyed_generator(seed, _READ), self.draws)
        chosen_by = plug_in_terms(scaled, keyed_generator(seed, _CHOOSE), self.draws)[0]
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
    """The starts of one worst-case search, and where mean shift takes them."""

    def __init__(self, settings: Sandwich, mover: Mover, unmoved: Moved, scale: float, seed: int) -> None:
        self.settings, self.mover, self.unmoved, self.scale, self.seed = settings, mover, unmoved, scale, seed
        self.passes = 0.0

    def starts(self) -> list[Moved]:
        """Return clean, random, quantised and hub starts, each with its own features."""
        clean, steps = self.unmoved, self.settings.start_steps
        drawn = self.mover.threat.random_start(clean.images, keyed_generator(self.seed, _SEARCH))
        found = [clean, self._fresh(drawn)]
        generator = keyed_generator(self.seed, _CENTRES)
        for count in self.settings.quantisers:
            centres, nearest = k_means(clean.features, count, generator)
            found.append(self._fresh(self.mover.along(towards(centres[nearest]), clean, steps).images, steps))
        centres, _ = k_means(clean.features, 10, generator)
        middle = torch.cat([clean.features.mean(0, keepdim=True), centres])
        common, cost = hub(self.mover, clean, middle)
        self.passes += cost
        found.append(self._fresh(self.mover.along(towards(common), clean, 2 * steps).images, 2 * steps))
        return found

    def settled(self, start: Moved) -> Moved:
        """Return where mean shift takes a start."""
        draws = keyed_generator(self.seed, _SEARCH, 1)

        def pull(features: Features) -> Features:
            return mean_shift((features - features.mean(0)) / self.scale, draws, 1)

        steps = self.settings.steps
        return self._fresh(self.mover.along(pull, start, steps).images, steps)

    def value(self, candidate: Moved) -> float:
        """Return the plug-in value by draws that no reported number uses."""
        scaled = (candidate.features - candidate.features.mean(0)) / self.scale
        terms, _ = plug_in_terms(scaled, keyed_generator(self.seed, _CHOOSE), self.settings.draws)
        return float(terms.mean())

    def _fresh(self, images: Tensor, steps: float = 0.0) -> Moved:
        features = encode(self.mover.encoder, images, self.settings.batch_size).features
        passes = (steps + 0.5) * len(images)
        self.passes += passes  # also of starts that are dropped
        return Moved(images, features, passes)
