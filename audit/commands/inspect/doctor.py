"""The command `doctor`: check the installation and the machine."""

import json
from pathlib import Path

import click

from audit.commands.options import json_option


@click.command("doctor")
@json_option("one JSON array")
def doctor_command(as_json: bool) -> int:
    """Check this machine: versions, devices, the cache folder, free disk space, optional packages.

    Exit code 3 where something is missing that every run needs.

    Example: rvaudit doctor --json
    """
    from audit.commands.display import print_table
    from audit.run.upkeep.environment import BAD, check_environment
    from model_zoo.model_types import default_cache

    found = check_environment(default_cache(), Path.cwd())
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in found]))
    else:
        print_table(("what", "state", "found"), found)
    return 3 if any(finding.state == BAD for finding in found) else 0
