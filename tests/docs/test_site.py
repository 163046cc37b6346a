"""The documentation names every verb, every page, every public name, and every column that holds a result."""

import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from reports.cli import cli
from reports.tables.columns import KINDS

DOCS = Path(__file__).resolve().parents[2] / "docs"
REFERENCE = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
# what the table of metrics says of each: its name, definition, assumptions, direction of error and cost
METRIC = ("column", "definition", "assumes", "errs", "cost")


def page(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("column", sorted({re.sub("_(se|low|high)$", "", name) for name in KINDS}))
def test_every_column_that_holds_a_result_is_defined(column):
    rows = [line for line in page("numbers.md").splitlines() if re.match(rf"\| (`\w+`, )*`{column}`[ ,]", line)]
    assert any(len(re.split(r"(?<!\\)\|", row)) == len(["", *METRIC, ""]) for row in rows)


@pytest.mark.parametrize("verb", cli.list_commands(click.Context(cli)))
def test_every_verb_is_on_a_page(verb):
    pages = [path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")]
    assert any(f"rvaudit {verb}" in text for text in pages) or f"| `{verb} " in page("commands.md")


@pytest.mark.parametrize("package", ["audit", "model_zoo", "reports"])
def test_the_reference_is_made_from_the_public_names(package):
    assert f".. automodule:: {package}\n" in REFERENCE
    assert set(import_module(package).__all__) <= set(dir(import_module(package)))


def test_every_page_is_in_the_table_of_contents():
    entries = re.findall(
        r"^(?:.*<)?([\w./-]+?)>?$", "\n".join(re.findall(r"```{toctree}\n(.*?)```", page("index.md"), re.S)), re.M
    )
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")} - {"index"}
    assert pages <= set(entries), pages - set(entries)
