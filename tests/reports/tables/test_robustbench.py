"""Claims in RobustBench's fields: percent, names of files, and what a record does not know."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from audit.records import AuditRecord
from reports.tables.robustbench import claims


def record(model: str = "net", eps: float = 8 / 255, **changes: Any) -> AuditRecord:
    values: dict[str, Any] = {
        "cell_id": "1" * 64, "model": model, "source": "file", "family": "resnet", "training": "adversarial",
        "trained_eps": 8 / 255, "dataset": "cifar10", "layer": "logits", "norm": "linf", "eps": eps,
        "weights_sha256": "2" * 64, "estimator": "sandwich", "attack": "apgd-ce-10+autoattack-standard", "seeds": 1,
        "images": 300, "natural_accuracy": 271 / 300, "adversarial_accuracy": 100 / 300,
        "details": {"notes": {"reference": "https://example.org/net"}, "data_sha256": "3" * 64},
    }  # fmt: skip
    return AuditRecord(**{**values, **changes})


def test_a_claim_has_percent_and_radius_as_text() -> None:
    (claim,) = claims([record()])
    assert claim.path == "cifar10/Linf/net"
    told = claim.fields
    assert (told["clean_acc"], told["autoattack_acc"], told["external"]) == ("90.33", "33.33", "33.33")
    assert (told["eps"], told["dataset"], told["architecture"]) == ("8/255", "cifar10", "resnet")
    assert (told["name"], told["link"]) == ("net", "https://example.org/net")
    assert (told["rvaudit"]["clean_correct"], told["rvaudit"]["robust_correct"]) == (271, 100)
    assert told["rvaudit"]["threat_model"] == "Linf"
    assert told["unreliable"] is False


def test_the_fields_are_those_of_robustbench() -> None:
    found = find_spec("robustbench")
    assert found is not None
    assert found.origin is not None
    source = ast.parse((Path(found.origin).parent / "utils.py").read_text())  # importing it needs AutoAttack
    (info,) = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "ModelInfo"]
    known = {
        node.target.id for node in info.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    (claim,) = claims([record()])
    # two fields of its published files that its class leaves out, and what the accuracies rest on
    assert set(claim.fields) - known == {"external", "unreliable", "rvaudit"}
    others = {name for name in known if name.startswith("corruptions")}
    assert known - set(claim.fields) == others


def test_only_autoattack_is_claimed_as_autoattack() -> None:
    (claim,) = claims([record(attack="ce-2+margin-2")])
    assert "autoattack_acc" not in claim.fields  # RobustBench reads every number that is there
    assert claim.fields["external"] == "33.33"
    assert "ce-2+margin-2" in claim.fields["footnote"]


def test_layers_and_estimators_share_one_claim_with_images_if_any() -> None:
    kept = record(layer="penultimate", cell_id="9" * 64)
    kept.details["images"] = {"sha256": "4" * 64}
    found = claims([record(), record(estimator="mine"), kept, record(status="failed")])
    assert [claim.record.cell_id for claim in found] == ["9" * 64]


def test_radii_norms_and_namesakes_have_files_of_their_own() -> None:
    found = claims([
        record(), record(eps=4 / 255), record(eps=0.5, norm="l2"), record("NET", eps=0.5, norm="l1"),
        record("folder/../net", weights_sha256="5" * 64, cell_id="6" * 64), record("\x1b[31m..", eps=1.0, norm="l1"),
    ])  # fmt: skip
    paths = [claim.path for claim in found]
    assert len(set(paths)) == 6
    assert paths == sorted([
        "cifar10/Linf/net_eps-8-255", "cifar10/Linf/net_eps-4-255", "cifar10/L2/net", "cifar10/L1/NET",
        "cifar10/Linf/folder-..-net", "cifar10/L1/model",
    ])  # fmt: skip
    twins = claims([record(cell_id="a" * 64), record(cell_id="b" * 64, weights_sha256="7" * 64)])
    assert [claim.path.rpartition("/")[2] for claim in twins] == ["net_eps-8-255_aaaaaaaa", "net_eps-8-255_bbbbbbbb"]


@pytest.mark.parametrize("code", ["untrusted", "gated"])
def test_a_distrusted_accuracy_is_called_unreliable(code: str) -> None:
    assert claims([record(flags=(f"{code}: x",))])[0].fields["unreliable"] is True
    assert claims([record(flags=("untrusted_search: x", "unpinned: x"))])[0].fields["unreliable"] is False


@pytest.mark.parametrize(
    ("dataset", "shown"),
    [("imagenet:robustbench-5k", "imagenet"), ("parquet:../data/cifar10-test.parquet", "cifar10-test.parquet")],
)
def test_data_sets_have_short_names(dataset: str, shown: str) -> None:
    (claim,) = claims([record(dataset=dataset)])
    assert claim.fields["dataset"] == shown
    assert claim.path == f"{shown}/Linf/net"
