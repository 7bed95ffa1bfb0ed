# make help lists the targets. Python 3.11 or newer is all that they need; `make PYTHON=python3.12` names another one.

VENV ?= .venv
PYTHON ?= python3
RUN ?=
export RUN

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process a core; the tests of a file share what they made, and so a process.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile
# Other projects, whose versions do not go with ours, have an environment of their own.
INTEROP_VENV ?= .venv-interop
INTEROP := $(INTEROP_VENV)/.installed
SLOW := slow and not gpu and not net and not interop

.DEFAULT_GOAL := help
.PHONY: help install demo seeds test test-slow test-all interop lint format eval report bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with every version as in constraints.txt

# torch comes first and alone, so that no other package's wish decides which build of it is taken.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## cache, train, measure and explain a prompt on the built-in world: runs/demo
	$(BIN)/clt extract model=world
	$(BIN)/clt train +experiment=batchtopk_across name=demo
	$(BIN)/clt eval run=runs/demo
	$(BIN)/clt features run=runs/demo
	$(BIN)/clt graph run=runs/demo prompt='The capital of France is'

bench: $(STAMP) ## what a training step costs, against a plain dense one and the machine's floor (minutes; use it alone)
	$(BIN)/clt bench train

seeds: demo ## the README's table: two recipes, three seeds each (about 20 minutes)
	$(BIN)/clt train --multirun +experiment=batchtopk_across,sparse train.seed=0,1,2 name=seeds
	for n in 0 1 2 3 4 5; do $(BIN)/clt eval run=runs/seeds/$$n || exit; done

test: $(STAMP) ## the fast tests
	$(PYTEST)

test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m "$(SLOW)"

test-all: test test-slow ## both; tests that need a GPU, the network or other projects: pytest -m gpu, net, interop

interop: $(STAMP) $(INTEROP) ## our exports in the real circuit-tracer and SAELens, our graphs beside theirs (4 minutes)
	CLT_INTEROP=$(abspath $(INTEROP_VENV))/bin/python $(BIN)/python -m pytest -m interop tests/interop

# torch first, as above. No build is named: one for CPUs does, and PIP_EXTRA_INDEX_URL can name where those are.
$(INTEROP): constraints-interop.txt
	@test -x $(INTEROP_VENV)/bin/python || $(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --constraint constraints-interop.txt torch
	$(INTEROP_VENV)/bin/python -m pip install --quiet --constraint constraints-interop.txt circuit-tracer sae-lens jsonschema
	@touch $@

lint: $(STAMP) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## mend what can be mended by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

eval: $(STAMP) ## measure the newest run, or RUN=runs/NAME
	$(BIN)/clt eval $${RUN:+"run=$$RUN"}

report: $(STAMP) ## the page about the newest run, or RUN=runs/NAME or a sweep's directory
	$(BIN)/clt report $${RUN:+"$$RUN"}

clean: ## remove what the tools leave; never cache/, runs/ or models/
	rm -rf build dist ./*.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find conf pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
