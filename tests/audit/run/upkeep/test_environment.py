"""The doctor: what is missing is bad, what is optional a note, and a folder is tried, not asked."""

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from audit.run.upkeep import environment as health
from audit.run.upkeep.environment import BAD, NOTE, OK, Finding, examine, judge
from reports.cli import main


@pytest.mark.parametrize(
    ("name", "found", "wanted", "extra", "state"),
    [
        ("click", "8.3", "click>=8.2", "", OK),
        ("click", "8.1", "click>=8.2", "", BAD),
        ("click", None, "click>=8.2", "", BAD),
        ("ray", None, "ray>=2.40", "ray", NOTE),
        ("torch", "2.9.1", "torch", "", BAD),
        ("torch", "2.10.0+cu128", "torch>=2.10", "", OK),
        ("setuptools", "81.0", "setuptools", "", BAD),
        ("huggingface-hub", "2.1", "huggingface-hub", "", BAD),
    ],
)
def test_packages_are_judged(name: str, found: str | None, wanted: str, extra: str, state: str) -> None:
    assert judge(name, found, Requirement(wanted), extra).state == state


def test_what_is_optional_names_its_extra() -> None:
    assert judge("ray", None, Requirement("ray"), "ray").found == "not installed; rvaudit[ray]"


def test_this_machine_can_run_audits(tmp_path: Path) -> None:
    found = {finding.what: finding for finding in examine(tmp_path / "new", tmp_path)}
    assert {found[name].state for name in ("python", "torch", "pydantic", "safetensors")} == {OK}
    assert found["cache folder"].state in (OK, NOTE)
    assert (tmp_path / "new").is_dir()
    assert "pytest" not in found


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = examine(tmp_path / "file" / "below", tmp_path)
    (cache,) = [finding for finding in found if finding.what == "cache folder"]
    assert cache.state == BAD
    assert "cannot be written" in cache.found


def test_the_command_answers_3_where_something_is_bad(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "_packages", lambda: [])
    assert main(["doctor", "--json"]) == 0
    assert {"what", "state", "found"} == set(json.loads(capsys.readouterr().out)[0])
    monkeypatch.setattr(health, "_packages", lambda: [Finding("torch", BAD, "gone")])
    assert main(["doctor"]) == 3
    assert "gone" in capsys.readouterr().out
