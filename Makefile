# `make` alone lists the targets, from the ## comments below; CONTRIBUTING.md says more. Every recipe
# runs in the environment that `setup` creates once; nothing is installed anywhere else.

VENV ?= .venv
PARITY_VENV ?= .venv-parity
BIN = $(VENV)/bin

# A Python is suitable if it runs (a version manager's shim may not), is new enough and can create
# environments. `PYTHON=python3.12` picks another.
SUITABLE = 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	if $$python -c $(SUITABLE) >/dev/null 2>&1; then echo $$python; break; fi; done)

# The comparison is recorded for Python 3.11 (constraints.txt), so use that if found, else PYTHON.
PARITY_PYTHON ?= $(shell for python in python3.11 "$(PYTHON)"; do \
	if "$$python" -c $(SUITABLE) >/dev/null 2>&1; then echo $$python; break; fi; done)

# torch comes as a CPU build or with gigabytes of CUDA libraries. We want the former, in the version
# pinned in constraints.txt. On a Mac the ordinary build is one.
TORCH_VERSION = $(shell sed -n 's/^torch==//p' constraints.txt)
CPU_TORCH = $(shell $(PARITY_VENV)/bin/python -m pip index versions torch 2>/dev/null \
	| tr ', ' '\n\n' | grep -qx '$(TORCH_VERSION)+cpu' && echo 'torch==$(TORCH_VERSION)+cpu')
ifeq ($(shell uname -s),Darwin)
CPU_TORCH = torch==$(TORCH_VERSION)
endif

INSTALL = -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test test-all test-parity faults bench-peers cpu-torch lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1~\2/p' $(firstword $(MAKEFILE_LIST)) | \
	while IFS='~' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done
	@echo 'Then: source .venv/bin/activate, and python train.py --help'

setup: $(VENV)/ready  ## create .venv, once (PYTHON=python3.13 picks the interpreter)
	@:

# A working environment is kept, with the Python that created it, and only brought up to date.
$(VENV)/ready: pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	python="$(PYTHON)"; if ! "$$python" -c $(SUITABLE) >/dev/null 2>&1; then \
	echo "error: no Python 3.11 or newer that can create environments was found$${python:+: $$python}." \
	"Install one, or say where it is: make setup PYTHON=/path/to/python" >&2; exit 2; fi; \
	echo "Setting up $(VENV) with $$("$$python" --version); about a minute, once."; \
	"$$python" -m venv --clear $(VENV); fi
	@$(BIN)/python $(INSTALL) -e '.[dev]'
	@touch $@

# The benchmark's last line, its whole result as JSON, is for programs and stays in the file.
# Huge pages make a step a tenth faster, because its temporaries are remapped each time.
demo: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1
demo: setup  ## train a small GPT, sample from it, measure it
	@$(BIN)/python train.py --minutes 3
	@$(BIN)/python sample.py runs/tiny --prompt "def main(" --prompt "import "
	@$(BIN)/python -m gpt.bench runs/tiny >runs/tiny/bench.txt
	@sed '$$d' runs/tiny/bench.txt
	@echo 'Next, after  source .venv/bin/activate :'
	@echo '  python train.py --data my.txt --out runs/mine       train on your own files or folders'
	@echo '  python -m gpt.report runs/tiny                      see curves and samples on one page'
	@echo '  make test                                           run the tests'

test: setup  ## run the tests (four minutes)
	@$(BIN)/python -m pytest -q --durations=10

test-all: setup  ## run the slow tests too
	@$(BIN)/python -m pytest -q -m "not parity"

faults: setup  ## plant faults in a copy and report which test notices each (half an hour)
	@$(BIN)/python benchmarks/planted_faults.py

test-parity: $(PARITY_VENV)/ready $(PARITY_VENV)/llama.cpp  ## compare results with transformers
	@$(PARITY_VENV)/bin/python -m pytest -q -m parity

# Uses test-parity's torch and transformers, with llama.cpp built next to them; NANOGPT=FOLDER adds
# nanoGPT from its folder.
bench-peers: setup $(PARITY_VENV)/llama-cpp  ## compare speed with nanoGPT (NANOGPT=FOLDER), transformers, llama.cpp
	@$(BIN)/python benchmarks/peers.py --python $(PARITY_VENV)/bin/python \
	$(if $(NANOGPT),--nanogpt "$(NANOGPT)")

$(PARITY_VENV)/ready: pyproject.toml constraints.txt | $(PARITY_VENV)/bin/python
	@torch="$(CPU_TORCH)"; if [ -z "$$torch" ]; then \
	echo "error: pip finds no CPU build of torch $(TORCH_VERSION) for" \
	"$$($(PARITY_VENV)/bin/python --version). Give it an index that has one (PIP_EXTRA_INDEX_URL)," \
	"or after make clean another Python (PARITY_PYTHON)" >&2; exit 2; fi; \
	echo "Setting up $(PARITY_VENV) with $$torch and transformers, once."; \
	$(PARITY_VENV)/bin/python $(INSTALL) "$$torch" -e '.[dev,parity]'
	@touch $@

# Built from source with its own settings, for this very processor. Without it, its rows are omitted.
$(PARITY_VENV)/llama-cpp: $(PARITY_VENV)/ready
	@echo "Building llama.cpp for $(PARITY_VENV), once; this takes every core about ten minutes."
	@if $(PARITY_VENV)/bin/python $(INSTALL) --no-binary llama-cpp-python -e '.[peers]' >$@.log 2>&1; \
	then touch $@; else echo "llama.cpp could not be built; $@.log says why. It needs a C++ compiler" \
	>&2; fi

# llama.cpp's source, for its converter. Without it, that test is skipped.
$(PARITY_VENV)/llama.cpp: | $(PARITY_VENV)/ready
	@if $(PARITY_VENV)/bin/python -m pip download -q --disable-pip-version-check -c constraints.txt \
	--no-deps --no-binary llama-cpp-python -d $@.new llama-cpp-python >$@.log 2>&1 && \
	tar -xzf $@.new/*.tar.gz -C $@.new && mv $@.new/*/vendor/llama.cpp $@; \
	then :; else echo "could not get llama.cpp's source; $@.log says why" >&2; fi
	@rm -rf $@.new

$(PARITY_VENV)/bin/python:
	@if [ -z "$(PARITY_PYTHON)" ]; then \
	echo "error: no Python 3.11 or newer that can create environments was found. Install one, or say" \
	"where it is: make test-parity PARITY_PYTHON=/path/to/python" >&2; exit 2; fi
	@"$(PARITY_PYTHON)" -m venv --clear $(PARITY_VENV)

# Print the CPU build of torch that pip would install here, or nothing.
cpu-torch: $(PARITY_VENV)/bin/python
	@echo $(CPU_TORCH)

lint: setup  ## ruff check and ruff format --check
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:  ## remove the environments and caches; runs/ stays
	@rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
