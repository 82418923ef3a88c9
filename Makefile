# What a newcomer, CI and the README run. Each target makes .venv and installs when needed.
#   make demo    set-up, then plain and EAGLE decoding of the embedded pair, side by side
#   make test    set-up, then the tests that need no GPU
#   make lint    ruff, formatting, types
#   make gpu     the GPU tests, then the benchmark
#   make check   lint and test
# PYTHON=python3.13 picks the interpreter (before .venv exists), PIP_ARGS="..." adds flags for
# pip, such as another index; CONSTRAINTS=file replaces the tested versions.

PYTHON ?= python3
PIP_ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) $(PIP_ARGS) -e
INPUTS := setup.py pyproject.toml $(CONSTRAINTS)

.PHONY: demo test lint gpu check
.DELETE_ON_ERROR:

demo: .venv/.runtime
	$(BIN)/fasteagle demo

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not gpu"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/gpu.sh

check: lint test

# The stamps are made again only when what decides the install changes. Whoever edits
# requirements gets one quick pip run: what is already satisfied stays.
.venv/.runtime: $(INPUTS) | $(BIN)/pip
	@echo "Installing fasteagle into .venv (the first time this fetches PyTorch and takes minutes)"
	$(INSTALL) .
	@touch $@

.venv/.dev: $(INPUTS) | $(BIN)/pip
	@echo "Installing fasteagle and its test tools into .venv (the first time this takes minutes)"
	$(INSTALL) ".[dev]"
	@touch $@ .venv/.runtime

# A venv that fails half-way (Debian without python3-venv) must not look finished.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fasteagle needs Python 3.11 or newer, found $$($(PYTHON) --version 2>&1);" \
	    "name one with make PYTHON=python3.13"; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }
