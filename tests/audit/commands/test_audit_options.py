"""`rvaudit audit` of several models: globs, attack, certificate, forecast, exit codes for pipelines, reruns; help."""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import click
import pytest

from audit.commands.audit import AuditRequest
from audit.commands.reproduce.group import STUDIES
from audit.commands.table import COMMANDS
from audit.config.yaml_source import read_config
from audit.errors import UnknownNameError
from audit.records import RecordStore
from reports.cli import cli, main

GLOB, REF = "bundled:digits-vgg-robust*", "bundled:digits-vgg-robust"
QUICK = ("--dataset", "digits", "--eps", "0", "--images", "60", "--seeds", "1", "--estimator", "label-level")


def test_several_models_are_one_run_whose_rerun_has_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for slow in ("write_figures", "write_html"):  # half of the time
        monkeypatch.setattr(f"audit.commands.execution.{slow}", lambda folder: [folder])
    words = [
        "audit",
        GLOB,
        REF,
        *QUICK,
        "--attack",
        "smoke",
        "--balanced",
        "--jobs",
        "1",
    ]
    assert main([*words, "--seed", "7", "--fail-under", "0.5"]) == 0
    captured = capsys.readouterr()
    assert "nothing was to do" not in captured.err
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"digits-vgg-robust-and-1-more-[0-9a-f]{8}", folder.name)
    assert not Path(f"runs/{folder.name}/cells/images").exists()
    records = RecordStore(folder).present()
    assert {record.model for record in records} == {"digits-vgg-robust", "digits-vgg-robust-quarter"}
    assert {record.attack for record in records} == {"ce-10+margin-10"}
    assert [record.details["per_seed"][0]["seed"] for record in records] == [7] * 2
    config = read_config(folder / "benchmark.yaml")
    assert (config.balanced, config.seeds) == (True, (7,))
    order = [line.split()[0] for line in captured.out.splitlines() if " label-level " in line]
    assert len(order) == 2
    assert main([*words, "--seed", "7", "--fail-under", "1"]) == 1
    captured = capsys.readouterr()
    assert f"Note: nothing was to do: {folder} holds all 2 cells already" in captured.err
    assert "(linf 0) is below --fail-under 1" in captured.err
    assert main([*words, "--seed", "7", "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cells"] == {"done": 2, "failed": 0, "to do": 0}


def test_options_become_keys_of_a_benchmark() -> None:
    plain = AuditRequest(
        "digits", ("logits",), ("8/255", "0.1"), "linf", 60, False, 3, 4, ("mine",), "audit", False, "flatten", "model",
        False, False,
    )  # fmt: skip
    config = plain.benchmark(["bundled:digits-vgg-*", REF])
    assert [model.ref for model in config.models] == [f"{REF}-quarter".replace("-robust-quarter", end) for end in (
        "-robust", "-robust-quarter", "-standard")]  # fmt: skip
    assert (config.name, config.seeds, config.certificate) == ("digits-vgg-and-1-more", (4, 5, 6), False)
    assert config.canonical() == plain.benchmark(["bundled:digits-vgg-*", REF, REF]).canonical().replace(
        "2-more", "1-more"
    )
    changed = replace(plain, certificate=True, attack="smoke", balanced=True).benchmark([REF])
    assert (changed.certificate, changed.attack.tier, changed.balanced) == (True, "smoke", True)
    assert changed.settings()[0].certificate
    assert "balanced" not in plain.benchmark([REF]).canonical()  # the stamps of earlier run folders stay valid
    with pytest.raises(UnknownNameError, match=r"unknown bundled pattern 'digit_\*'"):
        plain.benchmark(["bundled:digit_*"])


def test_a_forecast_writes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", REF, "--dataset", "digits", "--eps", "0", "--images", "61", "--balanced"]) == 2
    assert "61 images cannot be shared equally by 10 classes" in capsys.readouterr().err
    assert list(Path("runs").iterdir()) == []


def _commands() -> list[tuple[str, click.Command]]:
    found = [(name, getattr(import_module(home), f"{name.replace('-', '_')}_command"))
             for name, (home, _) in COMMANDS.items()]  # fmt: skip
    found += [(f"reproduce {name}", getattr(import_module(home), f"{re.sub('[-.]', '_', name)}_command"))
              for name, (home, _) in STUDIES.items()]  # fmt: skip
    return [*found, *((name, command) for name, command in cli.commands.items())]


@pytest.mark.parametrize(("name", "command"), _commands(), ids=[name for name, _ in _commands()])
def test_every_help_text_has_one_example_with_legal_options(name: str, command: click.Command) -> None:
    (example,) = re.findall(r"Example: rvaudit (.*)", command.help or "")
    assert example.startswith(name)
    spelled = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if isinstance(command, click.Group):
        return
    assert set(re.findall(r"--[a-z-]+", example)) <= spelled
    arguments = [word for word in example.removeprefix(name).split() if not word.startswith("--")]
    required = [p for p in command.params if isinstance(p, click.Argument) and p.required]
    assert len(arguments) >= len(required)


SPELLINGS = {
    "--layer": {"audit", "certify", "features", "saliency"},
    "--seed": {"audit", "attack", "certify", "features", "saliency", "train"},
    "--attack": {"audit", "attack", "certify"},
    "--tier": {"audit", "attack", "certify"},
    "--balanced": {"audit", "attack", "certify", "features", "saliency", "verify"},
    "--device": {"audit", "attack", "certify", "features", "saliency", "verify", "run", "plan", "validate", "layers"},
    "--offline": {"audit", "attack", "certify", "features", "saliency", "verify", "run", "plan", "validate", "layers"},
    "--images": {"audit", "attack", "certify", "features", "saliency", "verify", "train", "reproduce guess-first"},
    "--fail-under": {"audit", "attack", "run"},
    "--json": {"leaderboard", "figures", "report", *(name for name in COMMANDS if name != "reproduce")},
}


@pytest.mark.parametrize("option", SPELLINGS)
def test_an_option_has_one_spelling(option: str) -> None:
    has = {name for name, command in _commands() if any(option in each.opts for each in command.params)}
    assert SPELLINGS[option] <= has


def test_models_are_filtered_by_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "L2", "cifar10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found
    assert {(entry["dataset"], entry["trained_norm"] or "l2") for entry in found} == {("cifar10", "l2")}
    assert main(["models", "vgg", "ROBUST", "--source", "bundled", "--json"]) == 0
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert names == {"digits-vgg-robust", "digits-vgg-robust-quarter"}
    assert main(["models", "no-such-model"]) == 0
    assert "0 models" in capsys.readouterr().err
