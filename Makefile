# Everything here needs Python 3.10 or newer, make and a package index; the rest goes into .venv.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
TORTURE_ARGS ?=
TORCH ?= torch

VENV := .venv
BIN := $(VENV)/bin
GPU_LIBRARIES ?= $(VENV)/gpu-libraries
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu-code test-torch lint format bench bench-small bench-starts torture bench-e2e bench-install bench-startup bench-gpu-code bench-accelerator clean

help:  ## Show this
	@sed -n 's/^\([a-z0-9-]*\): .*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

demo: $(VENV)/.package  ## Show the main job on a small environment, in under three minutes
	@$(BIN)/packhorse demo
	@echo 'In this checkout packhorse is $(BIN)/packhorse.'

test: $(VENV)/.test  ## Run all tests; PYTEST_ARGS="-k pull" runs some, "-n 0" one at a time
	@$(BIN)/pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile $(PYTEST_ARGS)

test-gpu-code: $(VENV)/.gpu-code $(GPU_LIBRARIES)  ## Hold the choice of GPU code against NVIDIA's own tools (over 1 GB more to download)
	@GPU_LIBRARIES=$(GPU_LIBRARIES) $(BIN)/pytest -m gpu_code $(PYTEST_ARGS)

test-torch: $(VENV)/torch  ## Build wheels with a real torch and install them; TORCH="torch==2.13.0+cpu" takes another one
	@TORCH_WHEELS=$(VENV)/torch $(BIN)/pytest -m torch $(PYTEST_ARGS)

torture: $(VENV)/.test  ## Run many programs while their files arrive late: 8 GB of packages, 40 GB of disk, an hour
	@$(BIN)/python tests/torture/full.py $(TORTURE_ARGS)

lint: $(VENV)/.lint  ## Check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/.lint  ## Put style right
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/.bench  ## Measure packhorse against its peers on a CUDA environment: about an hour, 60 GB of disk
	@$(BIN)/python bench/peers.py $(BENCH_ARGS)

bench-small: $(VENV)/.bench  ## That, bench-starts and bench-e2e once on small environments: for the harness, not for figures
	@$(BIN)/python bench/peers.py --small --rounds 1 --warm-up 0 $(BENCH_ARGS)
	@$(BIN)/python bench/starts.py --small --rounds 1
	@$(BIN)/python bench/e2e.py --small

bench-starts: $(VENV)/.bench  ## Measure how soon a worker is of use after it lost everything: BENCH_ARGS="--network 1g"
	@$(BIN)/python bench/starts.py $(BENCH_ARGS)

bench-e2e: $(VENV)/.test  ## Measure install, push, wipe, pull and run of a CUDA environment
	@$(BIN)/python bench/e2e.py $(BENCH_ARGS)

bench-install: $(VENV)/.bench  ## Measure installing from local wheels: BENCH_ARGS="--wheels DIR --requirements FILE"
	@$(BIN)/python bench/install.py $(BENCH_ARGS)

bench-startup: $(VENV)/.package  ## Measure what `packhorse run` adds to the start of a command
	@$(BIN)/python bench/startup.py $(BENCH_ARGS)

bench-gpu-code: $(VENV)/.test  ## Measure which GPU code of a directory is cold: BENCH_ARGS="DIRECTORY --check"
	@$(BIN)/python bench/gpu_code.py $(BENCH_ARGS)

bench-accelerator: $(VENV)/.package  ## Measure the check of symbols in BENCH_ARGS=DIR, which has a torch
	@$(BIN)/python bench/accelerator.py $(BENCH_ARGS)

clean:  ## Remove all that was made here
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is as new as the pyproject.toml that it stands for.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.2'
	@touch $@

$(VENV)/.package: $(VENV)/.python pyproject.toml
	@echo 'Installing packhorse into $(VENV)'
	@$(PIP) install --editable .
	@touch $@

$(VENV)/torch: $(VENV)/.test
	@echo 'Downloading $(TORCH) into $@'
	@$(PIP) download --only-binary=:all: --dest $@.part '$(TORCH)'
	@mv $@.part $@

$(VENV)/gpu-libraries: $(VENV)/.gpu-code
	@echo 'Installing libraries with GPU code into $@'
	@$(PIP) install --no-deps --only-binary=:all: --target $@.part torch nvidia-nccl-cu13 nvidia-cusparse nvidia-cudnn-cu13
	@mv $@.part $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.gpu-code $(VENV)/.bench: $(VENV)/.%: $(VENV)/.package
	@echo 'Installing what `make $*` needs into $(VENV)'
	@$(PIP) install --group $*
	@touch $@
