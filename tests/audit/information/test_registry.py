"""The table of estimators, and their sections of a benchmark."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from audit.config.yaml_source import read_config
from audit.errors import ConfigError
from audit.information.estimator import ESTIMATORS, Estimator
from audit.information.label_entropy import LabelEntropy
from audit.information.released.estimator import Reference
from audit.information.sandwich import Sandwich
from audit.run.cell import cells

LEGAL = "name: a\ndataset: digits\nmodels: [bundled:digits-vgg-robust]\nthreats: {eps: 8/255}\nestimators:"


def read(folder: Path, estimators: str) -> list[Estimator]:
    path = folder / "b.yaml"
    path.write_text(LEGAL + estimators + "\n")
    return [cell.settings.estimator for cell in cells(read_config(path))]


def fault(folder: Path, estimators: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, estimators)
    (only,) = caught.value.faults
    return only.replace(f"{folder / 'b.yaml'}:", "", 1)


def test_the_table_is_complete_and_immutable():
    for name, estimator in ESTIMATORS.items():
        assert isinstance(estimator, Estimator)
        assert estimator.name == ("mine-infonce" if name == "mine" else name)
        assert hash(estimator) == hash(replace(estimator))
        assert set(estimator.memory_only) <= {known.name for known in fields(estimator)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_name_a_list_and_a_mapping_are_the_same(name: str, tmp_path: Path):
    wanted = [ESTIMATORS[name]]
    assert read(tmp_path, f" {name}") == read(tmp_path, f" [{name}]") == read(tmp_path, f" {{name: {name}}}") == wanted


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (
            "{name: sandwich, noise: 1/4, quantisers: [3], widths: [2]}",
            Sandwich(noise=0.25, quantisers=(3,), widths=(2.0,)),
        ),
        ("{name: sandwich, absolute: true, steps: 7}", Sandwich(absolute=True, steps=7)),
        ("{name: label-level, kept: 2, relative_step: 1e-1}", LabelEntropy(kept=2, relative_step=0.1)),
        ("{name: label-level, targets: 2, kept: 2}", LabelEntropy(targets=2, kept=2)),
        ("{name: label-level, targets: 20, kept: 15}", LabelEntropy(targets=20, kept=15)),
        ("{name: ref-mean, width: 64}", Reference(per_position=False, width=64)),
    ],
)
def test_settings_reach_the_estimator(written: str, wanted: Estimator, tmp_path: Path):
    assert read(tmp_path, f"\n  - {written}") == [wanted]


def test_several_keep_their_order(tmp_path: Path):
    found = read(tmp_path, "\n  - label-level\n  - {name: sandwich, noise: 1}\n  - ref-mean")
    assert found == [LabelEntropy(), Sandwich(noise=1.0), Reference(per_position=False)]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("sandwhich", "6:5: estimators.0: unknown estimator 'sandwhich'; did you mean 'sandwich'"),
        ("{name: label-levle}", "6:5: estimators.0: unknown estimator 'label-levle'; did you mean 'label-level'"),
        ("{name: sandwich, nosie: 1}", "6:22: estimators.0.sandwich: unknown key 'nosie'; did you mean 'noise'"),
        ("{name: label-information, step: 1}", "6:31: estimators.0.label-information: unknown key 'step'; did you"),
        ("{name: sandwich, noise: 0}", "6:22: estimators.0.sandwich.noise: noise 0.0 must be above 0 and"),
        ("{name: sandwich, noise: .inf}", "6:22: estimators.0.sandwich.noise: noise inf must be above 0"),
        ("{name: sandwich, noise: loud}", "6:22: estimators.0.sandwich.noise: not a number or fraction such as"),
        ("{name: sandwich, steps: 2.5}", "6:22: estimators.0.sandwich.steps: Input should be a valid integer"),
        ("{name: sandwich, quantisers: [2, 0]}", "6:22: estimators.0.sandwich.quantisers: quantisers (2, 0)"),
        ("{name: label-level, kept: 0}", "6:25: estimators.0.label-level.kept: kept 0 must be at least 1"),
        ("{name: label-information, relative_step: 5}", "6:31: estimators.0.label-information.relative_step: relative"),
        ("{name: ref-local, per_position: false}", "6:23: estimators.0.ref-local: unknown key 'per_position'"),
        ("{noise: 1}", "6:5: estimators.0: an estimator is a name or a mapping with one; legal: sandwich, mine"),
        ("[sandwich]", "6:5: estimators.0: an estimator is a name or a mapping with one; legal: sandwich, mine"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_the_nearest_legal_name(written: str, said: str, tmp_path: Path):
    assert fault(tmp_path, f"\n  - {written}").startswith(said)


def test_no_estimator_is_a_fault(tmp_path: Path):
    assert fault(tmp_path, " []").startswith("5:1: estimators: ")
