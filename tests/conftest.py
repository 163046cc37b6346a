import os

import pytest
from hypothesis import settings

# two workers on two cores: a thread each, or they fight over them. Before torch is imported, or it does not count
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every machine, no time limit on a loaded one, nothing written beside the tests
settings.register_profile("rvaudit", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rvaudit")


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory, monkeypatch):
    """One cache for all tests and workers, away from the user's: brief calibrations are computed once."""
    monkeypatch.setenv("RVAUDIT_CACHE", str(tmp_path_factory.getbasetemp().parent / "rvaudit-cache"))
