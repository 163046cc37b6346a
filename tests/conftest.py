import gc
import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# two workers on two cores: a thread each, or they fight over them. Before torch is imported, or it does not count
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every machine, no time limit on a loaded one, nothing written beside the tests
settings.register_profile("rvaudit", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rvaudit")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector off modules and tests, which stay: every run of a benchmark calls it in full."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests and workers, away from the user's: brief calibrations are computed once."""
    monkeypatch.setenv("RVAUDIT_CACHE", str(tmp_path_factory.getbasetemp().parent / "rvaudit-cache"))
