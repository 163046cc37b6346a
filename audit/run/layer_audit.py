"""Information of one layer: normal- and worst-case estimates of every seed, floors under them, and search checks."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from statistics import fmean
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from audit.adversary.attack_checks import Check
from audit.adversary.fused import computes_the_same, fused_copy
from audit.adversary.gradient_checks import worst_case_checks
from audit.adversary.memory.stages import needed, stage
from audit.adversary.staged.outcome import logits_of
from audit.adversary.threat import ThreatModel
from audit.config.settings import AuditSettings
from audit.errors import UnknownNameError, UsageError
from audit.information.estimator import EstimatorInputs, MIEstimate, Vulnerability, WarmStart
from audit.information.floors import InformationFloors, largest_share, prediction_floor
from audit.random_keys import Purpose, keyed_generator
from audit.representation.headless import Headless, resolved_layer
from audit.representation.layers import Representation
from audit.run.intermediate import EstimateCache
from audit.types import Encoded, Images, Labels, Objective

_CHECKED = 20  # images, and at most a tenth of all, to check the objective's gradient on: 1 % of the passes

_Estimate = TypeVar("_Estimate")


class LayerResult(NamedTuple):
    """Estimates of one layer under one threat model.

    `per_seed` holds both cases of every seed, in the order of the settings; `floors` is None where the network's
    output does not pass through the layer; `dimension` is the number of features; `checks` are those of the
    worst-case search; `determines_logits` is whether the accuracies of the network are those of a head on the layer;
    `images` is the number of images.
    """

    per_seed: tuple[Vulnerability, ...]
    floors: InformationFloors | None
    dimension: int
    checks: tuple[Check, ...] = ()
    determines_logits: bool = True
    images: int = 0


def _uncached(_seed: int, compute: Callable[[], _Estimate], /) -> _Estimate:
    return compute()


class SearchStarts(NamedTuple):
    """Images that worst-case searches start from or compare with.

    `by_seed` are warm starts: worst-case images (N, C, H, W) of a smaller ball or of a later layer; `attacked`
    (N, C, H, W) are the adversarial images of the attack on the label, `earlier` worst-case images of an earlier layer.
    """

    by_seed: Mapping[int, Images] = MappingProxyType({})
    attacked: Images | None = None
    earlier: Mapping[int, Images] = MappingProxyType({})


class Reuse(NamedTuple):
    """Results that earlier work may supply: the encoded clean images, and each seed's normal case.

    `later` are names of layers that count for this one, as far as they are functions of it.
    """

    clean: Encoded | None = None
    normal: EstimateCache = _uncached
    later: Sequence[str] = ()


class LayerAudit:
    """Audit of one layer of a network on one set of images (N, C, H, W) with labels (N,).

    What its threat models share is computed once.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Images,
        labels: Labels,
        layer: str,
        settings: AuditSettings,
        reuse: Reuse | None = None,
    ) -> None:
        reuse = reuse or Reuse()
        self.network, self.settings = network, settings
        self.representation = Representation(network, layer, settings.reduce)
        self._images, self._labels, self._reuse = images, labels, reuse

    @cached_property
    def inputs(self) -> EstimatorInputs:
        """The inputs of the estimator, with those of later layers that are functions of this one."""
        later, reads = list[LayerAudit](), self.settings.estimator.reads_later_layers
        if reads and self._reuse.later and not isinstance(self.network, Headless) and self._determines_logits:
            later = [each for layer in self._reuse.later if (each := self._follower(layer)) is not None]
        inputs = EstimatorInputs(self._encode, self._images, self._labels, self._reuse.clean)
        return inputs._replace(later={each.representation.layer: each.inputs for each in later})

    def _follower(self, layer: str) -> "LayerAudit | None":
        """Return the audit of a later layer, if there is one and it is a function of this one.

        Where both determine the logits, every path of the data to the later one leads through this one.
        """
        from audit.run.warm_starts import runs_before

        try:
            audit = LayerAudit(self.network, self._images, self._labels, layer, self.settings)
            ordered = runs_before(self.network, self.representation.layer, layer, self._images[:2])
            return audit if ordered and audit._determines_logits else None
        except UsageError:  # reported in the record of that layer's own cell
            return None

    def _encode(self, images: Images) -> Encoded:
        """Encode images: searches, which need gradients, use the fused copy; reported values use the network itself."""
        layer = self._fused if images.requires_grad else self.representation
        reads = self.settings.estimator.reads_log_probs and not isinstance(self.network, Headless)
        return layer.encode(images) if reads else layer.encode_features(images)

    @cached_property
    def _fused(self) -> Representation:
        """The same layer of a faster copy of the network, if there is one that agrees."""
        representation, images = self.representation, self._images
        folded = fused_copy(self.network, images)
        if folded is self.network:
            return representation
        try:
            same = Representation(folded, resolved_layer(self.network, representation.layer), representation.reduce)
        except UnknownNameError:  # the layer was fused into another one
            return representation
        return same if computes_the_same(representation, same, images) else representation

    @cached_property
    def normal(self) -> tuple[MIEstimate, ...]:
        """The normal case of every seed, which no threat model changes."""
        normal, cache = self.settings.estimator.normal, self._reuse.normal
        with stage("normal case"):
            return tuple(cache(seed, partial(normal, self.inputs, seed)) for seed in self.settings.seeds)

    @cached_property
    def dimension(self) -> int:
        """The number of features of the layer."""
        with torch.no_grad():
            return self.representation(self._images[:1]).shape[1]

    def under(
        self, threat: ThreatModel, starts: SearchStarts | None = None, cache: EstimateCache = _uncached
    ) -> LayerResult:
        """Return estimates, floors and search checks under a threat model; `cache` supplies known worst cases."""
        per_seed = self.searched(threat, starts, cache)
        floors, checks = self._floors(per_seed), self._checks(threat)
        return LayerResult(per_seed, floors, self.dimension, checks, self._determines_logits, len(self.inputs.images))

    def searched(
        self, threat: ThreatModel, starts: SearchStarts | None = None, cache: EstimateCache = _uncached
    ) -> tuple[Vulnerability, ...]:
        """Return both cases of every seed; later seeds repeat only the kind of search that succeeded for the first."""
        found, starts = list[Vulnerability](), starts or SearchStarts()
        vulnerability = self.settings.estimator.vulnerability
        for seed, normal in zip(self.settings.seeds, self.normal, strict=True):
            origin = found[0].origin if found else None
            given = (starts.by_seed.get(seed), origin, starts.attacked, starts.earlier.get(seed))
            warm_start = WarmStart(normal, *given)
            with stage(f"worst case, seed {seed}"):
                found.append(cache(seed, partial(vulnerability, self.inputs, threat, seed, warm_start)))
                needed(found[-1].passes)
        return tuple(found)

    @cached_property
    def _objective(self) -> Objective | None:
        return self.settings.estimator.objective(self.inputs)

    def _checks(self, threat: ThreatModel) -> tuple[Check, ...]:
        if threat.eps == 0 or self._objective is None:
            return ()
        few = self.inputs.images[: min(_CHECKED, len(self.inputs.images) // 10)]
        return worst_case_checks(self._objective, few, threat, self.settings.seeds[0])

    @cached_property
    def _determines_logits(self) -> bool:
        return self.representation.determines_logits(self._images[:1])

    def _floors(self, per_seed: tuple[Vulnerability, ...]) -> InformationFloors | None:
        """Return the floors, if the network's output passes through the layer: else predictions prove nothing of it."""
        if self.settings.estimator.floor_kind == "smoothed":
            # noise at an earlier layer would have to pass through the layers after it
            proves = self.representation.layer == "logits"
        else:
            proves = self._determines_logits
        return measured_floors(self.network, self.inputs, per_seed, self.settings) if proves else None


@stage("floors")
def measured_floors(
    network: nn.Module, inputs: EstimatorInputs, per_seed: tuple[Vulnerability, ...], settings: AuditSettings
) -> InformationFloors:
    """Return the floors that a network's predictions put under the estimates, on clean and on worst-case images."""
    kind, size = settings.estimator.floor_kind, settings.attack.batch_size
    logits, share = logits_of(network, inputs.images, size), largest_share(inputs.labels)
    noisy = partial(settings.estimator.noisy, logits)
    worst = []
    for run in per_seed:
        found = logits_of(network, run.adversarial, size)
        predictions = noisy(found, keyed_generator(0, Purpose.FLOOR_NOISE)).argmax(1)
        worst.append(prediction_floor(predictions, inputs.labels[run.indices.to(predictions.device)], share, kind))
    slack = (logits.shape[1] - 1) / (2 * per_seed[0].normal.images) if kind == "predictions" else 0.0
    clean = noisy(logits, keyed_generator(0, Purpose.FLOOR_NOISE)).argmax(1)
    return InformationFloors(prediction_floor(clean, inputs.labels, share, kind), fmean(worst), slack)
