# Everything runs from a fresh virtual environment; it needs only Python 3.11+ and PyPI (or a mirror).
# make VENV=/elsewhere/venv PYTHON=python3.11 ... puts it elsewhere or takes another Python.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
LIT_LORA = $(BIN)/lit-lora
TORCH = $(shell grep '^torch==' constraints.txt)
RUN = runs/quickstart

.DEFAULT_GOAL = help
.PHONY: help setup model quickstart tiers test unit lint faults sweep conformance consumers docs check wheel clean

help:  ## this text
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 20

# torch first and by itself: the later steps then find it installed and do not look for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); $$python -c 'import sys; v = sys.version_info; sys.exit( \
	  "%s is Python %d.%d, lit_lora needs 3.11 or newer: make PYTHON=python3.11 ..." % (sys.executable, v[0], v[1]) \
	  if v < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(TORCH)
	$(PIP) install --quiet -c constraints.txt -e '.[test]'
	touch $@

setup: $(VENV)/.installed  ## make the virtual environment .venv with everything in it

model: setup  ## download the small model of the quickstart and the tests (once, about a minute)
	$(LIT_LORA) fetch smollm2-135m-instruct

tiers: model  ## five QLoRA runs, 10 steps to 7B; skips what this machine cannot run
	$(LIT_LORA) tiers

quickstart: model  ## fine-tune a 135M model on this machine's CPU and compare it with the base
	$(LIT_LORA) fit --config configs/quickstart.yaml
	$(LIT_LORA) evaluate configs/data/requests_test.jsonl "$$(ls -dt $(RUN)*/ | head -n 1)adapter"

# Two processes with a thread each do more than one with two.
test: model  ## every test, those with the real model too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

unit: setup  ## the tests that need no model
	$(BIN)/python -m pytest -m 'not real_model'

lint: setup  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

faults: setup  ## kill, starve and feed nonsense to real runs (about 7 minutes); writes benchmarks/results/faults.md
	$(BIN)/python -m tests.faults

sweep: setup  ## compare every architecture of transformers with its own loss (minutes); writes docs/architectures.md
	$(BIN)/python -m pytest --sweep -m sweep tests/sweep

conformance: setup  ## compare adapters with PEFT, and exports with what was trained (minutes); writes two pages of docs
	$(BIN)/python -m pytest --sweep -m sweep tests/conformance tests/exports

# Its wheels are for other machines: it is built here. CMake and Ninja come with its build.
consumers: model  ## read what was exported with llama.cpp, built from source (many minutes), and run lm-evaluation-harness
	$(PIP) install --quiet -c constraints.txt --no-binary llama-cpp-python -e '.[consumers,harness]'
	$(BIN)/python -m pytest -m consumers tests/consumers

docs: setup  ## build the pages as a site, site/index.html, and check its links
	$(PIP) install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m pytest -m site tests/docs
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mkdocs build --strict --quiet

check: lint unit  ## what to run before a commit: lint and the unit tests

wheel: setup  ## build dist/*.whl
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what was built; models and runs stay
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
