"""Certify layers of a model of the zoo, write witness files, and verify them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch

from audit.adversary.label_attack import TIERS
from audit.adversary.memory.limit import allowed
from audit.adversary.threat import ThreatModel
from audit.certificate.collision_search import SearchEffort
from audit.certificate.dual_precision import DualPrecisionLayer
from audit.certificate.equality import find_tier
from audit.certificate.layers import (
    HEADS,
    CertificationInputs,
    CertificationSettings,
    HeadTrainingData,
    LayerProgress,
    LayerResult,
    certify_layers,
)
from audit.certificate.robust_images.results import BoundEffort
from audit.certificate.settings import CertificateSettings
from audit.certificate.witness import WitnessHeader, read_witness, verify_witness, witness_header, write_witness
from audit.config.settings import AuditSettings
from audit.errors import IntegrityError, MismatchError, UnknownNameError, UsageError
from audit.hashing import image_hashes, weights_sha256
from audit.representation.layers import Representation
from audit.run.cell import DEFAULT_RULES, InputRules
from audit.run.loading import RunOptions, batches_for, open_images_for, open_representation
from audit.run.upkeep.forecast import seconds_per_pass
from audit.run.upkeep.pass_meter import StageMeter, StagePasses
from audit.types import selected_pixels
from model_zoo.images.datasets import ImageRequest, ImageSet, load_at_most, load_images
from model_zoo.load import LoadedModel
from model_zoo.lookup import WITH_TRAINING_SPLIT

_JACOBIAN_PASSES = 400.0  # an image: up to 799 features; a wider layer needs thousands for a handful of steps
_TIMED = 64  # images in a batch that tells the time of a pass
_PROBE = 16  # images that try a hub before the others, if the budget is limited
_PATIENCE = 2  # Jacobians that hardly improve a group before it is given up, if the budget is limited


@dataclass(frozen=True, kw_only=True)
class CertificationRequest:
    """A model and its layers, images to certify and to train heads on, threat models, and the effort to spend.

    `images` limits the certified images (None: all); `balanced` takes equally many of each class. `head_images` is the
    number of images that heads are trained on: of `train_dataset`, else of the training split of a named data set,
    else those after the certified ones. `pairs` also searches pairs of images outside large hubs, with at most
    `pair_passes` forward+backward passes per image (infinite: every hub and pair is tried, of however wide a layer);
    `held_out` adds the held-out population bound. `attack` is the name of an attack tier, `heads` are the heads that
    it measures, and `ledger` adds the ledger of images that the network provably keeps, by bounds that take at most
    `ledger_passes` an image. Raises UnknownNameError for an unknown attack or head.
    """

    model: str
    dataset: str
    layers: tuple[str, ...]
    threats: tuple[ThreatModel, ...]
    images: int | None = None
    balanced: bool = False
    head_images: int = 500
    train_dataset: str | None = None
    tier: str = "bit-identical at float32"
    hubs: int = 2
    pairs: bool = True
    pair_passes: float = 12.0
    confidence: float = 0.95
    held_out: bool = False
    attack: str = "smoke"
    heads: tuple[str, ...] = ("own",)
    ledger: bool = False
    ledger_passes: float = BoundEffort.passes
    seed: int = 0
    rules: InputRules = DEFAULT_RULES

    def __post_init__(self) -> None:
        if self.attack not in TIERS:
            raise UnknownNameError("attack", self.attack, TIERS)
        for head in self.heads:
            if head not in HEADS:
                raise UnknownNameError("head", head, HEADS)

    @property
    def settings(self) -> CertificationSettings:
        """The settings of the certificates. Raises UnknownNameError, UsageError for an illegal tier or confidence."""
        neighbours, limited = SearchEffort.neighbours if self.pairs else 0, self.pair_passes < inf
        effort = SearchEffort(hubs=self.hubs, neighbours=neighbours, pair_passes=self.pair_passes)
        if limited:
            effort = replace(effort, probe=_PROBE, patience=_PATIENCE)
        limit = inf if self.pair_passes == inf else _JACOBIAN_PASSES
        certificate = CertificateSettings(
            find_tier(self.tier), effort, self.confidence, seed=self.seed, jacobian_passes=limit
        )
        return CertificationSettings(
            certificate,
            TIERS[self.attack],
            held_out=self.held_out,
            measured=self.heads,
            ledger=self.ledger,
            bounds=BoundEffort(passes=self.ledger_passes),
        )

    @property
    def follows_certified(self) -> bool:
        """Whether heads are trained on the images after the certified ones, for want of another source."""
        return self.train_dataset is None and self.dataset not in WITH_TRAINING_SPLIT

    @property
    def leaves_no_head_images(self) -> bool:
        """Whether all images are certified, so that none is left to train the requested heads on."""
        return self.trains_heads and self.follows_certified and self.images is None and self.head_images > 0

    @property
    def trains_heads(self) -> bool:
        """Whether a head beside the network's own is asked for."""
        return set(self.heads) != {"own"} and len(self.heads) > 0


