"""CI prints every skipped test and fails for one that is not expected; Chromium's absence has a reason."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parents[1] / ".ci"
NO_BROWSER = "no Chromium on the path, and RVAUDIT_CHROMIUM names none"


def verdict(folder, reasons, expected="", chromium="Chromium: /usr/bin/chromium\n"):
    """Return exit code and output for a run that skipped tests for some reasons."""
    cases = "".join(
        f'<testcase classname="t" name="n{i}"><skipped message="{r}"/></testcase>' for i, r in enumerate(reasons)
    )
    files = {"tests.xml": f"<testsuites><testsuite>{cases}<testcase name='ran'/></testsuite></testsuites>",
             "expected": expected, "chromium": chromium}  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    done = subprocess.run(
        [sys.executable, CI / "skips.py", *(folder / name for name in files)], capture_output=True, text=True
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("reasons", "expected", "chromium", "code"),
    [
        ([], "", "Chromium: x", 0),
        (["needs the moon"], "", "Chromium: x", 1),
        (["needs the moon"], "# a comment\nmoon\n", "Chromium: x", 0),
        (["needs the moon", "needs the sun"], "moon\n", "Chromium: x", 1),
        ([NO_BROWSER], "", "Chromium: x", 1),
        ([NO_BROWSER], "", "no Chromium: this machine has no apt-get", 0),
        (["needs the moon"], "", "no Chromium: this machine has no apt-get", 1),
    ],
)
def test_a_skip_that_is_not_expected_fails(tmp_path, reasons, expected, chromium, code):
    found, output = verdict(tmp_path, reasons, expected, chromium)
    assert found == code
    assert all(f"n{number}: {reason}" in output for number, reason in enumerate(reasons))
    assert f"{len(reasons)} tests skipped" in output


def install(folder, **programs):
    """Return what the installation prints on a machine with some programs, scripts in sh, and a few common tools."""
    for tool in ("chmod", "env", "id", "mktemp", "grep", "tail"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, script in programs.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    environment = {"PATH": str(folder), "RVAUDIT_CHROMIUM": "", "TMPDIR": str(folder)}
    command = ["/bin/bash", CI / "install-chromium"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


SUDO = 'shift\nexec "$@"'  # without its option -n


def test_a_machine_without_apt_says_why_it_has_no_browser(tmp_path):
    assert install(tmp_path).startswith("no Chromium: this machine has no apt-get")


def test_a_browser_that_is_there_is_not_installed_again(tmp_path):
    assert install(tmp_path, chromium="", apt_get="exit 1") == f"Chromium: {tmp_path}/chromium\n"


def test_apt_installs_a_browser(tmp_path):
    script = f"case $* in *install*) : > {tmp_path}/chromium; chmod +x {tmp_path}/chromium;; esac"
    shown = install(tmp_path, apt_get=script, sudo=SUDO)
    assert shown == f"Chromium: installed by apt-get, {tmp_path}/chromium\n"


@pytest.mark.parametrize("step", ["update", "install"])
def test_a_failure_of_apt_is_the_reason(tmp_path, step):
    script = f"case $* in *{step}*) echo W: noise; echo 'E: no route to {step}' >&2; exit 100;; esac"
    assert install(tmp_path, apt_get=script, sudo=SUDO) == f"no Chromium: apt-get failed: E: no route to {step}\n"


def test_a_test_that_fails_as_marked_is_not_skipped(tmp_path):
    case = '<testcase classname="t" name="n"><skipped type="pytest.xfail" message="keeps its distance"/></testcase>'
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{case}</testsuite></testsuites>")
    (tmp_path / "expected").write_text("")
    (tmp_path / "chromium").write_text("Chromium: x")
    files = [tmp_path / name for name in ("tests.xml", "expected", "chromium")]
    done = subprocess.run([sys.executable, CI / "skips.py", *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 tests skipped, 0 of them not expected\n")
