# Needs Python 3.10 or newer, make, and the package registries. CONTRIBUTING.md describes each target.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
SEED ?= 1
STEPS ?= 100000
KILLS ?= 300
CUTS ?= 500
MINUTES ?= 60
ROUNDS ?= 2
# six on two cores, since most tests wait most of the time; a file stays together with its servers
PARALLEL := -n 6 --dist loadfile --no-loadscope-reorder

# else each process of the tests compiles them anew
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install tools demo test quick lint oldest stress simulate days cuts crowds crash kills outages fleet consumers caller soak bench dist audit pythons clean

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(VENV)/.installed  ## create .venv with everything that is needed

demo: install  ## run the demo: a fleet of workers on this machine, without an account
	$(BIN)/nullworker demo

test: tools install  ## run all tests; installs the servers they need first, unless TOOLS=no
	$(BIN)/python -m pytest $(PARALLEL)

quick: install  ## run the tests that start no other programs, in seconds
	$(BIN)/python -m pytest $(PARALLEL) -q -m "not process and not slow" tests/unit tests/eventlog

lint: install  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

oldest: $(VENV)-3.10/.installed  ## run the tests on Python 3.10, the version in Vast's template
	$(VENV)-3.10/bin/python -m pytest $(PARALLEL) -m "not slow"

pythons: install  ## run the core's tests on each Python from 3.10 to 3.13 that is on this machine
	@.ci/pythons tests/unit tests/eventlog

dist: install  ## build sdist and wheel, run the demo from the wheel in an empty environment, write an SBOM
	@.ci/dist $(BIN)/python

audit: install  ## ask the advisory database of PyPI about everything that is installed
	$(BIN)/pip-audit --local --skip-editable

stress: simulate days cuts crowds crash kills outages fleet consumers caller soak  ## run all of these, one after the other, which takes hours

simulate: install  ## simulate STEPS reservations from SEED on, with crashes and faults
	$(BIN)/python -m stress.simulation --seed $(SEED) --steps $(STEPS)

days: install  ## play days of queues through the dispatcher's decision and through KEDA's, in simulated time
	$(BIN)/python -m stress.dispatch_simulation

kills: install  ## drain a queue while dispatcher, workers and consumers are killed, and check that each job is done once
	$(BIN)/python -m stress.dispatch_kills

outages: install  ## drain a queue while its server, the autoscaler and the disk fail, and check that nothing is opened meanwhile
	$(BIN)/python -m stress.dispatch_outages

fleet: install  ## destroy workers whose events go to a collector that fails, and check what outlives them
	$(BIN)/python -m stress.fleet

cuts: install  ## cut the power CUTS times on a disk that forgets what was not synced, and check the log
	$(BIN)/python -m stress.power_cut --cuts $(CUTS)

crowds: install  ## let thousands of strangers who never send a whole request come to a worker, with TLS and without
	$(BIN)/python -m stress.crowds
	$(BIN)/python -m stress.crowds --tls

consumers: install  ## put each example through each fault, and kill an attached consumer KILLS times
	$(BIN)/python -m stress.consumers matrix
	$(BIN)/python -m stress.consumers kills --kills $(KILLS)

crash: install  ## kill a worker KILLS times under load, and check that nothing is lost
	$(BIN)/python -m stress.crash --kills $(KILLS)

soak: install  ## run a worker for MINUTES under mixed load, and check that nothing grows or is lost
	$(BIN)/python -m stress.soak --minutes $(MINUTES)

bench: install  ## print the tables of docs/performance.md: beside the official SDK, what a user feels, growth
	$(BIN)/python -m bench --rounds $(ROUNDS)

tools:  # servers and programs that the tests start: Debian's packages, which are named before they are installed
	@.ci/tools

$(VENV)/.installed: pyproject.toml
	@.ci/venv $(VENV) $(PYTHON)

# another version of Python, given as PYTHON=..., makes the environment anew
VERSION_OF = $(if $(wildcard $(1)),$(shell $(1) -c 'import sys; print(sys.version_info[1])'))
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
ifneq ($(call VERSION_OF,$(shell command -v $(PYTHON))),$(call VERSION_OF,$(BIN)/python))
.PHONY: $(VENV)/.installed
endif
endif

$(VENV)-3.10/.installed: pyproject.toml $(VENV)/.installed
	@.ci/venv $(VENV)-3.10 $$(.ci/find-python 3.10)

clean:  ## remove what make has created
	rm -rf $(VENV) $(VENV)-3.* dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
