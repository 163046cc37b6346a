"""benchmark.yaml: all faults are reported with their places; legal files become cells."""

from dataclasses import replace
from pathlib import Path

import pytest

from audit.adversary.label_attack import AUDIT
from audit.adversary.threat import L2, Linf
from audit.config.benchmark import BenchmarkConfig, parse_number
from audit.config.yaml_source import read_config
from audit.errors import ConfigError, EnvironmentFault, UnknownNameError
from audit.information.estimator import ESTIMATORS
from audit.information.mine import Mine
from audit.information.released.estimator import Reference
from audit.run.cell import cells, expand

ROOT = Path(__file__).parents[3]
LEGAL = "name: a\ndataset: digits\nmodels: [bundled:digits-vgg-robust]\nthreats: {eps: 8/255}\n"


def _read(folder: Path, text: str | bytes) -> BenchmarkConfig:
    path = folder / "b.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path)


def _faults(folder: Path, text: str | bytes) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        _read(folder, text)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.faults)
    return [fault.replace(f"{folder / 'b.yaml'}", "", 1) for fault in caught.value.faults]


FAULTY = """\
nmae: a
dataset: digits
models:
  - ref: m
    imagse: 3
  - {reff: x}
  - 5
threats:
  - {norm: lnf, eps: 0.1}
  - eps: 8/0
  - {norm: linf, eps: [2/255, 3]}
layers: []
estimators:
  - name: mine
    bond: x
    bound: infonze
    critic: {widht: 3, dropout: 1}
    learning_rate: fast
    search: {rounds: 0, colapse_steps: 1}
  - sandwhich
  - 7
  - {name: ref-mean, width: 0, per_position: true}
  - {steps: 3}
attack: {steps: 0, relative_step: 9}
seeds: [1, 1]
reduce: sum
"""
PLACES_AND_WORDS = [
    ("1:1", "name: Field required"),
    ("1:1", "unknown key 'nmae'; did you mean 'name'"),
    ("5:5", "models.0: unknown key 'imagse'; did you mean 'images'"),
    ("6:5", "models.1.ref: Field required"),
    ("6:6", "models.1: unknown key 'reff'; did you mean 'ref'"),
    ("7:5", "models.2: not a mapping"),
    ("9:6", "threats.0.norm: unknown norm 'lnf'; did you mean 'linf'"),
    ("10:5", "threats.1.eps.0: not a number or fraction such as 8/255: '8/0'"),
    ("11:31", "threats.2.eps.1: eps 3.0 is outside [0, 1]"),
    ("12:1", "layers: Value should have at least 1 item"),
    ("15:5", "estimators.0.mine: unknown key 'bond'; did you mean 'bound'"),
    ("16:5", "estimators.0.mine.bound: unknown bound 'infonze'; did you mean 'infonce'"),
    ("17:14", "estimators.0.mine.critic: unknown key 'widht'; did you mean 'width'"),
    ("17:24", "estimators.0.mine.critic.dropout: dropout 1.0 is outside [0, 1)"),
    ("18:5", "estimators.0.mine.learning_rate: not a number or fraction such as 8/255: 'fast'"),
    ("19:14", "estimators.0.mine.search.rounds: rounds 0 must be at least 1"),
    ("19:25", "estimators.0.mine.search: unknown key 'colapse_steps'; did you mean 'collapse_steps'"),
    ("20:5", "estimators.1: unknown estimator 'sandwhich'; did you mean 'sandwich'"),
    ("21:5", "estimators.2: an estimator is a name or a mapping with one; legal: "),
    ("22:22", "estimators.3.ref-mean.width: width 0 must be at least 1"),
    ("22:32", "estimators.3.ref-mean: unknown key 'per_position'"),
    ("23:5", "estimators.4: an estimator is a name or a mapping with one; legal: "),
    ("24:10", "attack.steps: steps 0"),
    ("24:20", "attack.relative_step: relative_step 9.0 is outside (0, 2]"),
    ("25:1", "seeds: seeds [1, 1] must be at least one, each named once"),
    ("26:1", "reduce: Input should be 'flatten' or 'mean'"),
]


