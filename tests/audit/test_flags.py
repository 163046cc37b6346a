"""Every flag has a code, every code a meaning, and every code is produced somewhere."""

import ast
import re
from pathlib import Path

import pytest

from audit.flags import MEANINGS, UNRANKED, FlagCode, code_of, flag

ROOT = Path(__file__).parents[2]
SOURCES = [path for package in ("audit", "reports") for path in sorted((ROOT / package).rglob("*.py"))]


def produced(path):
    """Yield the codes that calls `flag(FlagCode.X, ...)` of a file pass."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flag":
            code = node.args[0]
            assert isinstance(code, ast.Attribute), f"{path}:{node.lineno}: flag() takes a member of FlagCode"
            yield FlagCode[code.attr]


def test_every_code_has_a_meaning_in_one_table():
    assert set(MEANINGS) == set(FlagCode)
    assert all(meaning and not meaning.endswith(".") for meaning in MEANINGS.values())
    assert set(FlagCode) > UNRANKED


def test_every_code_is_produced_and_no_other():
    assert {code for path in SOURCES for code in produced(path)} == set(FlagCode)


PRODUCERS = [path for path in SOURCES if not {"figures", "page"} & set(path.parts)]  # those label models, not records


@pytest.mark.parametrize("path", PRODUCERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_spells_a_flag_by_hand(path):
    if path.name == "flags.py":
        return
    spelled = re.compile(rf"f?[\"'](?:{'|'.join(FlagCode)}): ")
    lines = path.read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if ">>>" not in line and not line.strip().startswith("(")]  # no doctests
    assert not [line for line in code if spelled.search(line)]


@pytest.mark.parametrize("code", FlagCode)
def test_a_flag_keeps_its_code(code):
    assert code_of(flag(code, "worst_nats 0.30: too low")) is code


def test_a_flag_of_another_version_has_no_code():
    assert code_of("measured elsewhere: 0.3") is None
    assert code_of("") is None
