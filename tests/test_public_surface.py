"""The public names: documented, importable one by one, and no name of a module in the same package."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["audit", "model_zoo", "reports"]
ROOMS = ["adversary", "attribution", "calibration", "certificate", "config", "information", "representation", "run",
         "studies", "training"]  # fmt: skip
EXPORTING = [*PACKAGES, *(f"audit.{room}" for room in ROOMS)]
NAMES = [(package, name) for package in EXPORTING for name in import_module(package).__all__]
DOCUMENTED = {
    "audit": {
        "AUDIT", "AuditRecord", "AuditRecords", "AuditSettings", "AuditStage", "ESTIMATORS", "L1", "L2", "LabelAttack",
        "LabelEntropy",
        "LabelInformation", "Linf", "MIEstimate", "Mine", "PGD", "Representation", "Sandwich", "TargetModel",
        "ThreatModel", "Vulnerability", "audit_model", "certify", "evaluate_robustness", "features_of_layers",
        "layer_names", "train_adversarial_head", "train_classifier", "train_representation", "train_standard_heads",
        "verify_witness",
    },
    "model_zoo": {"ImageRequest", "list_models", "load_images", "load_model", "wrap"},
    "reports": {"figure1", "figure2", "leaderboard", "report", "to_frame", "write_reports"},
}  # fmt: skip
RAISING = ["audit_model", "certify", "evaluate_robustness", "load_images", "load_model", "verify_witness", "wrap"]
SOURCED = ["LabelEntropy", "LabelInformation", "Mine", "Sandwich", "audit_model", "certify"]
SHAPED = ["Representation", "audit_model", "certify", "evaluate_robustness", "LabelEntropy", "TargetModel"]
WITH_UNITS = ["LabelEntropy", "LabelInformation", "Linf", "Mine", "Sandwich", "ThreatModel", "audit_model", "figure1"]


def public(name):
    return getattr(import_module(next(p for p in PACKAGES if name in DOCUMENTED[p])), name)


@pytest.mark.parametrize("package", PACKAGES)
def test_the_public_names_are_the_documented_ones(package):
    assert set(import_module(package).__all__) == DOCUMENTED[package]
    assert set(import_module(package).__all__) <= set(dir(import_module(package)))


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_can_be_imported_and_is_documented(package, name):
    found = getattr(import_module(package), name)
    if inspect.isclass(found) or inspect.isfunction(found):
        assert len(inspect.getdoc(found)) > 30
        assert found.__module__.partition(".")[0] == package.partition(".")[0]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_no_public_name_is_that_of_a_module_beside_it(package, name):
    folder = ROOT / package.replace(".", "/")
    assert not (folder / f"{name}.py").exists()
    assert not (folder / name).is_dir()


@pytest.mark.parametrize("package", EXPORTING)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = import_module(package).nothing


@pytest.mark.parametrize("name", RAISING)
def test_errors_are_documented(name):
    assert re.search(r"[Rr]aises? \w*(Error|Fault)", inspect.getdoc(public(name)))


@pytest.mark.parametrize("name", SOURCED)
def test_sources_are_documented(name):
    assert "Source:" in inspect.getdoc(public(name))


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_are_documented(name):
    assert re.search(r"\(N[,)]", inspect.getdoc(public(name)))


@pytest.mark.parametrize("name", WITH_UNITS)
def test_units_are_documented(name):
    assert re.search(r"\bnats\b|pixel units|\[0, 1\]", inspect.getdoc(public(name)))


@pytest.mark.parametrize("room", [*ROOMS, "commands"])
def test_a_room_says_what_it_is_for_and_what_it_may_import(room):
    assert "May import:" in inspect.getdoc(import_module(f"audit.{room}"))
