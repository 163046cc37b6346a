# Two thin targets: `make run` and `make test` create .venv, install the project and do what the README shows.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

DATA ?= ../shared/data/cifar10-test-a.parquet
CHECKPOINTS ?= ../shared/checkpoints

.PHONY: run test lint docs figures bench clean
.DELETE_ON_ERROR:

run: $(VENV)/.installed
	$(BIN)/rvaudit run benchmark.yaml

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# the site, in build/docs; every warning is an error, and nothing is fetched
docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -c docs . build/docs

# every figure of the docs, from the rows committed beside it
figures: $(VENV)/.installed
	$(BIN)/rvaudit figures docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[robustbench]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.installed

# other packages to measure against, in an environment of their own: torchattacks overwrites robustbench
.bench-venv/.installed: benchmarks/requirements.txt
	$(PYTHON) -m venv .bench-venv || python3 -m venv .bench-venv
	.bench-venv/bin/python -m pip install --quiet -r $<
	touch $@

# rows of what searches, epochs and audits cost, and their pictures; only attacks.py needs the other packages
RESULTS := benchmarks/results
THIRD_PARTY = --data $(DATA) --checkpoints $(CHECKPOINTS)

bench: export OMP_NUM_THREADS = 1
bench: .bench-venv/.installed $(VENV)/.installed
	PYTHONPATH=. .bench-venv/bin/python benchmarks/attacks.py $(THIRD_PARTY) --out $(RESULTS)/attacks.csv
	$(BIN)/python benchmarks/epoch.py $(THIRD_PARTY) --out $(RESULTS)/epoch.csv
	$(BIN)/python benchmarks/convergence.py $(THIRD_PARTY) --out $(RESULTS)/convergence.csv
	$(BIN)/python benchmarks/mixture.py --out $(RESULTS)/mixture.csv
	$(BIN)/python benchmarks/following.py --out $(RESULTS)/following.csv
	$(BIN)/python benchmarks/learning.py --out $(RESULTS)/learning.csv
	$(BIN)/python benchmarks/scaling.py --data parquet:$(DATA) --checkpoints $(CHECKPOINTS) --out $(RESULTS)/scaling.csv
	$(BIN)/rvaudit figures docs --only speed

clean:
	rm -rf $(VENV) .bench-venv runs build
