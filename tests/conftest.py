from hypothesis import settings

# the same examples on every machine, no time limit on a loaded one, nothing written beside the tests
settings.register_profile("rvaudit", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("rvaudit")