class CertificationReport(NamedTuple):
    """A request, the model as loaded, the certified inputs, and one result per layer and threat model."""

    request: CertificationRequest
    model: LoadedModel
    inputs: CertificationInputs
    results: list[LayerResult]

    def rows(self, witness_path: Callable[[LayerResult], Path] | None = None) -> list[dict[str, Any]]:
        """Return one row per result, as JSON data, after writing its witness file to the path given for it."""
        weights, entry = weights_sha256(self.inputs.network), self.model.entry
        rows = []
        for result in self.results:
            row = {"model": entry.name, "training": entry.training, "dataset": self.request.dataset}
            row |= {**result.row.to_dict(), "weights_sha256": weights, "witness": "", "witness_sha256": ""}
            if witness_path is not None and result.certificate is not None:
                path = witness_path(result)
                data = (self.inputs.clean, self.inputs.labels)
                header = witness_header(result.certificate, result.row.layer, result.threat, data, weights)
                sha256 = write_witness(path, result.certificate, header, self.inputs.labels, result.ledger)
                row |= {"witness": str(path), "witness_sha256": sha256}
            rows.append(row)
        return rows


OnCost = Callable[[float, float], None]
"""Called before a search with the passes of single images, and the seconds, that it takes about."""


def certify_model(
    request: CertificationRequest,
    options: RunOptions,
    on_progress: LayerProgress,
    on_cost: OnCost = lambda _passes, _seconds: None,
) -> CertificationReport:
    """Certify the layers of a model under every threat model of a request.

    Stages are reported with the passes done, those expected, and the time left. Raises what loading and
    `certify_layers` raise.
    """
    settings = request.settings
    model, inputs = load_inputs(request, options)
    places: list[tuple[str, ThreatModel]] = []
    meter = StageMeter(lambda stage, collided: on_progress(*places[-1], stage, collided))

    def report(layer: str, threat: ThreatModel, stage: str, collided: int) -> None:
        places.append((layer, threat))
        meter(stage, collided)

    with batches_for(model.network, inputs.clean, options):
        passes = _expected_passes(request, inputs)
        on_cost(passes, passes * seconds_per_pass(model.network, inputs.clean[: allowed(_TIMED)]))
        with meter.counting(passes):
            results = certify_layers(inputs, request.layers, request.threats, settings, report)
    return CertificationReport(request, model, inputs, results)


