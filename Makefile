# Needs make and Python 3.11 or newer; everything else is installed into $(VENV).
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Exact versions for repeatable runs; in a new environment `CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# Which build of PyTorch: cpu, auto (what this machine can run), cu130, ...
# Unset: a wheel from the places that pip or uv were told to look in (find-links) if there is one, else cpu.
TORCH_BACKEND ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python $(addprefix --constraints ,$(CONSTRAINTS))
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS))
comma := ,
FIND_LINKS := $(addprefix --find-links ,$(subst $(comma), ,$(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))))
TEST_ENV := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

# Where the system has certificates of its own (a company's proxy), uv shall trust them too.
ifneq ($(wildcard /etc/ssl/certs/ca-certificates.crt),)
export UV_SYSTEM_CERTS ?= 1
endif

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile
	@echo '  Options: PYTHON=python3.12  TORCH_BACKEND=auto (or cu130, cpu)  CONSTRAINTS= (newest versions)  PYTEST_ARGS="-k links"'

.PHONY: install
install: $(STAMP) ## Install the package and its tools into .venv (once; again when pyproject.toml changes)

.PHONY: demo
demo: install ## Run the bundled systems against their controls: a table and a page
	$(BIN)/recursivemas demo

.PHONY: test
test: lint ## Lint, check layers and types, and run the tests
	$(TEST_ENV) $(BIN)/pytest $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: install ## Run the tests that are left out of `make test` because they take long
	$(TEST_ENV) $(BIN)/pytest -m slow --timeout=1800 $(PYTEST_ARGS)

.PHONY: lint
lint: install ## Check style, formatting, layers of imports and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

.PHONY: format
format: install ## Sort imports, mend what can be mended and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: clean
clean: ## Remove .venv, caches and builds (never runs/)
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A backend asked for by name that is not the one installed: install again.
ifneq ($(TORCH_BACKEND),)
ifneq ($(TORCH_BACKEND),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

# PyTorch goes first: what is installed after it keeps the build that is there, while in an empty environment
# it would bring the newest CUDA build with gigabytes of libraries. pip is asked because uv does not read pip's files.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/uv
	@echo 'Installing PyTorch$(addprefix : ,$(TORCH_BACKEND)) ...'
ifneq ($(TORCH_BACKEND),)
	@$(UV_INSTALL) --reinstall-package torch --torch-backend=$(TORCH_BACKEND) torch
else
	@{ $(if $(FIND_LINKS),$(UV_INSTALL) --no-index --no-deps $(FIND_LINKS) torch || )$(PIP_INSTALL) --no-index --no-deps torch; } 2>/dev/null || \
	  $(UV_INSTALL) --torch-backend=cpu torch || \
	  { echo 'Error: no CPU build of PyTorch could be had. Install any build into $(VENV), then run this again: $(UV_INSTALL) torch' >&2; exit 1; }
endif
	@echo 'Installing recursivemas and its tools ...'
	@$(UV_INSTALL) $(addprefix --build-constraints ,$(CONSTRAINTS)) --editable '.[dev]'
	@echo '$(TORCH_BACKEND)' > $@

$(BIN)/uv:
	@command -v $(PYTHON) >/dev/null || { echo 'Error: $(PYTHON) was not found. Install Python 3.11 or newer, or say which: make install PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Say which to use: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo 'Error: $(PYTHON) has no venv module. On Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'Creating $(VENV) with $(PYTHON) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) uv
