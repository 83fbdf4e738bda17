# Every target does its own set-up in .venv and skips it while pyproject.toml is older.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest lint docs bench clean
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest/bin
PIP := -m pip install --quiet --disable-pip-version-check
WORKERS ?= 2
PYTEST := -m pytest -q -n $(WORKERS)

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/.ready: pyproject.toml
	@echo "setting up .venv (the first time: several minutes and 5 GB, most of it PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(PIP) --upgrade pip
	@$(BIN)/python $(PIP) --editable '.[dev]'
	@touch $@

.venv/.ready-bench: .venv/.ready
	@$(BIN)/python $(PIP) --editable '.[bench]'
	@touch $@

.venv-oldest/.ready: pyproject.toml
	@echo "setting up .venv-oldest (torch 2.11 and torchvision 0.26)"
	@test -x $(OLDEST)/python || $(PYTHON) -m venv .venv-oldest
	@$(OLDEST)/python $(PIP) --upgrade pip
	@$(OLDEST)/python $(PIP) --editable '.[test]' 'torch==2.11.*' 'torchvision==0.26.*'
	@touch $@

DEMO := runs/demo$(if $(SHORT),-short)
TRAIN = $(BIN)/python examples/imagenet_irevnet.py $(if $(SHORT),--epochs 2)

demo: .venv/.ready ## train a small i-RevNet and a ResNet on real digits, run one backwards (SHORT=1: seconds)
	@$(TRAIN) --output $(DEMO)/irevnet_small
	@$(TRAIN) --model resnet_small --output $(DEMO)/resnet_small
	@echo "all figures of the paper, of these two networks, are made by"
	@echo "  $(BIN)/python -m zoo.analysis all --checkpoint $(DEMO)/irevnet_small" \
		"--beside $(DEMO)/resnet_small --output $(DEMO)/analysis"

test: .venv/.ready ## the fast tests, under 10 minutes on 2 cores
	@$(BIN)/python $(PYTEST) -m "not slow"

test-slow: .venv/.ready ## the tests that take minutes, under 25 in all
	@$(BIN)/python $(PYTEST) -m slow

test-oldest: .venv-oldest/.ready ## the fast tests on the oldest supported torch
	@$(OLDEST)/python $(PYTEST) -m "not slow"

lint: .venv/.ready ## format, lint, types, spelling
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/codespell

docs: .venv/.ready ## the site, into docs/_build/html, and checks of it
	@rm -rf docs/_build/html
	@$(BIN)/python -m sphinx -W -n --keep-going -q -b html docs docs/_build/html
	@$(BIN)/python -m sphinx -W -n --keep-going -q -b doctest docs docs/_build/doctest
	@$(BIN)/python docs/check_site.py docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/.ready-bench ## the measurements of the docs, written to runs/benchmarks
	@$(BIN)/python -m benchmarks.roundtrip
	@$(BIN)/python -m benchmarks.loader
	@$(BIN)/python -m benchmarks.epsilon
	@$(BIN)/python -m benchmarks.grid
	@$(BIN)/python -m benchmarks.budget
	@$(BIN)/python -m benchmarks.backprop
	@$(BIN)/python -m benchmarks.inverse
	@$(BIN)/python -m benchmarks.limit
	@$(BIN)/python -m benchmarks.scaling
	@$(BIN)/python -m benchmarks.depth
	@$(BIN)/python -m benchmarks.growth
	@$(BIN)/python -m benchmarks.fits
	@$(BIN)/python -m benchmarks.inside
	@$(BIN)/python -m benchmarks.stability
	@$(BIN)/python -m benchmarks.startup
	@$(BIN)/python -m benchmarks.frontier
	@$(BIN)/python -m benchmarks.models
	@$(BIN)/python -m benchmarks.residual
	@$(BIN)/python -m benchmarks.flows

clean: ## remove what the targets made, except the environments
	@rm -rf build dist docs/_build docs/generated docs/tutorials runs .hypothesis .pytest_cache .ruff_cache
