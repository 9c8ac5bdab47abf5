# The first target that needs it installs remask and its tools into $(VENV); later ones start at once.
#
#   PYTHON  the interpreter that the environment is made with, 3.10 or newer
#   VENV    where the environment lives
#   DATA    the folder with TOFU's files, for `make unlearning`

PYTHON ?= python3
VENV   ?= .venv

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test lint unlearning clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) DATA=$(DATA)"

demo: $(STAMP) ## Edit a fact in a bundled model and write report/index.html
	$(BIN)/remask demo

test: $(STAMP) ## Run all tests
	$(BIN)/pytest

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unlearning: $(STAMP) ## Measure every number of docs/unlearning.md again (hours; needs DATA)
	$(BIN)/python benchmarks/unlearning.py tiny-tofu --data "$(DATA)"
	$(BIN)/python benchmarks/unlearning.py tiny
	$(BIN)/python benchmarks/unlearning_noise.py
	$(BIN)/python benchmarks/tables.py

clean: ## Remove what the targets wrote, except the environment
	rm -rf build dist report .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# The old stamp goes first and the new one comes last: an install that fails or is interrupted leaves none.
$(STAMP): pyproject.toml constraints-cpu.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit("remask needs Python 3.10 or newer: make PYTHON=/path/to/python3" if sys.version_info < (3, 10) else 0)'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "Installing remask into $(VENV) (first run: some minutes)"
	@$(PIP) install -qq --constraint constraints-cpu.txt --editable ".[dev]"
	@touch $@
