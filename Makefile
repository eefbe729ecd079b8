# Each target builds .venv through constraints.txt when it is missing or older than what it is made from.
#
#   make demo     plan, invert, query and report on the bundled sample shard
#   make test     the tests but the slow ones (ARGS="-m slow"); ARGS are passed on: make test ARGS="tests/tasks -x"
#   make chaos    trials of kills and faults: make chaos ARGS="--trials 300 --seed 1 --out chaos.json"
#   make test-prefect  nights against real Prefect servers that are killed (SQLite, PostgreSQL)
#   make test-s3  the tests of storage and runs against Ceph's gateway, where its programs are installed
#   make lint     ruff, codespell, pyright
#   make fuzz     broken files for every reader of foreign bytes, led by coverage: make fuzz ARGS=20000
#   make bench    the figures of the README
#   make bench-gpu  speed of synthesis, searches and encoders on a GPU, else on the CPU
#
# Settings: JOBS (processes that share the tests, 2), PYTHON (an interpreter, 3.11 or newer), VENV (where to install), TORCH_INDEX (URL of an index
# with PyTorch's CPU wheels, for a machine without a GPU whose own index has only the CUDA build).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
ARGS ?=
JOBS ?= 2
TORCH_INDEX ?=
# The pins were exercised on 3.11, so it is tried first. The version is asked for, not read from the
# name: a pyenv shim called python3.12 may exist and still refuse to start.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)

# Nothing here reports usage to anybody.
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export PYRIGHT_PYTHON_IGNORE_WARNINGS ?= 1

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: help venv demo test chaos test-prefect test-s3 fuzz lint format bench bench-gpu clean

help:
	@sed -n 's/^#   make/  make/p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or newer on PATH; install one or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "==> creating $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "make: $(PYTHON) cannot create $(VENV); on Debian and Ubuntu install python3-venv" >&2; exit 1; }; fi
	@echo "==> installing style-refinery[dev] through constraints.txt (about 2 minutes the first time)"
	@$(PIP_INSTALL) --upgrade pip
	@$(PIP_INSTALL) --build-constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	@$(BIN)/python -m pip check
	@touch $@

demo: $(STAMP)
	@$(BIN)/refinery demo $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow" $(ARGS)

chaos: $(STAMP)
	@$(BIN)/python -m tests.chaos $(ARGS)

test-prefect: $(STAMP)
	@REFINERY_SOAK=1 $(BIN)/python -m pytest tests/deploy/test_prefect_deployment.py tests/services/test_nights.py $(ARGS)

test-s3: $(STAMP)
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup tests/services/test_s3.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: $(STAMP)
	@$(PIP_INSTALL) --editable '.[fuzz]'
	@$(BIN)/python -m tests.fuzz_guided $(or $(ARGS),10000)

bench: $(STAMP)
	@$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: $(STAMP)
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info build dist
