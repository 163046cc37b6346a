"""The tables of commands and studies: every entry can be imported, and help imports no torch."""

import subprocess
import sys
from dataclasses import fields
from importlib import import_module

import click
import pytest

from audit.adversary.threat import Linf
from audit.commands.options import SourceOptions, source_options
from audit.commands.reproduce.group import STUDIES
from audit.commands.table import COMMANDS
from audit.errors import UnknownNameError
from audit.studies.attack_report import AttackRequest

ENTRIES = [*COMMANDS.items(), *STUDIES.items()]


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_every_entry_names_its_command(name: str, entry: tuple[str, str]) -> None:
    module, line = entry
    command = getattr(import_module(module), f"{name.replace('-', '_').replace('.', '_')}_command")
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help
    assert line.endswith(".")


def test_help_of_commands_imports_no_torch() -> None:
    code = (
        "import sys; from reports.cli import main\n"
        "from audit.commands.table import COMMANDS\n"
        "from audit.commands.reproduce.group import STUDIES\n"
        "for words in [[name] for name in COMMANDS] + [['reproduce', name] for name in STUDIES]:\n"
        "    assert main([*words, '--help']) == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_group_of_options_is_one_typed_argument() -> None:
    @click.command()
    @source_options
    def command(sources: SourceOptions) -> SourceOptions:
        return sources

    assert [option.name for option in command.params] == [
        field.name for field in fields(SourceOptions) if field.name != "base"
    ]
    assert command.main([], standalone_mode=False) == SourceOptions()
    assert command.main(["--offline"], standalone_mode=False) == SourceOptions(offline=True)


def test_unknown_attacks_and_tiers_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown attack tier 'smok'; did you mean 'smoke'"):
        AttackRequest("m", "d", Linf(0.1), tier="smok")
    with pytest.raises(UnknownNameError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        AttackRequest("m", "d", Linf(0.1), attacks=("pdg",))
