# The same commands locally and in CI. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## Create .venv and install the package with all extras
$(STAMP): pyproject.toml requirements/pins.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/pins.txt --editable '.[demo,train,dev]'
	touch $(STAMP)

demo: $(STAMP) ## Extract 1,500+ real drawings, retrieve, rerank, print a table
	$(BIN)/edje-pipeline demo

test: $(STAMP) ## Run every test that this machine can run
	$(BIN)/python -m pytest

test-fast: $(STAMP) ## Run the tests that take less than ten seconds each and no Ray cluster
	$(BIN)/python -m pytest -m 'not slow and not ray'

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Measure extract and score side by side with their rivals; writes benchmarks/results/
	$(BIN)/python -m benchmarks.run

clean: ## Remove what the targets above made, but not the virtual environment
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache edje-demo
