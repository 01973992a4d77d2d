# Everything a newcomer needs: Python 3.10 or newer, make, and the package registries.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 1
STEPS ?= 100000
KILLS ?= 300
MINUTES ?= 60

.DEFAULT_GOAL := help
.PHONY: help install tools demo test quick lint oldest stress simulate days crash soak bench clean

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed  ## make a virtual environment with everything in it

demo: install  ## see it work: a fleet of workers on this machine, no account needed
	$(BIN)/nullworker demo

test: tools install  ## run all tests; what they need is installed first, or not with TOOLS=no
	$(BIN)/python -m pytest -n 3 --dist loadfile

quick: install  ## the tests that need no servers and no browser, in seconds: for the edit loop
	$(BIN)/python -m pytest -n 3 --dist loadfile -q tests/unit tests/eventlog

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

oldest: $(VENV)-3.10/.installed  ## run the core of the tests on Python 3.10, which Vast's template has
	$(VENV)-3.10/bin/python -m pytest -n 3 --dist loadfile -m "not slow"

stress: simulate days crash soak  ## what takes hours: simulation, kills, soak; the suite has a short form of each

simulate: install  ## play STEPS reservations from SEED on, with crashes and faults, in simulated time
	$(BIN)/python -m stress.simulation --seed $(SEED) --steps $(STEPS)

days: install  ## play days of queues through the dispatcher's decision and through KEDA's, in simulated time
	$(BIN)/python -m stress.dispatch_simulation

crash: install  ## kill a real worker KILLS times under load, and check that nothing is lost
	$(BIN)/python -m stress.crash --kills $(KILLS)

soak: install  ## run a worker for MINUTES under everything at once, and check that nothing grows or is lost
	$(BIN)/python -m stress.soak --minutes $(MINUTES)

bench: install  ## compare speed and memory with a worker on the official SDK
	$(BIN)/python -m bench

tools:  # servers and programs that the tests start: Debian's packages, which are named before they are installed
	@.ci/tools

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

$(VENV)-3.10/.installed: pyproject.toml $(VENV)/.installed
	$$(.ci/find-python 3.10) -m venv $(VENV)-3.10
	$(VENV)-3.10/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(VENV)-3.10/bin/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@

clean:  ## remove what make has made
	rm -rf $(VENV) $(VENV)-3.10 .mypy_cache .ruff_cache .pytest_cache .hypothesis
