"""Estimator `sandwich`: information of a noise-smoothed representation Z = g(X) + noise, without a critic.

The smoothed features of n images are a mixture of n Gaussians. Its information about the image lies between two proven
bounds and is estimated by sampling from the mixture.

Source: Kolchinsky & Tracey 2017, "Estimating Mixture Entropy with Pairwise Distances", eqs. 10 and 13.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, log, sqrt
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from audit.adversary.threat import ThreatModel
from audit.information.encoding import clean_features, encode
from audit.information.estimator import (
    CARRIED,
    CLEAN,
    COLD_START,
    Estimator,
    EstimatorInputs,
    FloorKind,
    MIEstimate,
    Origin,
    Vulnerability,
    WarmStart,
)
from audit.information.feature_merging import Candidate, FeatureDescent, k_means, most_reachable, towards
from audit.information.gaussian_mixture import guaranteed_bounds, in_float64, log_kernel, mean_shift, plug_in_terms
from audit.information.settings import SandwichSettings
from audit.information.smoothing.saturation import pair_flags
from audit.information.smoothing.scale import Smoothing, common_unit, fitted_unit, spread_of
from audit.random_keys import Purpose, keyed_generator
from audit.types import Encoded, Encoder, Features, Images, Objective, ObjectiveValue, equal_pixels

_HUB = Origin("hub")
_MEAN_SHIFT, _ANNEALED = "mean shift from {}", "{}, annealed"
_WARM_START_SHARE = 0.9  # of the annealing steps from scratch: eight layers then cost less than three from scratch
_ANNEALED_SHARE = 0.7  # of the steps; the noise then has its final width, and step sizes begin to shrink
_HALF_A_UNIT = 0.5  # noise in feature units where none is given


@dataclass(frozen=True)
class Sandwich(SandwichSettings, Estimator):
    """Plug-in estimate of I(X; g(X) + s E), E ~ N(0, I), in nats: the information of a uniformly drawn image.

    (1/n) sum_i E[ln(n exp(-|z - f_i|^2 / 2) / sum_j exp(-|z - f_j|^2 / 2))] with z = f_i + E and features f (n, D) in
    units of the noise, sampled with `draws` draws; at most ln n. Images are (n, C, H, W). The noise s of a feature is
    proportional to its deviation over the clean images, by the factor at which these hold `target_nats`; features
    that do not vary are left out. With `noise` it is one value for all features: see `SandwichSettings`. `parts` hold
    the plug-in value without each draw's own image (`plug_in_upper`), proven bounds (`guaranteed_lower`,
    `guaranteed_upper`) and s (`noise`), in deviations of each feature, or in feature units if it is fixed.

    The worst case is the smallest of several candidates: images moved to k-means centres and to one common hub, the
    better of them refined by mean shift, the gradient descent of the mixture's entropy, and, unless nearly nothing is
    left, mean shift annealed from a wider kernel.

    Raises UsageError for a setting that is not legal; InvalidModelError if a gradient, or a feature that is not masked
    in every image, is not finite.

    Source: Kolchinsky & Tracey 2017, eqs. 10 and 13 (bounds); Zhu, Zhang & Evans 2020, Definition 3.1.
    """

    quantity: ClassVar[str] = "I(X; g(X) + noise)"
    bounds_heads: ClassVar[bool] = False  # a bound on heads that see features through noise bounds no other head
    floor_kind: ClassVar[FloorKind] = "smoothed"
    reads_log_probs: ClassVar[bool] = False
    version: ClassVar[int] = 3

    def normal(self, inputs: EstimatorInputs, seed: int) -> MIEstimate:
        """Return the plug-in value on the clean images."""
        clean = clean_features(inputs, self.batch_size)
        smoothing = self.smoothing(clean)
        return self._estimate(smoothing.of(clean), smoothing, seed)

    def smoothing(self, clean: Features) -> Smoothing:
        """Return the noise of every feature, from clean features (N, D)."""
        if self.absolute:
            return common_unit(clean, self.noise or _HALF_A_UNIT, absolute=True)
        return fitted_unit(clean, self.target_nats) if self.noise is None else common_unit(clean, self.noise)

    def noisy(self, clean: Features, features: Features, generator: torch.Generator) -> Features:
        """Return features (N, D) with one draw of the noise that fits clean ones (M, D)."""
        return self.smoothing(clean).noisy(features, generator)

    def objective(self, inputs: EstimatorInputs) -> Objective | None:
        """Return each image's term ln(n - 1) - ln sum_{j != i} exp(-|f_i - f_j|^2 / 2) of the upper bound, in nats.

        The f_j are clean features in units of the noise. None if features vary by rounding errors only.
        """
        clean = clean_features(inputs, self.batch_size)
        if not bool(spread_of(clean).varies.any()):
            return None
        smoothing = self.smoothing(clean)
        rows = in_float64(smoothing.of(clean))

        def objective(images: Images, index: Tensor) -> ObjectiveValue:
            features = in_float64(smoothing.of(inputs.encoder(images).features))
            powers = log_kernel(features, rows, 1.0).scatter(1, index[:, None], -torch.inf)
            value = log(len(rows) - 1) - powers.logsumexp(1)
            return ObjectiveValue(value.to(images), torch.zeros_like(index, dtype=torch.bool))

        return objective

    def vulnerability(
        self, inputs: EstimatorInputs, threat: ThreatModel, seed: int, warm_start: WarmStart = COLD_START
    ) -> Vulnerability:
        """Return both cases; candidates are compared by other noise draws than the reported value."""
        raw = clean_features(inputs, self.batch_size)
        smoothing, indices = self.smoothing(raw), torch.arange(len(raw))
        features = smoothing.of(raw)
        normal = warm_start.normal or self._estimate(features, smoothing, seed)
        clean = Candidate(inputs.images, features, 0.5 * len(features))
        if threat.eps == 0:
            return Vulnerability(normal, normal, clean.images, indices, clean.passes)
        encoder = _in_units_of_noise(inputs.encoder, smoothing)
        descent = FeatureDescent(encoder, inputs.images, threat, self.relative_step, self.batch_size)
        search = _CandidateSearch(self, descent, clean, seed)
        if warm_start.images is not None:
            candidates = search.continued(warm_start.images)
        else:
            candidates = search.candidates(warm_start.origin)
        origin, found, _ = best_of(candidates)
        worst = self._estimate(found.features, smoothing, seed)
        return Vulnerability(normal, worst, found.images, indices, clean.passes + search.passes, origin)

    def read_worst(self, inputs: EstimatorInputs, images: Images, seed: int) -> MIEstimate:
        """Return the plug-in value on perturbed images, with the noise that fits the clean ones."""
        if equal_pixels(images, inputs.images):
            return self.normal(inputs, seed)
        smoothing = self.smoothing(clean_features(inputs, self.batch_size))
        features = encode(_in_units_of_noise(inputs.encoder, smoothing), images, self.batch_size).features
        return self._estimate(features, smoothing, seed)

    def _estimate(self, features: Features, smoothing: Smoothing, seed: int) -> MIEstimate:
        features = features - features.mean(0)
        lower, upper = self.terms(features, keyed_generator(seed, Purpose.SANDWICH_READING))
        validation = self.terms(features, keyed_generator(seed, Purpose.SANDWICH_CHOICE))[0]
        bounds, value, above = guaranteed_bounds(features), float(lower.mean()), float(upper.mean())
        return MIEstimate(
            nats=value,
            stderr=float(lower.std()) / sqrt(len(lower)),
            images=len(lower),
            ceiling=log(len(lower)),
            validated=float(validation.mean()),
            parts={
                "plug_in_upper": above,
                "guaranteed_lower": bounds.lower,
                "guaranteed_upper": bounds.upper,
                "noise": smoothing.noise,
            },
            flags=(*pair_flags(value, above, len(lower)), *smoothing.flags),
        )

    def terms(self, features: Features, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the terms (N,), (N,) of the plug-in pair in nats, for centred features (N, D) in noise units."""
        # both signs of a draw: the same number of them then tells more of the difference between two cases
        return plug_in_terms(features, generator, self.draws, mirrored=True)


