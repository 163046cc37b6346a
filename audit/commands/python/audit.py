"""Audit a network given as a Python object: `audit_model`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypedDict, Unpack, cast, overload

from torch import nn

from audit.adversary.label_attack import LabelAttack
from audit.adversary.robustness import TargetModel
from audit.adversary.threat import ThreatModel
from audit.commands.python.arguments import layers_of, several, threats_of
from audit.commands.python.data import read_data
from audit.commands.python.records import AuditRecords
from audit.commands.python.watching import OnStage, StageCounter, progress_line, silent
from audit.config.settings import AuditSettings, attack_of, estimator_of, seeds_of
from audit.errors import UnknownNameError, UsageError
from audit.information.estimator import Estimator
from audit.records import AuditRecord
from audit.representation.headless import Headless
from audit.run.network_audit import NetworkAudit, NetworkFacts
from model_zoo.entries import TRAININGS
from model_zoo.load import LoadedModel, Normalized, load_model

Threat = ThreatModel | float | str


class CommonOptions(TypedDict, total=False):
    """Options of an audit beside the estimator; each replaces what `settings` say.

    `count` limits the images; name, family, training, trained_eps (pixel units) and dataset are what the record says
    of the model and decide no number. `on_stage` is called with an `AuditStage` as it begins.
    """

    attack: LabelAttack | str
    seeds: Sequence[int]
    reduce: str
    certificate: bool
    count: int
    name: str
    family: str
    training: str
    trained_eps: float
    dataset: str
    progress: bool
    on_stage: OnStage


class OneAuditOptions(CommonOptions, total=False):
    """Options of an audit by one estimator."""

    estimator: Estimator | str


class AuditOptions(CommonOptions, total=False):
    """Options of an audit by one estimator or several."""

    estimator: Estimator | str | Sequence[Estimator | str]


_SETTINGS: dict[str, Callable[[object], object]] = {"attack": attack_of, "seeds": seeds_of, "certificate": bool}
_FACTS = ("name", "family", "training", "trained_eps", "dataset")
_OPTIONS = tuple(AuditOptions.__annotations__)


@overload
def audit_model(
    model: nn.Module | LoadedModel | str,
    data: object,
    labels: object = None,
    layer: str = "logits",
    threat: Threat | None = None,
    settings: AuditSettings | None = None,
    **options: Unpack[OneAuditOptions],
) -> AuditRecord: ...
@overload
def audit_model(
    model: nn.Module | LoadedModel | str,
    data: object,
    labels: object = None,
    layer: str | Sequence[str] = "logits",
    threat: Threat | Sequence[Threat] | None = None,
    settings: AuditSettings | None = None,
    **options: Unpack[AuditOptions],
) -> AuditRecord | AuditRecords: ...
def audit_model(
    model: nn.Module | LoadedModel | str,
    data: object,
    labels: object = None,
    layer: str | Sequence[str] = "logits",
    threat: Threat | Sequence[Threat] | None = None,
    settings: AuditSettings | None = None,
    **options: Unpack[AuditOptions],
) -> AuditRecord | AuditRecords:
    """Audit a model at one layer or several, under one threat model or several, by one estimator or several.

    `model` is a network with its normalisation inside (else `wrap` it), what `load_model` returned, or a model
    reference. `data` is images (N, C, H, W) in [0, 1] with `labels` (N,), a pair of them, a Dataset, a DataLoader, or
    what `load_images` returned. A threat is `Linf(8 / 255)`, a radius in pixel units (l-inf), or text such as
    `l2:0.5`. Options: estimator (one or a list), attack, seeds, reduce, certificate; count, the number of
    images; name, family, training, trained_eps, dataset, which the record states; progress=False hides the progress,
    and on_stage is called with every `AuditStage`. Returned is one record, or `AuditRecords` where a list was given; MI
    values are in nats. The network is put in eval mode and moved nowhere; images go to its device.

    Raises UsageError (UnknownNameError with the nearest names, MismatchError for data that does not fit), or
    InvalidModelError for a network whose outputs are not finite.

    Source: Zhu, Zhang & Evans 2020, Definition 3.1 (RV) and Theorem 3.4.
    """
    given = cast(dict[str, Any], options)
    for name in given:
        if name not in _OPTIONS:
            raise UnknownNameError("option of audit_model", name, _OPTIONS)
    layers, threats, choices = layers_of(layer), threats_of(threat), _settings(settings, given)
    ref = getattr(data, "ref", None)  # of what `load_images` returned
    network, facts = _network(model, {"dataset": ref, **given} if isinstance(ref, str) else given)
    images, targets = read_data(data, labels, given.get("count"))
    device = next((tensor.device for tensor in network.state_dict().values()), images.device)
    target = TargetModel(network, images.to(device), targets.to(device))
    cells, audit = list(product(choices, layers, threats)), NetworkAudit(target, facts)
    passes = _expected(audit, cells)
    with progress_line(len(passes), shown=given.get("progress", True)) as show:
        audit.on_stage = counter = StageCounter(passes, show, given.get("on_stage", silent))
        with counter.counting(sum(passes)):
            records = [audit.record(place, ball, choice) for choice, place, ball in cells]
    single = not (several(layer) or several(threat) or several(given.get("estimator")))
    return records[0] if single else AuditRecords(records)


def _expected(audit: NetworkAudit, cells: Sequence[tuple[AuditSettings, str, ThreatModel]]) -> list[float]:
    """Return about how many passes every stage of some cells takes: those that cells share are computed once.

    The heads of an encoder are attacked on each layer.
    """
    found = dict[object, float]()
    headless = isinstance(audit.target.network, Headless)
    for choice, layer, threat in cells:
        expected = audit.expected(layer, choice, threat.norm)
        found[choice.attack, choice.seeds[0], threat, layer if headless else ""] = expected.attack
        for seed in choice.seeds:
            found[choice, layer, seed] = expected.normal
            found[choice, layer, seed, threat] = expected.worst(seed)
        if choice.certificate:
            found[choice, layer, threat] = expected.certificate
    return list(found.values())


def _settings(settings: AuditSettings | None, given: dict[str, Any]) -> list[AuditSettings]:
    """Return the settings of every estimator, each once; raises UsageError."""
    if settings is not None and not isinstance(settings, AuditSettings):
        raise UsageError(f"settings is a {type(settings).__name__}: write AuditSettings(estimator=..., seeds=...)")
    base = settings or AuditSettings()
    changes: dict[str, Any] = {name: convert(given[name]) for name, convert in _SETTINGS.items() if name in given}
    changes |= {"reduce": given["reduce"]} if "reduce" in given else {}
    named = given.get("estimator", base.estimator)
    found = [estimator_of(each) for each in (named if several(named) else [named])]
    if not found or len({each.name for each in found}) < len(found):
        raise UsageError(f"estimator {named!r} must name at least one, each once")
    return [replace(base, estimator=each, **changes) for each in found]


def _network(model: object, given: dict[str, Any]) -> tuple[nn.Module, NetworkFacts]:
    """Return the network of a model in any form, and what its record states; raises what `load_model` raises."""
    facts = {name: given[name] for name in _FACTS if name in given}
    if facts.get("training", "unknown") not in TRAININGS:
        raise UnknownNameError("training", str(facts["training"]), TRAININGS)
    if isinstance(model, str):
        model = load_model(model)
    if isinstance(model, LoadedModel):
        entry = model.entry
        known = {"name": entry.name, "family": entry.family, "training": entry.training}
        network = model.network if model.num_classes else Headless(model.network)
        return network, NetworkFacts(**{**known, "trained_eps": entry.trained_eps, **facts})
    if not isinstance(model, nn.Module):
        legal = "a torch.nn.Module, a reference such as 'timm:resnet18', or what load_model returns"
        raise UsageError(f"model is a {type(model).__name__}: write {legal}")
    kind = type(model.network if isinstance(model, Normalized) else model).__name__
    return model, NetworkFacts(**{"name": kind, "family": kind, **facts})
