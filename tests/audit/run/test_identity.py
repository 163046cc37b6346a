"""Cell ids change with everything that decides numbers and with nothing else."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from audit.adversary.label_attack import LabelAttack, Stage
from audit.adversary.pgd import PGD
from audit.adversary.threat import Linf
from audit.config.benchmark import BenchmarkConfig
from audit.config.estimators import ESTIMATOR_SECTIONS, Section, nested_section
from audit.config.settings import AuditSettings
from audit.information.probing.settings import ProbeTraining
from audit.information.settings import CriticShape, CriticTraining, WorstCaseSearch
from audit.run.cell import Cell, InputRules, cells
from audit.run.identity import cell_identity
from audit.run.loading import RunOptions
from audit.storage import digest
from model_zoo.entries import ModelEntry
from model_zoo.fitting import applied
from model_zoo.images.classes import ClassMap
from model_zoo.images.datasets import ImageRequest, ImageSet
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.model_types import SourceSettings

# Dataclasses that are no sections: which fields are part of a cell's identity, and which are not.
CLASSES: dict[type, tuple[set[str], set[str]]] = {
    Cell: ({"ref", "dataset", "images", "layer", "threat", "settings", "after", "rules", "later"}, {"name"}),
    InputRules: ({"preprocess", "restrict_classes", "balanced"}, set()),
    Preprocessing: ({known.name for known in fields(Preprocessing)}, set()),
    AuditSettings: ({"estimator", "attack", "seeds", "reduce", "certificate", "ledger"}, set()),
    Linf: ({"eps"}, {"pixel_range"}),  # the range is the same for all images
    LabelAttack: ({"stages", "noise", "queries", "borrowed", "by_reach", "version"}, {"fast"}),
    Stage: ({"loss", "pgd", "targets"}, set()),
    PGD: ({"steps", "relative_step", "random_start", "restarts"}, {"batch_size"}),
    CriticTraining: ({known.name for known in fields(CriticTraining)}, set()),
    CriticShape: ({known.name for known in fields(CriticShape)}, set()),
    WorstCaseSearch: ({known.name for known in fields(WorstCaseSearch)}, set()),
    ProbeTraining: ({known.name for known in fields(ProbeTraining)}, set()),
    RunOptions: (set(), {"sources", "data_dir", "device", "keep_images", "batch_size"}),
    SourceSettings: (set(), {"trust_code", "offline", "cache_dir", "model_dir", "base"}),
    # through the hash of the images
    ImageRequest: (set(), {"count", "split", "data_dir", "offline", "balanced", "preprocessing"}),
}
VALUES: dict[str, Any] = {
    "name": "other", "dataset": "mnist", "images": 77, "layers": ["input"], "seeds": [9], "reduce": "mean",
    "estimators": ["label-level"], "certificate": True, "attack": "smoke", "models": ["bundled:digits-mlp-robust"],
    "threats": {"norm": "l2", "eps": 0.1}, "preprocess": "none", "restrict_classes": True,
    "keep_images": True, "balanced": True,
}  # fmt: skip
ENTRY = ModelEntry(ref="bundled:x", name="x", source="bundled", weights_sha256="1" * 64)
BASE: dict[str, Any] = {
    "name": "a", "dataset": "digits", "models": ["bundled:x"], "threats": {"norm": "linf", "eps": 0.2},
}  # fmt: skip


def images(dataset: str, count: int | None, *, balanced: bool = False) -> ImageSet:
    """Return a set whose hash depends on the requested images, as that of a real one."""
    return ImageSet(
        torch.zeros(1), torch.zeros(1), ("0", "1"), dataset, "test", (0,), digest([dataset, count, balanced])
    )


def fitted(cell: Cell) -> ImageSet:
    """Return the images of a cell as a model with preprocessing and more outputs than classes receives them."""
    chosen = Preprocessing(resize=(4,)) if cell.rules.preprocess else None
    class_map = ClassMap((5, 3), "name", restricted=cell.rules.restrict_classes)
    found = images(cell.dataset, cell.images, balanced=cell.rules.balanced)
    return replace(found, preprocessing=chosen, class_map=class_map)


def ids(values: dict[str, Any], entry: ModelEntry = ENTRY) -> list[str]:
    found = cells(BenchmarkConfig.model_validate(values))
    sets = [fitted(cell) for cell in found]
    made = zip(found, sets, strict=True)
    return [digest(cell_identity(cell, entry, each.sha256, None, applied(each))) for cell, each in made]


@pytest.mark.parametrize("made", CLASSES, ids=lambda made: made.__name__)
def test_every_settings_field_is_classified(made: type) -> None:
    decide, leave = CLASSES[made]
    assert not decide & leave
    assert decide | leave == {known.name for known in fields(made)}


@pytest.mark.parametrize("field", BenchmarkConfig.model_fields)
def test_benchmark_fields_that_decide_numbers_change_ids(field: str) -> None:
    changed = ids({**BASE, field: VALUES[field]}) != ids(BASE)
    assert changed == (field in BenchmarkConfig.decides)


SECTIONS: list[tuple[type[Section], tuple[str, ...]]] = [
    *((section, ()) for section in ESTIMATOR_SECTIONS.values()), (nested_section(CriticShape), ("critic",)),
    (nested_section(WorstCaseSearch), ("search",)),
]  # fmt: skip


@pytest.mark.parametrize(("section", "under"), SECTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_section_fields_that_decide_numbers_change_ids(section: type[Section], under: tuple[str, ...]) -> None:
    estimator = "mine" if under else section.model_fields["name"].default
    plain = ids({**BASE, "estimators": [estimator]})
    for field, info in section.model_fields.items():
        if field == "name" and not under:
            continue
        inner = {field: other(info.default, field)}
        value = {"name": estimator, **({under[0]: inner} if under else inner)}
        assert (ids({**BASE, "estimators": [value]}) != plain) == (field in section.decides), field


def other(default: Any, field: str) -> Any:
    """Return another legal value of a field."""
    if default is None:
        return {"noise": 0.5}[field]
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return {"name": "concatenated", "bound": "nwj"}[field]
    if isinstance(default, tuple):
        return [3]
    if isinstance(default, int | float):
        return default + 1 if isinstance(default, int) else default / 2
    return {"width": 5} if field == "critic" else {"rounds": 5}


@pytest.mark.parametrize("field", ["tier", "steps", "relative_step", "restarts"])
def test_attack_fields_change_ids(field: str) -> None:
    own = {"steps": 5, "relative_step": 0.3, "restarts": 2}
    change = {"tier": "smoke"} if field == "tier" else {**own, field: 1}
    assert ids({**BASE, "attack": change}) != ids({**BASE, "attack": own})


def test_model_fields_except_the_label_change_ids() -> None:
    plain = ids(BASE)
    for field, value in VALUES.items():
        if field in ("dataset", "images", "layers", "threats", "name"):
            changed = ids({**BASE, "models": [{"ref": "bundled:x", field: value}]})
            assert (changed != plain) == (field != "name"), field


@pytest.mark.parametrize(
    ("field", "value", "decides"),
    [
        ("weights_sha256", "2" * 64, True),
        ("architecture", "vgg", True),
        ("code_sha256", "3" * 64, True),
        ("licence", "MIT", False),
        ("reference", "x", False),
        ("training", "robust", False),
        ("pinned", True, False),
        ("renames", ("a",), False),
    ],
)
def test_weights_and_code_change_ids_but_metadata_does_not(field: str, value: Any, decides: bool) -> None:
    assert (ids(BASE, replace(ENTRY, **{field: value})) != ids(BASE)) == decides


def test_images_change_ids_through_their_hash_only() -> None:
    (cell,) = cells(BenchmarkConfig.model_validate(BASE))
    assert cell_identity(cell, ENTRY, "0")["data_sha256"] == "0"
    elsewhere = replace(cell, dataset="folder:x", images=7)
    assert cell_identity(elsewhere, ENTRY, "0") == cell_identity(cell, ENTRY, "0")


def test_images_and_classes_taken_as_they_are_leave_ids_as_they_were() -> None:
    """Rows without preprocessing and with all outputs competing keep the ids of earlier versions."""
    (cell,) = cells(BenchmarkConfig.model_validate(BASE))
    plain = images("digits", None)
    for class_map in (None, ClassMap((0, 1), "order"), ClassMap((5, 3), "wnid")):
        assert applied(replace(plain, class_map=class_map)) == {}
    assert set(cell_identity(cell, ENTRY, plain.sha256)) == {
        "version", "network", "architecture", "code_sha256", "weights_sha256", "data_sha256", "layer", "norm", "eps",
        "settings",
    }  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [{"resize": (8,)}, {"crop": (4, 4)}, {"interpolation": "bicubic"}, {"channels": 1}, {"fit": "exact"}],
)
def test_every_step_of_the_preprocessing_changes_ids(other: dict[str, Any]) -> None:
    (cell,) = cells(BenchmarkConfig.model_validate(BASE))
    base = Preprocessing(resize=(4, 4), crop=(2, 2), fit="cover")
    plain = images("digits", None)
    two = [applied(replace(plain, preprocessing=chosen)) for chosen in (base, replace(base, **other))]
    first, second = (digest(cell_identity(cell, ENTRY, plain.sha256, None, each)) for each in two)
    assert first != second


def test_a_weights_file_changes_ids_through_its_options_not_its_path() -> None:
    def of(ref: str) -> list[str]:
        return ids({**BASE, "models": [ref]})

    base = of("file:a.pth?arch=timm:resnet18&num_classes=10")
    assert of("file:/b/c.pth?arch=timm:resnet18&num_classes=10&name=x&training=robust&trained_eps=8/255") == base
    for option in ("mean=0.5&std=0.5", "shape=3x32x32"):
        assert of(f"file:a.pth?arch=timm:resnet18&num_classes=10&{option}") != base
    assert of("file:a.pth?arch=timm:resnet34&num_classes=10") != base


def test_an_id_is_the_digest_of_canonical_json(tmp_path: Path) -> None:
    (cell,) = cells(BenchmarkConfig.model_validate(BASE))
    identity = cell_identity(cell, ENTRY, images("digits", None).sha256)
    assert digest(dict(reversed(list(identity.items())))) == digest(identity)
