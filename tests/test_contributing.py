"""The map in CONTRIBUTING.md names every file of every room."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(folder.name for folder in (ROOT / "audit").iterdir() if (folder / "__init__.py").exists())
MAP = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_names_every_file_of_a_room(room):
    (row,) = re.findall(rf"^\| `{room}/` \| (.*) \|$", MAP, re.M)
    named = set(row.rpartition("Files: ")[2].split(", "))
    folder = ROOT / "audit" / room
    files = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.py")}
    assert named == {name for name in files if not name.endswith("__init__")}
