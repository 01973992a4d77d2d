# Everything a newcomer needs: Python 3.10 or newer, make, and the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

SEED ?= 1
STEPS ?= 100000

.DEFAULT_GOAL := help
.PHONY: help demo test lint simulate crash bench clean

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(INSTALLED)  ## see it work: a stand-in autoscaler, a worker, a client, a consumer, and the log
	$(BIN)/nullworker demo

test: $(INSTALLED)  ## run all tests
	$(BIN)/python -m pytest

simulate: $(INSTALLED)  ## play STEPS reservations from SEED on, with crashes and faults, in simulated time
	$(BIN)/python tests/simulation.py --seed $(SEED) --steps $(STEPS)

lint: $(INSTALLED)  ## ruff, mypy strict, import ranks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

clean:  ## remove what make has made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
