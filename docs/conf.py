"""Settings of Sphinx. Its source folder is the root of the repository: relative links work here and on a code host.

Build with `make docs`, or `sphinx-build -W -c docs . build/docs`.
"""

import re
from importlib.metadata import version as installed

import click
from sphinx.application import Sphinx

from reports.cli import cli

project = "rvaudit"
author = "the rvaudit authors"
release = version = installed("rvaudit")

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "benchmarks/README.md",
    "docs/**",
]
exclude_patterns = ["docs/_site", "docs/notebooks/.ipynb_checkpoints", ".venv", ".bench-venv", "build", "runs"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
suppress_warnings = ["myst.header"]  # generated tables start at the second level

# links to headings as a code host makes them
myst_heading_anchors = 4

# docstrings are plain text with code in single backticks
default_role = "code"
smartquotes = False  # -- begins an option
autodoc_member_order = "alphabetical"
autodoc_typehints = "none"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"rvaudit {release}"
html_static_path: list[str] = []
html_show_sphinx = False
html_copy_source = False
# the site opens at its root, whose document lies in docs/
templates_path = ["_site"]
html_additional_pages = {"index": "to_start.html"}


def escape_marks(*arguments: object) -> None:
    """Escape bars (norms) and single asterisks (globs) in plain text, which would be markup; not inside code."""
    lines = arguments[-1]
    assert isinstance(lines, list)
    lines[:] = ["".join(_escaped(part) for part in re.split(r"(`[^`]*`)", line)) for line in lines]


def _escaped(part: str) -> str:
    return part if part.startswith("`") else re.sub(r"\||(?<!\*)\*(?!\*)", r"\\\g<0>", part)


def mount_all(group: click.Group) -> None:
    """Import the commands of lazy groups, so that sphinx-click sees all of them."""
    context = click.Context(group)
    group.commands.update({name: group.get_command(context, name) for name in group.list_commands(context)})
    for command in group.commands.values():
        if isinstance(command, click.Group):
            mount_all(command)


def setup(app: Sphinx) -> None:
    """Mount every command, and connect what changes docstrings."""
    mount_all(cli)
    for event in ("autodoc-process-docstring", "sphinx-click-process-description", "sphinx-click-process-options"):
        app.connect(event, escape_marks)
