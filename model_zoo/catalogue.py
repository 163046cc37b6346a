"""List the available models, for `rvaudit models`; bundled and RobustBench models are listed without torch."""

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from audit.errors import IntegrityError, UnknownNameError
from model_zoo.entries import TRAININGS, ModelEntry, PretrainedFacts, PublishedNumber, parse_fraction

BUNDLED = Path(__file__).parent / "bundled"
_ROBUSTBENCH_TABLE = Path(__file__).parent / "robustbench.csv"
_CARD_KEYS: tuple[str, ...] = (
    "id",
    "architecture",
    "arguments",
    "num_classes",
    "image_shape",
    "family",
    "dataset",
    "training",
)
_CARD_KEYS += ("trained_norm", "trained_eps", "sha256", "licence", "reference", "recipe", "published")
_SIDES = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
_IMAGENET_SIDES = {"Wong2020Fast": 288}  # image sides of RobustBench's evaluation other than 224


@dataclass(frozen=True, kw_only=True)
class RobustBenchRow:
    """One row of robustbench.csv; `parts` is the number of weights files, above 1 for an ensemble."""

    dataset: str
    threat: str
    id: str
    parts: int
    entry: ModelEntry

    @property
    def num_classes(self) -> int:
        """The number of classes of its data set."""
        return {"cifar10": 10, "cifar100": 100, "imagenet": 1000}[self.dataset]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The image shape (C, H, W) of its evaluation."""
        special = _IMAGENET_SIDES.get(self.id) if self.dataset == "imagenet" else None
        side = special or _SIDES[self.dataset]
        return (3, side, side)


def list_models(source: str | None = None) -> list[ModelEntry]:
    """Return an entry without hash for every model of a source, or of all sources that can be listed.

    Raises UnknownNameError for a source without a list.
    """
    if source is not None and source not in LISTERS:
        raise UnknownNameError("source with a list of models", source, LISTERS)
    listers = LISTERS.values() if source is None else [LISTERS[source]]
    return [entry for lister in listers for entry in lister()]


def robustbench_row(dataset: str, threat: str, name: str) -> RobustBenchRow:
    """Return the row of a RobustBench model; raises UnknownNameError for an unknown data set, threat model or id."""
    rows = robustbench_rows()
    datasets = {row.dataset for row in rows}
    if dataset not in datasets:
        raise UnknownNameError("RobustBench data set", dataset, datasets)
    threats = {row.threat for row in rows if row.dataset == dataset}
    if threat not in threats:
        raise UnknownNameError(f"RobustBench threat model of {dataset}", threat, threats)
    named = {row.id: row for row in rows if (row.dataset, row.threat) == (dataset, threat)}
    if name not in named:
        raise UnknownNameError(f"RobustBench model of {dataset}/{threat}", name, named)
    return named[name]


@cache
def robustbench_rows() -> tuple[RobustBenchRow, ...]:
    """Return all RobustBench models, in the order of the tables of robustbench."""
    with _ROBUSTBENCH_TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_parse_row(values) for values in csv.DictReader(file))


def _parse_row(values: Mapping[str, str]) -> RobustBenchRow:
    dataset, threat, name = values["dataset"], values["threat"], values["id"]
    norm_bounded = threat in ("Linf", "L2")
    standard = name.startswith("Standard") or name == "AlexNet"
    # Models against corruptions were trained by various methods, mostly without adversarial examples.
    training = "standard" if standard else "robust" if norm_bounded else "unknown"
    robust = training == "robust"
    entry = ModelEntry(
        ref=f"robustbench:{dataset}/{threat}/{name}",
        name=name,
        source="robustbench",
        architecture=values["architecture"],
        family=architecture_family(values["architecture"]),
        dataset=dataset,
        training=training,
        trained_norm=threat.lower() if robust else "",
        trained_eps=parse_fraction(values["eps"], "eps") if robust else 0.0,
        reference=values["paper"],
        published=_published_by_robustbench(values, norm_bounded),
    )
    return RobustBenchRow(dataset=dataset, threat=threat, id=name, parts=int(values["parts"]), entry=entry)


def _published_by_robustbench(values: Mapping[str, str], norm_bounded: bool) -> tuple[PublishedNumber, ...]:
    where = "RobustBench model zoo tables (robustbench 1.1.1)"
    attack = f"{where}, AutoAttack {values['threat']} {values['eps']}" if norm_bounded else where
    pairs = (
        ("natural_accuracy", values["natural_accuracy"], where),
        ("adversarial_accuracy" if norm_bounded else "corruption_accuracy", values["robust_accuracy"], attack),
    )
    return tuple(PublishedNumber(metric=m, value=float(v), source=s) for m, v, s in pairs if v)


def architecture_family(architecture: str) -> str:
    """Return the family of an architecture: its name in lower case, up to the first size.

    >>> architecture_family("WideResNet-28-10"), architecture_family("resnet2b"), architecture_family("cnn_a")
    ('wideresnet', 'resnet', 'cnn_a')
    """
    first = re.split(r"\s*[+,(]\s*", architecture.strip())[0]
    size = r"([-_ ]?[vV]?\d.*|-(XS|XL|[SMLABTR])\d*|\s(Base|Small))$"
    return re.sub(size, "", first).rstrip("-_ ").lower()


def read_card(name: str) -> dict[str, Any]:
    """Return the card of a bundled model; raises UnknownNameError, or the errors of `read_card_file`."""
    names = bundled_names()
    if name not in names:
        raise UnknownNameError("bundled model", name, names)
    return read_card_file(BUNDLED / f"{name}.json", f"bundled model {name!r}")


def read_card_file(path: Path, owner: str) -> dict[str, Any]:
    """Return the card in a JSON file of `owner`; raises IntegrityError for other contents or missing keys."""
    try:
        card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _CARD_KEYS if key not in card]
    except (OSError, ValueError, TypeError) as error:
        raise IntegrityError(f"the card {path} of {owner} is not a JSON object: {error}") from error
    if missing or card["training"] not in TRAININGS:
        fault = f"lacks {', '.join(missing)}" if missing else f"has training {card['training']!r}"
        raise IntegrityError(f"the card {path} of {owner} {fault}; train the model again with its recipe")
    return card


def card_beside(weights: Path) -> Path | None:
    """Return the path of the card beside a weights file (`<stem>.json`), None where there is none."""
    card = weights.with_suffix(".json")
    return card if weights.is_file() and card != weights and card.is_file() else None


def bundled_names() -> list[str]:
    """Return the ids of the bundled models."""
    return sorted(path.stem for path in BUNDLED.glob("*.json"))


def bundled_entry(name: str) -> ModelEntry:
    """Return the entry of a bundled model from its card; raises the errors of `read_card`."""
    return card_entry(read_card(name), f"bundled:{name}", "bundled")


def card_entry(card: Mapping[str, Any], ref: str, source: str) -> ModelEntry:
    """Return the entry of a model from its card."""
    published = tuple(
        PublishedNumber(metric=item["metric"], value=float(item["value"]), source=item["source"])
        for item in card["published"]
    )
    return ModelEntry(
        ref=ref,
        name=card["id"],
        source=source,
        architecture=card["architecture"],
        family=card["family"],
        dataset=card["dataset"],
        training=card["training"],
        trained_norm=card["trained_norm"],
        trained_eps=float(card["trained_eps"]),
        licence=card["licence"],
        reference=card["reference"],
        published=published,
    )


def _list_bundled() -> list[ModelEntry]:
    return [bundled_entry(name) for name in bundled_names()]


def _list_robustbench() -> list[ModelEntry]:
    return [row.entry for row in robustbench_rows()]


def _list_timm() -> list[ModelEntry]:
    # Imported here because the libraries import torch.
    from model_zoo import libraries

    return [
        ModelEntry(
            ref=f"timm:{name}",
            name=name,
            source="timm",
            architecture=name.partition(".")[0],
            family=family,
        )
        for name, family in libraries.timm_names()
    ]


def _list_torchvision() -> list[ModelEntry]:
    from model_zoo import libraries

    return [pretrained_entry(f"torchvision:{name}", facts) for name, facts in libraries.torchvision_names()]


def pretrained_entry(ref: str, facts: PretrainedFacts) -> ModelEntry:
    """Return the entry, without hash, of timm or torchvision weights from their metadata."""
    source, _, name = ref.partition(":")
    # Tags "adv" and "ap" mark adversarial training with an unpublished radius.
    adversarial = re.search(r"(^|_)(adv|ap)(_|$)", facts.tag) is not None
    published: tuple[PublishedNumber, ...] = ()
    if facts.accuracy is not None:
        where = f"{source}, top-1 on ImageNet's validation images"
        published = (PublishedNumber(metric="natural_accuracy", value=facts.accuracy, source=where),)
    return ModelEntry(
        ref=ref,
        name=name,
        source=source,
        architecture=facts.name,
        family=facts.family,
        dataset="imagenet" if facts.num_classes == 1000 else "",
        training="unknown" if adversarial else "standard",
        licence=facts.licence,
        reference=facts.reference,
        published=published,
    )


LISTERS: dict[str, Callable[[], list[ModelEntry]]] = {
    "bundled": _list_bundled,
    "robustbench": _list_robustbench,
    "timm": _list_timm,
    "torchvision": _list_torchvision,
}