@torch.no_grad()
def _expected_passes(request: CertificationRequest, inputs: CertificationInputs) -> float:
    """Return about how many passes the certificates of a request take; a layer that is too wide takes only its heads'.

    Raises what `Representation` raises for the name of a layer.
    """
    settings, passes = AuditSettings(attack=TIERS[request.attack], certificate=True, ledger=request.ledger), 0.0
    limit = request.settings.certificate.jacobian_passes
    own, trained = "own" in request.heads and not inputs.headless, set(request.heads) - {"own"}
    heads = own + (len(trained) if inputs.training_data else 0)
    for layer in dict.fromkeys(request.layers):
        dimension = Representation(inputs.network, layer)(inputs.clean[:1]).shape[1]
        stages = StagePasses(settings, len(inputs.clean), dimension)
        applicable = (1 + dimension) / 2 <= limit and dimension <= inputs.clean[0].numel()
        search = stages.certificate - stages.head if applicable else 0.0
        passes += len(set(request.threats)) * (search + heads * stages.head)
    return passes


def load_inputs(request: CertificationRequest, options: RunOptions) -> tuple[LoadedModel, CertificationInputs]:
    """Load the model and the images of a request onto the device, with images to train heads on.

    Raises what loading raises, MismatchError for training images of other classes.
    """
    asked = options.request(request.images, balanced=request.balanced)
    images = open_images_for(request.model, request.dataset, options, asked, request.rules)
    model = open_representation(request.model, images, options)
    chosen = model.preprocessing if request.rules.preprocess else None
    data = _head_training_data(request, images, replace(asked, balanced=False, preprocessing=chosen))
    headless = model.num_classes == 0
    inputs = CertificationInputs(model.network, images.images, images.labels, images.label_count, headless, data)
    return model, inputs


def _head_training_data(
    request: CertificationRequest, images: ImageSet, asked: ImageRequest
) -> HeadTrainingData | None:
    """Return images to train heads on, without duplicates of certified ones; None if there are none."""
    count, source = request.head_images, request.train_dataset
    if count == 0 or not request.trains_heads or request.leaves_no_head_images:
        return None
    if request.follows_certified:
        certified = request.images or 0
        found = load_at_most(request.dataset, replace(asked, count=certified + count))
        pixels, labels = found.images[certified:], found.labels[certified:]
    else:
        split = "train" if source is None or source in WITH_TRAINING_SPLIT else "test"
        found = load_images(source or request.dataset, replace(asked, count=count, split=split))
        pixels, labels = found.images, found.labels
    if found.classes != images.classes:
        raise MismatchError(f"{found.ref} has the classes {', '.join(found.classes)}, {images.ref} has others")
    if images.class_map:
        labels = images.class_map.renumbered(labels)
    certified_images = set(image_hashes(images.images))
    new = [number for number, each in enumerate(image_hashes(pixels)) if each not in certified_images]
    if not new:
        return None
    device, index = images.images.device, torch.tensor(new[:count])
    return HeadTrainingData(selected_pixels(pixels, index).to(device), labels[index].to(device))


@dataclass(frozen=True)
class WitnessSubject:
    """The model of a witness file and its clean images: the first `images` of a data set (None: as in the file)."""

    model: str
    dataset: str
    images: int | None = None
    balanced: bool = False
    rules: InputRules = DEFAULT_RULES


def verify_model_witness(path: Path, subject: WitnessSubject, options: RunOptions) -> WitnessHeader:
    """Verify a witness file against a model and its images, and return the verified header.

    Raises IntegrityError for the first claim that does not hold, and what loading raises.
    """
    claimed = read_witness(path)
    asked = options.request(subject.images or len(claimed.labels), balanced=subject.balanced)
    images = open_images_for(subject.model, subject.dataset, options, asked, subject.rules, at_most=True)
    network = open_representation(subject.model, images, options).network
    weights = weights_sha256(network)
    if weights != claimed.header.weights_sha256:
        raise IntegrityError(f"{path} is for weights with sha256 {claimed.header.weights_sha256}, not {weights}")
    try:
        layer = DualPrecisionLayer.of(Representation(network, claimed.header.layer))
        return verify_witness(path, layer, images.images, images.labels, weights).header
    except UsageError as error:  # the layer name comes from the file
        raise IntegrityError(f"{path} names a layer that cannot be checked: {error}") from error