def test_all_faults_are_reported_with_their_places(tmp_path: Path) -> None:
    found = _faults(tmp_path, FAULTY)
    assert len(found) == len(PLACES_AND_WORDS)
    for fault, (place, words) in zip(found, PLACES_AND_WORDS, strict=True):
        assert fault.startswith(f":{place}: {words}"), fault


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", ':2:1: found duplicate key "name"'),
        ("name: a\n\tdataset: b\n", ":2:1: found character '\\t'"),
        ("name: [a\n", ":2:1: "),
        ("name: *nobody\n", ":1:7: found undefined alias 'nobody'"),
        ("name: a\n---\nname: b\n", ":2:1: but found another document"),
        ("name: ab\x00\n", ":1:9: the character '\\x00' is not legal in YAML"),
        ("", ":1:1: a benchmark is a mapping"),
        ("- name\n", ":1:1: a benchmark is a mapping"),
        ("name: " + "[" * 3000 + "]" * 3000, ": lists or mappings are nested too deeply"),
        (LEGAL + "images: 2001-99-99\n", ": a value cannot be read as YAML: month"),
        (b"name: \xff\n", " is not UTF-8 text"),
        (LEGAL + "#" * 1_000_000, " is larger than 1,000,000 bytes"),
    ],
)
def test_files_that_are_not_benchmarks(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (fault,) = _faults(tmp_path, text)
    assert fault.startswith(expected)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"cannot read .*nowhere\.yaml: No such file"):
        read_config(tmp_path / "nowhere.yaml")
    with pytest.raises(EnvironmentFault, match="Is a directory"):
        read_config(tmp_path)


def test_yaml_tags_are_refused_and_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = (
        f"name: !!python/name:os.system a\ndataset: digits\nmodels: !!python/object/apply:os.system [touch {canary}]\n"
        "threats: !x {eps: 0.1}\n"
    )
    found = _faults(tmp_path, text)
    assert [fault.partition(": tags such as ")[0] for fault in found] == [":1:1", ":3:1", ":4:1"]
    assert "os.system are not legal here" in found[1]
    assert not canary.exists()


