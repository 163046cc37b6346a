"""Vulnerability of single features of a layer: MI of each with the image, in the normal and in the worst case.

A feature is one coordinate of a layer, or one channel at one unit of a convolution, which depends on its receptive
field only. Each feature has a search and worst-case images of its own, so **the values describe a layer and do not
bound it**: the vulnerability of a layer is not the sum of its features' vulnerabilities, and neither bounds the other.

A continuous feature takes every value between its minimum and maximum in the ball, which is connected. So the network
is searched for these two ends only; the least informative values between them are a one-dimensional problem.

Source: Zhu, Zhang & Evans 2020, section 5.3 and Figure 3; Appendix C on sums over features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, log, sqrt
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from audit.adversary.memory.limit import allowed
from audit.adversary.passes import input_gradient
from audit.adversary.pgd import PGD, minimise
from audit.adversary.threat import ThreatModel
from audit.attribution.intervals import least_informative_values
from audit.attribution.receptive_field import field_size, receptive_field, unit_features
from audit.errors import UnknownNameError, UsageError
from audit.information.gaussian_mixture import plug_in_terms
from audit.random_keys import Purpose, keyed_generator
from audit.representation.layers import Representation
from audit.types import FeatureMap, Images, ObjectiveValue

_MAX_COPIED_PIXELS = 2**23  # of the copies of the images for one chunk of features
_SEARCH_PERCENT = 60  # approximate share of the search in the running time
NoiseScale = Literal["feature", "layer"]
PercentProgress = Callable[[str, int], None]
"""Receives the current stage and the percentage of the work that is done."""


@dataclass(frozen=True)
class FeatureSettings:
    """Settings of the noise and of the search.

    `noise` is the deviation of the Gaussian noise on a feature, in units of the feature's own deviation, or with
    `scale` layer of the root mean square deviation of all features. `steps` and `relative_step` (times eps) are those
    of the search for the two ends, which starts at the corner that the first gradient points to; `restarts` adds
    random starts. `settle` is the number of mean shift steps of the search between the ends. `batch_size` bounds memory
    and affects no value.
    """

    noise: float = 0.5
    scale: NoiseScale = "feature"
    steps: int = 10
    relative_step: float = 0.25
    restarts: int = 1
    settle: int = 30
    draws: int = 4
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "settle", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)!r} of a feature search must be at least 1")
        if not 0 < self.noise < float("inf"):
            raise UsageError(
                f"noise {self.noise!r} must be above 0 and finite: its unit is the deviation of the feature"
            )
        if self.scale not in ("feature", "layer"):
            raise UnknownNameError("noise scale", self.scale, ("feature", "layer"))


class FeatureRanges(NamedTuple):
    """Clean values of K features on N images, and the least and largest values found in the balls, each (N, K).

    `silent` (K,) is the fraction of images at which a feature has no gradient, so that the search may miss the ends.
    `passes` counts forward+backward passes of single images; a forward or backward pass alone counts 1/2.
    """

    clean: Tensor
    low: Tensor
    high: Tensor
    silent: Tensor
    passes: float


@dataclass(frozen=True)
class FeatureRow:
    """One feature: nats of I(X; g_i(X) + noise) on clean images and in the worst case, and their difference.

    `reach` is the median of (largest - least) / 2 in the balls, in deviations of the clean values; `silent` is the
    fraction of images without a gradient.
    """

    feature: int
    normal_nats: float
    normal_nats_se: float
    worst_nats: float
    worst_nats_se: float
    rv: float
    rv_se: float
    reach: float
    silent: float


@dataclass(frozen=True)
class FeatureAudit:
    """The features of a layer, the most vulnerable first.

    `unit` is empty for a layer without a map; `field` is the height and width of its receptive field in pixels.
    `ceiling_nats` = ln N is the largest value that can be estimated from N images.
    """

    layer: str
    unit: tuple[int, ...]
    field: tuple[int, int]
    images: int
    ceiling_nats: float
    rows: tuple[FeatureRow, ...]
    passes: float


@dataclass(frozen=True)
class FeatureRequest:
    """Which features to audit (default: all), at which unit of a map (default: the middle one), and the seed."""

    features: tuple[int, ...] = ()
    unit: tuple[int, ...] | None = None
    seed: int = 0
    progress: PercentProgress = lambda _stage, _percent: None

    def chosen(self, count: int) -> Tensor:
        """Return the indices (K,) of the features; raises UsageError for an index of `count` or more."""
        for feature in self.features:
            if not 0 <= feature < count:
                raise UsageError(f"feature {feature} is out of range: the layer has features 0 to {count - 1}")
        return torch.tensor(self.features or range(count), dtype=torch.long)


def audit_features(
    network: nn.Module,
    images: Images,
    layer: str,
    threat: ThreatModel,
    settings: FeatureSettings | None = None,
    request: FeatureRequest | None = None,
) -> FeatureAudit:
    """Return the vulnerability of each feature of a layer on images (N, C, H, W).

    The network is put into eval mode. Raises UsageError for a layer, unit or feature that does not exist.
    """
    settings, request = settings or FeatureSettings(), request or FeatureRequest()
    network.eval()
    encode = Representation(network, layer)
    located = unit_features(network, layer, images, request.unit)
    chosen = request.chosen(len(located.columns))
    columns = located.columns[chosen].to(images.device)
    field = receptive_field(encode, images, columns)
    ranges = feature_ranges(encode, images, columns, threat, settings, request)
    layer_noise = None
    if settings.scale == "layer":
        layer_noise = settings.noise * float(ranges.clean.var(0, correction=0).mean().sqrt())
    rows = []
    for column, feature in enumerate(chosen.tolist()):
        percent = _SEARCH_PERCENT + (100 - _SEARCH_PERCENT) * column // len(chosen)
        request.progress("information of each feature", percent)
        rows.append(_feature_row(feature, column, ranges, settings, layer_noise, request.seed))
    ranked = tuple(sorted(rows, key=lambda row: (-row.rv, row.feature)))
    return FeatureAudit(layer, located.unit, field_size(field), len(images), log(len(images)), ranked, ranges.passes)


def feature_ranges(
    encode: FeatureMap,
    images: Images,
    columns: Tensor,
    threat: ThreatModel,
    settings: FeatureSettings,
    request: FeatureRequest | None = None,
) -> FeatureRanges:
    """Return the least and the largest value found of the features in `columns` (K,) in each image's ball.

    The first gradients need one forward pass and one vector-Jacobian product a feature. From the corners they point to,
    each feature is searched on its own copies of the images, a chunk of features at a time.
    """
    request = request or FeatureRequest()
    chunk = max(1, _MAX_COPIED_PIXELS // images.numel())
    parts = []
    for done, some in enumerate(columns.split(chunk)):
        request.progress("ends of each feature", _SEARCH_PERCENT * done * chunk // len(columns))
        parts.append(_search_ranges(encode, images, some, threat, settings, request.seed))
    clean, low, high, silent = (torch.cat(each, -1) for each in list(zip(*parts, strict=True))[:4])
    return FeatureRanges(clean, low, high, silent, sum(part.passes for part in parts))


def _search_ranges(
    encode: FeatureMap, images: Images, columns: Tensor, threat: ThreatModel, settings: FeatureSettings, seed: int
) -> FeatureRanges:
    clean, gradients = _first_gradients(encode, images, columns, settings.batch_size)
    silent = (gradients.flatten(2) == 0).all(2).float().mean(1)
    if threat.eps == 0:
        return FeatureRanges(clean, clean, clean, silent, len(images) * (1 + len(columns)) / 2)
    owner = torch.arange(len(columns), device=images.device).repeat_interleave(len(images))
    copies, slopes = images.repeat(len(columns), 1, 1, 1), gradients.flatten(0, 1)
    pgd = PGD(settings.steps, settings.relative_step, restarts=settings.restarts, batch_size=settings.batch_size)
    found = []
    for sign in (1.0, -1.0):

        def objective(moved: Images, index: Tensor, sign: float = sign) -> ObjectiveValue:
            values = sign * encode(moved).gather(1, columns[owner[index]][:, None])[:, 0]
            return ObjectiveValue(values, torch.zeros_like(values, dtype=torch.bool))

        corner = threat.step(copies, sign * slopes, copies, threat.eps)
        generator = keyed_generator(seed, Purpose.FEATURE_SEARCH, int(columns[0]))
        found.append(minimise(objective, copies, threat, pgd, generator, corner))
    low, high = (x.value.view(len(columns), -1).T for x in found)
    passes = len(images) * (1 + len(columns)) / 2 + sum(x.passes + x.forwards / 2 for x in found)
    # rounding differs between batch sizes, so the clean value may lie outside the ends found
    return FeatureRanges(clean, torch.minimum(low, clean), torch.maximum(-high, clean), silent, passes)


def _first_gradients(encode: FeatureMap, images: Images, columns: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the clean values (N, K) of features and their gradients (K, N, C, H, W)."""
    values, gradients = [], []
    for batch in images.split(allowed(batch_size)):
        leaf = batch.detach().requires_grad_()
        features = encode(leaf)[:, columns]
        gradients.append(torch.stack([input_gradient(each.sum(), leaf, keep=True) for each in features.unbind(1)]))
        values.append(features.detach())
    return torch.cat(values), torch.cat(gradients, 1)