def _in_units_of_noise(encoder: Encoder, smoothing: Smoothing) -> Encoder:
    def encoded(images: Images) -> Encoded:
        features, log_probs = encoder(images)
        return Encoded(smoothing.of(features), log_probs)

    return encoded


class Valued(NamedTuple):
    """A candidate of a worst-case search with its origin and the value in nats by which candidates are compared."""

    origin: Origin
    candidate: Candidate
    value: float


def best_of(candidates: Iterable[Valued]) -> Valued:
    """Return the first candidate of the least value; the others are not kept."""
    return min(candidates, key=lambda each: each.value)


class _CandidateSearch:
    """The candidates of one worst-case search by origin, with the passes spent; features are in units of the noise."""

    def __init__(self, settings: Sandwich, descent: FeatureDescent, clean: Candidate, seed: int) -> None:
        self.settings, self.descent, self.clean, self.seed = settings, descent, clean, seed
        self.passes = 0.0

    def candidates(self, origin: Origin | None = None) -> "Iterator[Valued]":
        """Yield the clean images and the result of every search, or only of the kind of `origin`, with their values.

        They come one at a time: the images of all of them may not fit into memory.
        """
        settings = self.settings
        quantised = {Origin("quantised", count): partial(self._quantised, count) for count in settings.quantisers}
        starts = quantised | {_HUB: self._hub}
        annealed = {Origin("annealed", width): partial(self._annealed_clean, width) for width in settings.widths}
        wanted = origin.unrefined if origin is not None else None
        if wanted in starts | annealed:
            starts = {each: search for each, search in starts.items() if each == wanted}
            annealed = {each: search for each, search in annealed.items() if each == wanted}
        elif origin == CLEAN:  # no search improved on the clean images: one kind suffices to confirm it for this seed
            starts, annealed = {}, dict(list(annealed.items())[-1:])
        yield self._valued(CLEAN, self.clean)
        best: Valued | None = None
        for each, search in starts.items():
            found = self._valued(each, search())
            best = found if best is None or found.value < best.value else best
            yield found
        if best is not None:
            shifted = self._shifted(best.candidate, [1.0] * settings.steps, self.descent)
            refined = self._valued(best.origin.refined(_MEAN_SHIFT), shifted)
            yield refined
            if min(best.value, refined.value) <= settings.tolerance:
                return  # another search could gain no more than that
        for each, search in annealed.items():
            yield self._valued(each, search())

    def continued(self, images: Images) -> "Iterator[Valued]":
        """Yield the clean images, the warm start, and the result of one annealing from there, with their values."""
        start, settings = self._encoded(images), self.settings
        steps, width = ceil(_WARM_START_SHARE * settings.annealing_steps), min(settings.widths, default=1.0)
        yield self._valued(CLEAN, self.clean)
        yield self._valued(CARRIED, start)
        annealed = self._annealed(start, width, steps, settings.relative_step / 2)
        yield self._valued(CARRIED.refined(_ANNEALED), annealed)

    def _quantised(self, count: int) -> Candidate:
        """Move every image's features towards the nearest of `count` k-means centres."""
        centres, nearest = k_means(
            self.clean.features, count, keyed_generator(self.seed, Purpose.SANDWICH_CENTRES, count)
        )
        steps = self.settings.start_steps
        return self._encoded(self.descent.run(towards(centres[nearest]), self.clean, steps).images, steps)

    def _hub(self) -> Candidate:
        """Move all features towards one centre, the one that a trial on a few images reaches best."""
        clean, steps = self.clean, self.settings.start_steps
        centres, _ = k_means(clean.features, 6, keyed_generator(self.seed, Purpose.SANDWICH_CENTRES, 1))
        centres = torch.cat([clean.features.mean(0, keepdim=True), centres])
        common, passes = most_reachable(self.descent, clean, centres)
        self.passes += passes
        descent = replace(self.descent, relative_step=2 * self.descent.relative_step)
        return self._encoded(descent.run(towards(common), clean, steps).images, steps)

    def _annealed_clean(self, width: float) -> Candidate:
        # a wide kernel merges distant features, which smaller steps bring closer (measured on three networks)
        step = self.settings.relative_step * min(1.0, 4 / width)
        return self._annealed(self.clean, width, self.settings.annealing_steps, step)

    def _annealed(self, start: Candidate, width: float, steps: int, relative_step: float) -> Candidate:
        """Take mean-shift steps while the kernel shrinks from `width` times the noise to the noise."""
        descent = replace(self.descent, relative_step=relative_step, hold=_ANNEALED_SHARE)
        last = max(1, steps - 1)
        widths = [width ** max(0.0, 1 - k / last / _ANNEALED_SHARE) for k in range(steps)]
        return self._shifted(start, widths, descent)

    def _shifted(self, start: Candidate, widths: list[float], descent: FeatureDescent) -> Candidate:
        """Take one mean-shift step with each width of the kernel, in units of the noise."""
        draws, scales = keyed_generator(self.seed, Purpose.SANDWICH_SEARCH), iter(widths)

        def feature_gradient(features: Features) -> Features:
            return mean_shift((features - features.mean(0)) / next(scales), draws, 1)

        reached = descent.run(feature_gradient, start, len(widths))
        return self._encoded(reached.images, len(widths))

    def _valued(self, origin: Origin, candidate: Candidate) -> "Valued":
        """Return a candidate with its plug-in value from noise draws that no reported value uses."""
        features = candidate.features - candidate.features.mean(0)
        terms, _ = self.settings.terms(features, keyed_generator(self.seed, Purpose.SANDWICH_CHOICE))
        return Valued(origin, candidate, float(terms.mean()))

    def _encoded(self, images: Tensor, steps: float = 0.0) -> Candidate:
        features = encode(self.descent.encoder, images, self.settings.batch_size).features
        passes = (steps + 0.5) * len(images)
        self.passes += passes  # also of candidates that are not chosen
        return Candidate(images, features, passes)