def test_aliases_that_multiply(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    (fault,) = _faults(tmp_path, "\n".join(lines))
    assert "more than 100,000 values (aliases that multiply?)" in fault


def test_faults_of_merged_keys_have_a_place(tmp_path: Path) -> None:
    text = "name: a\ndataset: d\nthreats: {eps: 0.1}\nmodels:\n  - &m {ref: a, images: 0}\n  - {<<: *m, ref: b}\n"
    found = _faults(tmp_path, text)
    assert [fault.partition(" ")[0] for fault in found] == [":5:17:", ":6:5:"]


@pytest.mark.parametrize("name", ["-a", "a/b", "../a", "a" * 61, "", "ä", ".hidden"])
def test_benchmark_names_that_cannot_be_folder_names(tmp_path: Path, name: str) -> None:
    (fault,) = _faults(tmp_path, LEGAL.replace("name: a", f'name: "{name}"'))
    assert fault.startswith(":1:1: name: ")
    assert _read(tmp_path, LEGAL.replace("name: a", "name: a.b-C_9")).name == "a.b-C_9"


@pytest.mark.parametrize(
    ("written", "value"),
    [("8/255", 8 / 255), (" 8 / 255", 8 / 255), ("1e-3", 1e-3), (0.2, 0.2), (1, 1.0), ("0.5/255", 0.5 / 255)],
)
def test_numbers(written: object, value: float) -> None:
    assert parse_number(written) == value


@pytest.mark.parametrize("written", ["8/0", "8/2/2", "eight", True, None, [1], "1e99999999/2", "nan/2", ""])
def test_invalid_numbers(written: object) -> None:
    with pytest.raises(ValueError, match="not a number or fraction such as 8/255"):
        parse_number(written)


def test_huge_exponents_become_infinity() -> None:
    assert parse_number("1e99999999") == float("inf")


def test_models_override_benchmark_settings(tmp_path: Path) -> None:
    config = _read(
        tmp_path,
        "name: a\ndataset: digits\nimages: 60\nlayers: [logits, penultimate]\nseeds: 7\n"
        "threats: [{eps: [2/255, 8/255]}, {norm: l2, eps: 1}]\n"
        "models:\n  - bundled:x\n"
        "  - {ref: bundled:y, name: mine, dataset: mnist, images: 30, layers: input, threats: {norm: l2, eps: 1/2}}\n",
    )
    made = cells(config)
    assert len(made) == 2 * 3 + 1
    first, last = made[0], made[-1]
    assert (first.ref, first.name, first.dataset, first.images, first.layer) == (
        "bundled:x",
        None,
        "digits",
        60,
        "logits",
    )
    assert [cell.threat for cell in made[:3]] == [Linf(2 / 255), Linf(8 / 255), L2(1.0)]
    assert (last.name, last.dataset, last.images, last.layer, last.threat) == ("mine", "mnist", 30, "input", L2(0.5))
    assert first.settings.seeds == (7,)
    assert first.settings is not None
    assert first.settings == last.settings


def test_each_estimator_has_its_own_cells(tmp_path: Path) -> None:
    text = LEGAL.replace("eps: 8/255", "eps: [8/255, 0.1]") + (
        "estimators:\n  - {name: mine, steps: 5, learning_rate: 1/100, critic: {width: 3}, search: {rounds: 2}}\n"
        "  - {name: ref-mean, width: 7, step_size: 1/50}\n"
    )
    made = cells(_read(tmp_path, text))
    assert [(cell.settings.estimator.name, cell.threat.eps) for cell in made] == [
        (name, eps) for name in ("mine-infonce", "ref-mean") for eps in (8 / 255, 0.1)
    ]
    mine = Mine()
    training = replace(mine.training, steps=5, learning_rate=0.01, shape=replace(mine.training.shape, width=3))
    assert made[0].settings.estimator == Mine(training, replace(mine.search, rounds=2))
    assert made[-1].settings.estimator == Reference(per_position=False, width=7, step_size=0.02)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_given_by_name_has_default_settings(name: str, tmp_path: Path) -> None:
    (cell,) = cells(_read(tmp_path, LEGAL + f"estimators: {name}\n"))
    assert cell.settings.estimator == ESTIMATORS[name]
    with pytest.raises(ConfigError, match="unknown key 'nme'"):
        _read(tmp_path, LEGAL + f"estimators: {{name: {name}, nme: 1}}\n")


def test_two_spellings_are_one_configuration(tmp_path: Path) -> None:
    first = _read(tmp_path, LEGAL)
    second = _read(
        tmp_path,
        "threats: [{norm: linf, eps: [8/255]}]\nmodels:\n- ref: bundled:digits-vgg-robust\ndataset: digits\nname: a\n",
    )
    assert first.canonical() == second.canonical()


def test_patterns_expand_to_bundled_models(tmp_path: Path) -> None:
    def refs(pattern: str) -> list[str]:
        return [cell.ref for cell in expand(_read(tmp_path, LEGAL.replace("bundled:digits-vgg-robust", pattern)))]

    assert refs("'bundled:digits-vgg-*'") == [
        f"bundled:digits-vgg-{level}" for level in ("robust", "robust-quarter", "standard")
    ]
    assert len(refs("'bundled:*'")) >= 12
    assert refs("'timm:resnet*'") == ["timm:resnet*"]  # only what is bundled can be listed cheaply
    with pytest.raises(UnknownNameError, match=r"unknown bundled pattern 'digit_\*'"):
        refs("'bundled:digit_*'")


def test_the_default_benchmark() -> None:
    made = expand(read_config(ROOT / "benchmark.yaml"))
    models, estimators = {cell.ref for cell in made}, {cell.settings.estimator.name for cell in made}
    assert len(models) >= 12
    assert len(estimators) >= 2
    assert (
        len({(cell.ref, cell.settings.estimator.name) for cell in made}) == len(made) == len(models) * len(estimators)
    )
    assert {cell.threat for cell in made} == {Linf(0.2)}


@pytest.mark.parametrize(
    ("written", "name"),
    [("smoke", "ce-10+margin-10"), ("{tier: audit}", AUDIT.name), ("{steps: 3, restarts: 2}", "ce-3x2+margin-3x2")],
)
def test_an_attack_is_a_tier_or_has_own_steps(tmp_path: Path, written: str, name: str) -> None:
    assert _read(tmp_path, f"{LEGAL}attack: {written}\n").settings()[0].attack.name == name


def test_the_default_attack_is_the_audit_tier(tmp_path: Path) -> None:
    assert _read(tmp_path, LEGAL).settings()[0].attack == AUDIT


def test_a_tier_with_own_steps_and_an_unknown_tier_are_refused(tmp_path: Path) -> None:
    (fault,) = _faults(tmp_path, f"{LEGAL}attack: {{tier: audit, steps: 3}}\n")
    assert "steps and a tier exclude each other" in fault
    (fault,) = _faults(tmp_path, f"{LEGAL}attack: audti\n")
    assert "unknown tier 'audti'; did you mean 'audit'" in fault