def _feature_row(
    feature: int, column: int, ranges: FeatureRanges, settings: FeatureSettings, layer_noise: float | None, seed: int
) -> FeatureRow:
    clean, low, high = (values[:, column].double() for values in (ranges.clean, ranges.low, ranges.high))
    deviation, largest = float(clean.std(correction=0)), float(clean.abs().max())
    # for a feature that is constant up to rounding, noise that leaves no information
    own_noise = settings.noise * deviation if deviation > 1e-6 * largest else max(1.0, largest)
    scale, centre = layer_noise or own_noise, clean.mean()
    clean, low, high = ((values - centre) / scale for values in (clean, low, high))
    worst = least_informative_values(clean, low, high, settings.settle, settings.draws, seed)
    normal_terms, worst_terms = (
        plug_in_terms(values[:, None], keyed_generator(seed, Purpose.FEATURE_READING), settings.draws)[0]
        for values in (clean, worst)
    )
    (normal_nats, normal_se), (worst_nats, worst_se) = _mean(normal_terms), _mean(worst_terms)
    half_width = float((high - low).median()) / 2 * scale
    return FeatureRow(
        feature=feature,
        normal_nats=normal_nats,
        normal_nats_se=normal_se,
        worst_nats=worst_nats,
        worst_nats_se=worst_se,
        rv=normal_nats - worst_nats,
        rv_se=hypot(normal_se, worst_se),
        reach=half_width / deviation if deviation else 0.0,
        silent=float(ranges.silent[column]),
    )


def _mean(terms: Tensor) -> tuple[float, float]:
    return float(terms.mean()), float(terms.std()) / sqrt(len(terms))
