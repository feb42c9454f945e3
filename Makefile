# BioMerge: `make help` says what there is. Nothing is assumed but Python 3.11+ and make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env debug test check gpu-test cluster lint format lab requirements clean

VENV ?= .venv
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
NBMAKE_TIMEOUT ?= 900
BIN := $(abspath $(VENV))/bin

# The scripts and kernels that a target starts find the environment's programs first, with no activation.
export VENV := $(abspath $(VENV))
export PATH := $(BIN):$(PATH)
export PYTHONUTF8 := 1
export TOKENIZERS_PARALLELISM := false

# In a container one is root, whom Jupyter refuses unless told.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# slurm/site.sh is the user's own
SHELL_SCRIPTS := $(filter-out slurm/site.sh,$(wildcard slurm/*.sh slurm/*.sbatch tests/cluster/*.sh .ci/run))

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

env: ## the environment (.venv) from nothing; returns at once when it is there (BIOMERGE_DEVICE=cpu|cuda)
	@bash slurm/setup_env.sh

debug: env ## environment, then the whole pipeline 01 to 06 on the CPU with the embedded model and corpus
	@bash slurm/run_local_debug.sh --with-vllm

test: env lint ## environment, lint, then every test and every notebook (PYTEST_ARGS=-x, NBMAKE_TIMEOUT=900)
	@$(BIN)/pytest -q -n $(TEST_PROCESSES) --durations=10 --nbmake --nbmake-timeout=$(NBMAKE_TIMEOUT) tests notebooks $(PYTEST_ARGS)

check: env ## everyday: lint, and beside it the tests that are not marked slow or integration; under a minute
	@lint=$$(mktemp) && trap 'rm -f $$lint' EXIT; tests=0; \
	$(MAKE) --no-print-directory lint >$$lint 2>&1 & \
	$(BIN)/pytest -q -p no:nbmake -n $(TEST_PROCESSES) --durations=5 \
		-m "not gpu and not slow and not integration" tests $(PYTEST_ARGS) || tests=$$?; \
	wait $$! || tests=$$?; cat $$lint; exit $$tests

gpu-test: env ## the tests that want a CUDA card; their result goes to reports/gpu_tests.md
	@$(BIN)/pytest -q -m gpu tests/gpu $(PYTEST_ARGS)

cluster: env ## the tests on a SLURM of one node alone (root, slurm-wlm, munge, rsync)
	@$(BIN)/pytest -q tests/cluster $(PYTEST_ARGS)

lint: env ## ruff, mypy, notebooks without outputs, shellcheck where it is installed; changes nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify $(NOTEBOOKS))
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_SCRIPTS); else echo "shellcheck is not installed: skipped"; fi

format: env ## ruff's fixes and layout, outputs stripped from notebooks
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(NOTEBOOKS),$(BIN)/nbstripout $(NOTEBOOKS))

lab: env ## JupyterLab at the project (LAB_ARGS=--no-browser); its kernels import this checkout's library
	@PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/jupyter lab --notebook-dir="$(CURDIR)" $(AS_ROOT) $(LAB_ARGS)

requirements: env ## new pins: requirements/*.in -> requirements/*.txt
	@bash slurm/setup_env.sh --compile

# Only what git ignores can go, whatever stands in these folders.
GENERATED := runs data tokenizers backbones logs wandb outputs
clean: ## remove what runs made (runs/ data/ tokenizers/ backbones/ ...), after naming it; CONFIRM=yes does not ask
	@found=$$(git clean -ndX -- $(GENERATED)); \
	if [[ -z $$found ]]; then echo "nothing to remove in: $(GENERATED)"; exit; fi; \
	echo "$$found"; \
	if [[ "$(CONFIRM)" != yes ]]; then read -rp "Remove these? Runs and trained models are lost [y/N] " answer || true; [[ $$answer == [yY]* ]] || exit 0; fi; \
	git clean -fdXq -- $(GENERATED)
