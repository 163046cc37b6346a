"""Environment checks: missing packages are bad, optional ones a note, and folders are tested by writing."""

import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from audit.run.upkeep import environment as health
from audit.run.upkeep.environment import BAD, NOTE, OK, EnvironmentCheck, check_environment, check_package
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
def test_package_versions_are_checked(name: str, found: str | None, wanted: str, extra: str, state: str) -> None:
    assert check_package(name, found, Requirement(wanted), extra).state == state


def test_missing_optional_packages_name_their_extra() -> None:
    assert check_package("ray", None, Requirement("ray"), "ray").found == "not installed; rvaudit[ray]"


def test_this_environment_passes(tmp_path: Path) -> None:
    found = {finding.what: finding for finding in check_environment(tmp_path / "new", tmp_path)}
    assert {found[name].state for name in ("python", "torch", "pydantic", "safetensors")} == {OK}
    assert found["cache folder"].state in (OK, NOTE)
    assert (tmp_path / "new").is_dir()
    assert "pytest" not in found


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = check_environment(tmp_path / "file" / "below", tmp_path)
    (cache,) = [finding for finding in found if finding.what == "cache folder"]
    assert cache.state == BAD
    assert "cannot be written" in cache.found


def test_the_command_exits_with_3_if_a_check_is_bad(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "_packages", lambda: [])
    assert main(["doctor", "--json"]) == 0
    assert {"what", "state", "found"} == set(json.loads(capsys.readouterr().out)[0])
    monkeypatch.setattr(health, "_packages", lambda: [EnvironmentCheck("torch", BAD, "gone")])
    assert main(["doctor"]) == 3
    assert "gone" in capsys.readouterr().out
