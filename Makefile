# Everything a developer, CI or a curious reader runs. `make` lists the targets.
#
#   DEMO=small        demo and bench on a small image (numpy and scipy, about 120 MB) instead of PyTorch
#   BENCH_ARGS="..."  options of e2e/bench.py, e.g. BENCH_ARGS="--parts warm --runs 5"
#   STARTUP_ARGS="..."  options of e2e/startup.py, e.g. STARTUP_ARGS="--workloads torch --runs 5"
#   TEST_ARGS="..."   options of pytest, e.g. TEST_ARGS="tests/imagefs -k blockmap"
#   TEST_PROCESSES=n  how many run tests at once; each may take 4 GB while it serves a model

SHELL := /bin/bash
# Thousands of interpreters are started here, and measured: with bytecode, as pip installs it, also where the
# environment asks for none.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEMO ?= torch
BENCH_ARGS ?=
STARTUP_ARGS ?=
TEST_ARGS ?=
TEST_PROCESSES ?= $(shell echo $$(($$(nproc) + 1)))

.DEFAULT_GOAL := help
.PHONY: help setup debian demo test soak check fmt bench benchrouter benchautoscale proto clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: debian $(STAMP) ## Install what is missing: Debian packages (as root) and .venv

debian:
	@deploy/setup-debian

# The interpreter is looked for when it is needed, because `debian` may only just have installed it.
$(STAMP): pyproject.toml | debian
	@python=""; for candidate in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "setup: no Python >= 3.11 with the venv module (Debian: python3-venv)" >&2; exit 1; fi; \
	[ -x $(PYTHON) ] || "$$python" -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup ## Start PyTorch from a registry at 1 Gbit/s: pulled, and lazily (DEMO=small: less to download)
	$(PYTHON) -m e2e.demo --image $(DEMO)

test: setup ## Run all tests but the soak ones, and report coverage
	@deploy/setup-debian tests
	$(PYTHON) -m coverage erase
	@# A file's tests stay in one process, in order: what they share is built once. Files go out in the order of
	@# tests/conftest.py. One process more than processors, because many tests wait for what they have started.
	$(PYTHON) -m coverage run -m pytest -n $(TEST_PROCESSES) --dist loadfile \
	    --no-loadscope-reorder -m "not soak" $(TEST_ARGS)
	@# A report must not fail what every test passed.
	$(PYTHON) -m tests.torncoverage
	$(PYTHON) -m coverage combine -q
	$(PYTHON) -m coverage report --skip-empty

soak: setup ## Run the long forms of the tests
	$(PYTHON) -m pytest -m soak $(TEST_ARGS)

check: setup ## Lint, format, types, and the direction of imports
	@# Without its cache, which called a file clean that a fresh clone refused.
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --check --no-cache .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

fmt: setup ## Format, and fix what the linter can fix
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: setup ## Measure starts, warm reads, conversion, metadata; results/ (long: see docs/benchmarks.md)
	$(PYTHON) -m e2e.startup $(STARTUP_ARGS)
	$(PYTHON) -m e2e.bench --image $(DEMO) $(BENCH_ARGS)

benchrouter: setup ## The router against nginx and HAProxy (needs both, and wrk); results/router.json
	$(PYTHON) -m e2e.router $(BENCH_ARGS)

benchautoscale: setup ## An endpoint under a ramp, a spike, a drop and a kill, live; results/autoscale/
	$(PYTHON) -m e2e.autoscale

# An old enough protoc: what it writes works with every protobuf that the agent extra allows.
PROTOC := .cache/protoc
proto: ## Write the *_pb2.py of our .proto files again
	[ -x $(PROTOC)/bin/python ] || $(PYTHON) -m venv $(PROTOC)
	$(PROTOC)/bin/python -m pip install -q --disable-pip-version-check grpcio-tools==1.76.0
	$(PROTOC)/bin/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. \
	    $$(git ls-files '*.proto')

clean: ## Remove what the other targets made, .venv and cached downloads included
	rm -rf $(VENV) .cache results build dist htmlcov .coverage .coverage.* \
	    .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
