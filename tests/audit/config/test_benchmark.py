"""Sections have the fields, defaults and limits of their settings; YAML round trip; names of run folders."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from audit.adversary import label_attack as attacks
from audit.adversary.norms import NORMS
from audit.adversary.pgd import PGD
from audit.adversary.threat import THREATS, threat_model
from audit.commands.options import slug
from audit.config.benchmark import TIERS, AttackConfig, BenchmarkConfig, ModelConfig, ThreatConfig
from audit.config.estimators import ESTIMATOR_SECTIONS, Section, estimator_section, nested_section
from audit.config.yaml_source import read_config, to_yaml
from audit.errors import AuditError
from audit.information import bounds, critics
from audit.information.estimator import ESTIMATORS
from audit.information.registry import REGISTRY, Registration
from audit.information.settings import (
    BOUND_NAMES,
    CRITIC_NAMES,
    Count,
    CriticShape,
    EstimatorSettings,
    WorstCaseSearch,
    yaml_key,
)
from audit.records import RecordStore
from audit.storage import canonical_json, digest

SECTIONS = [*ESTIMATOR_SECTIONS.values(), nested_section(CriticShape), nested_section(WorstCaseSearch), AttackConfig]
PROBES = [-1, 0, 1, 2, 3, 0.5, 0.999, 1.0, 1.5, 2.0, 2.5, math.inf, -math.inf, math.nan]


def settings_of(section: type[Section]) -> Any:
    """Return the dataclass whose fields the section has: for mine, the training of its critic."""
    module, _, name = section.settings_of.partition(":")
    found = getattr(import_module(module), name)
    return type(found().training) if name == "MineSettings" else found


def simple(section: type[Section]) -> list[str]:
    return [name for name in section.model_fields if name not in ("name", "tier", "critic", "search")]


def test_attack_sections_have_the_defaults_of_a_search() -> None:
    for name in simple(AttackConfig):
        assert AttackConfig.model_fields[name].default == getattr(PGD(), name), name


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_extend_their_settings(name: str) -> None:
    estimator, settings = ESTIMATORS[name], REGISTRY[name].settings
    assert isinstance(estimator, type(settings))
    assert [each.name for each in fields(estimator)] == [each.name for each in fields(settings)]
    assert all(getattr(estimator, each.name) == getattr(settings, each.name) for each in fields(settings))
    assert ESTIMATOR_SECTIONS[name]().estimator() == estimator


def test_settings_alone_make_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class NewSettings(EstimatorSettings):
        subject: ClassVar[str] = "new"
        memory_only: ClassVar[tuple[str, ...]] = ("batch_size",)
        steps: Count = 3
        search: WorstCaseSearch = field(default_factory=WorstCaseSearch, metadata=yaml_key("find"))
        batch_size: int = 8

    monkeypatch.setitem(REGISTRY, "new", Registration(NewSettings(), "nowhere:New"))
    section = estimator_section("new", NewSettings())
    read = section.model_validate({"name": "new", "steps": 4, "find": {"rounds": 2}})
    assert read.settings() == NewSettings(4, WorstCaseSearch(rounds=2))
    assert (section.decides, section.labels) == (("name", "steps", "find"), ("batch_size",))
    with pytest.raises(ValidationError, match="steps 0 must be at least 1"):
        section.model_validate({"steps": 0})


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_a_section_accepts_what_its_settings_accept(section: type[Section]) -> None:
    filled = settings_of(section)
    for name in simple(section):
        kind = section.model_fields[name].annotation
        if kind not in (int, float):
            continue
        for value in PROBES if kind is float else [probe for probe in PROBES if isinstance(probe, int)]:
            assert takes(section, **{name: value}) == takes(filled, **{name: value}), (name, value)


def takes(make: Any, *words: Any, **values: Any) -> bool:
    try:
        make(*words, **values)
    except (ValidationError, AuditError):
        return False
    return True


def test_quantisers_are_counts() -> None:
    section = ESTIMATOR_SECTIONS["sandwich"]
    assert takes(section, quantisers=[1])
    assert not takes(section, quantisers=[2, 0])


def test_widths_are_multiples_of_the_noise() -> None:
    section = ESTIMATOR_SECTIONS["sandwich"]
    assert takes(section, widths=[1, "5/2"])
    assert not any(takes(section, widths=wrong) for wrong in ([0.5], [2, math.inf], ["wide"]))


def test_tables_of_names_match_the_implementations() -> None:
    assert set(ESTIMATOR_SECTIONS) == set(ESTIMATORS)
    assert set(CRITIC_NAMES) == set(critics.CRITICS)
    assert set(BOUND_NAMES) == set(bounds.BOUNDS)
    assert set(NORMS) == set(THREATS)
    assert set(TIERS) == set(attacks.TIERS)


@pytest.mark.parametrize("norm", [*NORMS, "LINF", "l3", ""])
@pytest.mark.parametrize("eps", [-0.1, 0, 0.5, 1, 1.1, 300, math.inf, math.nan])
def test_a_threat_is_legal_where_the_threat_model_is(norm: str, eps: float) -> None:
    assert takes(ThreatConfig, norm=norm, eps=eps) == takes(threat_model, norm, eps)


@pytest.mark.parametrize("name", ESTIMATOR_SECTIONS)
def test_shown_name_is_that_of_the_estimator(name: str) -> None:
    section = ESTIMATOR_SECTIONS[name]()
    assert section.shown == section.estimator().name
    if name == "mine":
        for other in ({"bound": "nwj"}, {"critic": {"name": "concatenated"}}):
            changed = ESTIMATOR_SECTIONS[name].model_validate(other)
            assert changed.shown == changed.estimator().name != section.shown


@pytest.mark.parametrize("section", [*SECTIONS, BenchmarkConfig, ModelConfig, ThreatConfig], ids=lambda s: s.__name__)
def test_every_field_is_part_of_the_identity_or_a_label(section: type[Section]) -> None:
    assert sorted([*section.decides, *section.labels]) == sorted(section.model_fields)


def test_reading_a_benchmark_needs_no_torch() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom audit.config.yaml_source import read_config\n"
        "read_config(Path('benchmark.yaml'))\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert answer.stdout.split() == ["False", "False"]


TEXT = st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable() or not text.isascii())
NUMBERS = st.floats(0, 1)
THREAT = st.fixed_dictionaries(
    {"eps": st.lists(NUMBERS, min_size=1, max_size=3)}, optional={"norm": st.sampled_from(NORMS)}
)
LAYERS = st.lists(TEXT, min_size=1, max_size=3)
MODEL = st.fixed_dictionaries(
    {"ref": TEXT},
    optional={"name": TEXT, "dataset": TEXT, "images": st.integers(1, 10**6), "layers": LAYERS, "threats": THREAT},
)
OWN = st.fixed_dictionaries({}, optional={"steps": st.integers(1, 99), "restarts": st.integers(1, 9)})
MINE = st.fixed_dictionaries(
    {"name": st.just("mine")},
    optional={"learning_rate": st.floats(1e-8, 1), "critic": st.fixed_dictionaries({"width": st.integers(1, 9)})},
)
CONFIGS = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,59}\Z"),
        "dataset": TEXT,
        "models": st.lists(st.one_of(TEXT, MODEL), min_size=1, max_size=3),
        "threats": st.lists(THREAT, min_size=1, max_size=2),
    },
    optional={
        "images": st.integers(1, 10**6),
        "layers": LAYERS,
        "seeds": st.lists(st.integers(0, 2**31), min_size=1, max_size=4, unique=True),
        "reduce": st.sampled_from(["flatten", "mean"]),
        "certificate": st.booleans(),
        "attack": st.one_of(st.sampled_from(TIERS), OWN),
        "estimators": st.lists(
            st.one_of(MINE, st.sampled_from(["sandwich", "label-level", "ref-mean"])),
            min_size=1,
            max_size=3,
            unique_by=lambda each: each if isinstance(each, str) else each["name"],
        ),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    config = BenchmarkConfig.model_validate(values)
    path = tmp_path_factory.mktemp("yaml") / "b.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = read_config(path)
    assert again.canonical() == config.canonical()
    assert again.attack.attack() == config.attack.attack()
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize("said", [None, "smoke", "audit", {"steps": 10}, {"steps": 10, "restarts": 1}, {"steps": 3}])
def test_attack_round_trip(said: Any, tmp_path: Path) -> None:
    values = {"name": "a", "dataset": "d", "models": ["m"], "threats": {"eps": 0}}
    config = BenchmarkConfig.model_validate(values if said is None else {**values, "attack": said})
    (tmp_path / "b.yaml").write_text(to_yaml(config))
    again = read_config(tmp_path / "b.yaml")
    assert again.attack.attack() == config.attack.attack()
    default = BenchmarkConfig.model_validate(values)
    assert (config.canonical() == default.canonical()) == (said is None)


def test_attacks_of_earlier_run_folders_are_the_audit_tier() -> None:
    spelled = {"tier": None, "steps": 10, "relative_step": 0.25, "restarts": 1}
    assert AttackConfig.model_validate(spelled).attack() == attacks.AUDIT
    assert AttackConfig.model_validate({**spelled, "steps": 9}).attack().name == "ce-9+margin-9"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_canonical_json_is_a_fixed_point(data: Any) -> None:
    once = canonical_json(data)
    assert canonical_json(json.loads(once)) == once
    assert digest(json.loads(once)) == digest(data)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.sampled_from(["..", "../../x", "CON", "a\0b", "/etc/passwd", "x" * 300, "C:\\x", ""]))
def test_no_name_leaves_the_run_folder(name: str) -> None:
    folder = Path("runs/here")
    made = slug(name)
    assert made == Path(made).name
    assert made not in ("", ".", "..")
    assert len(made) <= 60
    assert made.isascii()
    assert (folder / made).resolve().parent == folder.resolve()
    identity = digest({"layer": name, "model": name})
    assert RecordStore(folder).path(identity).resolve().parent == (folder / "cells").resolve()
    legal = takes(BenchmarkConfig, name=name, dataset="d", models=["m"], threats={"eps": 0})
    assert not legal or (Path("runs") / name).resolve().parent == Path("runs").resolve()


@pytest.mark.parametrize(
    ("given", "certificate", "ledger"),
    [(False, False, False), (True, True, False), ({"ledger": True}, True, True), ({"ledger": False}, True, False)],
)
def test_a_certificate_may_ask_for_the_ledger(given: Any, certificate: bool, ledger: bool) -> None:
    made = BenchmarkConfig.model_validate(
        {"name": "a", "dataset": "digits", "models": ["bundled:x"], "threats": {"eps": 0.1}, "certificate": given}
    )
    assert {(each.certificate, each.ledger) for each in made.settings()} == {(certificate, ledger)}


def test_an_illegal_certificate_is_one_sentence() -> None:
    rest = {"name": "a", "dataset": "digits", "models": ["bundled:x"], "threats": {"eps": 0.1}}
    with pytest.raises(ValidationError, match="certificate 3 is not legal: write true, false, or") as caught:
        BenchmarkConfig.model_validate({**rest, "certificate": 3})
    assert caught.value.error_count() == 1
    assert not takes(BenchmarkConfig, **rest, certificate={"ledge": True})
