"""`import rvaudit`: the public names of the three packages, lazily, and the command as a module."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import audit
import model_zoo
import reports
import rvaudit


@pytest.mark.parametrize("package", [audit, model_zoo, reports], ids=lambda package: package.__name__)
def test_every_public_name_is_a_name_of_the_front(package):
    for name in package.__all__:
        assert getattr(rvaudit, name) is getattr(package, name)
    assert set(package.__all__) <= set(rvaudit.__all__) <= set(dir(rvaudit))


def test_no_two_packages_share_a_name():
    names = [name for package in (audit, model_zoo, reports) for name in package.__all__]
    assert sorted(names) == rvaudit.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'rvaudit' has no attribute 'nothing'"):
        _ = rvaudit.nothing


def test_the_front_imports_no_torch_and_is_the_command(tmp_path):
    code = "import rvaudit, sys; print(rvaudit.__version__, 'torch' in sys.modules, 'pandas' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [version("rvaudit"), "False", "False"]
    words = [sys.executable, "-m", "rvaudit", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert version("rvaudit") in done.stdout
