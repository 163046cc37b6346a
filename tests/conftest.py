import os

from hypothesis import settings

# two workers on two cores: a thread each, or they fight over them. Before torch is imported, or it does not count
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the same examples on every machine, no time limit on a loaded one, nothing written beside the tests
settings.register_profile("rvaudit", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rvaudit")
