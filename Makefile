# make demo   fit the bundled blood cells and write a report
# make test   run the tests
# make lint, make types, make format   what else a change should pass
# make reliability   the long reliability tests (up to an hour); writes docs/reliability.md
# make benchmark   compare all methods (up to 90 minutes); DATA is the folder with the data sets

PYTHON ?= python3
VENV ?= .venv
DEMO ?= out/demo
DATA ?= ../shared/data

BIN := $(VENV)/bin
# `-c constraints.txt` everywhere, so that no later install changes torch
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint types format reliability benchmark
.DELETE_ON_ERROR:

demo: $(VENV)/.stamp-genejepa
	$(BIN)/genejepa fit data/pbmc3k.h5ad -o $(DEMO) --labels-key cell_type --overwrite
	@find $(DEMO) -name '*.html' -exec echo "Report: {}" \;

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reliability: $(VENV)/.stamp-dev
	$(BIN)/python benchmarks/reliability.py

# goes on where it was interrupted; scores, figure and document are written even if some jobs fail
benchmark: $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/suite.py --data $(DATA)

# dependency groups need pip 25.1
$(VENV)/.stamp-pip:
	@echo "Setting up $(VENV); the first time takes a few minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

# torch first: the largest part, and the version everything after it must keep
$(VENV)/.stamp-genejepa: $(VENV)/.stamp-pip pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-genejepa
	$(PIP) --group dev --group test
	touch $@
