"""Identity of an audit: everything that decides its numbers and nothing else. Its digest is the cell id."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from audit.adversary.threat import ThreatModel
from audit.certificate.settings import CERTIFICATE_VERSION, LEDGER_VERSION
from audit.config.settings import AuditSettings
from audit.records import VERSION
from audit.run.cell import Cell, InputRules, warm_start_path
from audit.storage import digest
from model_zoo.entries import ModelEntry, parse_ref

_NETWORK_KEYS = ("version", "network", "architecture", "code_sha256", "weights_sha256", "data_sha256")
_APPLIED = ("preprocessing", "competing_outputs")  # only in the identity of cells that have them
_DECIDING_OPTIONS = ("arch", "num_classes", "mean", "std", "shape", "key")


class NetworkIdentity(NamedTuple):
    """What decides the function that a network computes.

    `network` is the model reference, or for a file its deciding options: the same weights with another normalisation
    are another network, while path and labels decide nothing.
    """

    network: str | dict[str, str]
    architecture: str
    code_sha256: str
    weights_sha256: str


def audit_identity(
    network: NetworkIdentity,
    data_sha256: str,
    layer: str,
    threat: ThreatModel,
    settings: AuditSettings,
    warm_starts: Sequence[Sequence[object]] = (),
) -> dict[str, Any]:
    """Return the identity of an audit as JSON data; `warm_starts` are the layers and radii its search starts from."""
    return {
        **({"after": warm_starts} if warm_starts else {}),
        "version": VERSION,
        **network._asdict(),
        "data_sha256": data_sha256,
        "layer": layer,
        "norm": threat.norm,
        "eps": threat.eps,
        "settings": _settings_identity(settings, threat.norm),
    }


def cell_identity(
    cell: Cell,
    entry: ModelEntry,
    data_sha256: str,
    examples_sha256: str | None = None,
    applied: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the identity of a cell; a certificate also depends on the images that heads are trained on.

    `applied` is the preprocessing of the images and the network's outputs that compete, where these are not all; it is
    empty where images and classes were taken as they are.
    """
    network = NetworkIdentity(_network_identity(cell.ref), entry.architecture, entry.code_sha256, entry.weights_sha256)
    found = audit_identity(network, data_sha256, cell.layer, cell.threat, cell.settings, warm_start_path(cell))
    found |= {"later": list(cell.later)} if cell.later else {}
    found |= applied or {}
    return {**found, "examples_sha256": examples_sha256} if cell.settings.certificate else found


def partial_identity(identity: dict[str, Any], part: str, *names: str) -> dict[str, Any]:
    """Return the identity of an intermediate result: its kind, the network, its images, and the named entries."""
    applied = {name: identity[name] for name in _APPLIED if name in identity}
    return {"part": part, **{name: identity[name] for name in (*_NETWORK_KEYS, *names)}, **applied}


def failure_id(cell: Cell) -> str:
    """Return the id of a failed cell, from references only: weights or images may be what is missing."""
    place = (cell.ref, cell.dataset, cell.images, cell.layer, cell.threat.norm, cell.threat.eps)
    rules = [] if cell.rules == InputRules() else [repr(cell.rules)]
    return digest({"failed": [*place, repr(cell.settings), *rules]})


def _settings_identity(audit: AuditSettings, norm: str) -> dict[str, Any]:
    settings = asdict(audit)
    settings["estimator"]["name"] = audit.estimator.name
    for bound in audit.estimator.memory_only:
        del settings["estimator"][bound]
    if audit.estimator.version > 1:
        settings["estimator"]["version"] = audit.estimator.version
    settings |= {"seeds": list(audit.seeds)}  # a list, as JSON reads it back
    del settings["attack"]["fast"]  # decides cost only
    settings["attack"]["version"] = audit.attack.version_in(norm)
    if not audit.attack.reaches_in(norm):
        del settings["attack"]["by_reach"]
    if settings["certificate"]:
        settings["certificate"] = CERTIFICATE_VERSION
    else:
        del settings["certificate"]  # a certificate changes no other number
    if settings["ledger"]:
        settings["ledger"] = LEDGER_VERSION
    else:
        del settings["ledger"]
    for name in ("stages", "borrowed"):
        settings["attack"][name] = list(settings["attack"][name])
    for stage in settings["attack"]["stages"]:
        del stage["pgd"]["batch_size"]  # bounds memory only
    return settings


def _network_identity(ref: str) -> str | dict[str, str]:
    parsed = parse_ref(ref)
    if parsed.source in ("open_clip", "transformers"):
        return {"source": parsed.source}  # the architecture holds a hash of the configuration, wherever it lies
    if parsed.source != "file":
        return ref
    return {name: parsed.options[name] for name in _DECIDING_OPTIONS if name in parsed.options}
