# Everything a person does here, in one word each. `make help` lists it.
#
# Variables:
#   PYTHON=/path/to/python   use this environment, which has PyTorch, as it is: nothing is installed into it
#   TORCH=2.13.0             the PyTorch that the virtual environment gets
#   VENV=.venv               the virtual environment
#   OUT=runs/ablation        where `make ablation` writes; further options of `torch-pnn ablate` go into ARGS
#   PIP_ARGS=                further options of pip, for example a place with CPU builds of PyTorch

TORCH ?= 2.13.0
VENV ?= .venv
PYTHON ?=
OUT ?= runs/ablation
ARGS ?=
PIP_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ifeq ($(PYTHON),)
  PY := $(abspath $(VENV))/bin/python
  BUILD ?= build/dev$(patsubst .venv%,%,$(notdir $(VENV)))
  PACKAGES := $(VENV)/.packages-$(TORCH)
  INSTALLED := $(VENV)/.installed-$(TORCH)
  ZOO := $(VENV)/.zoo-$(TORCH)
else
  PY := $(PYTHON)
  BUILD ?= build/with$(subst /,-,$(PYTHON))
  PACKAGES :=
  INSTALLED := build-only
  ZOO :=
endif

# Python of the checkout, libraries of the build tree: how the tests and PYTHON=... run, with nothing installed.
FROM_TREE := PYTHONPATH=$(CURDIR)/python$${PYTHONPATH:+:$$PYTHONPATH} TORCH_PNN_LIBRARY_DIR=$(abspath $(BUILD))/lib
RUN := $(PY) tests/run.py --build $(BUILD)

SOURCES := CMakeLists.txt pyproject.toml LICENSE README.md \
  $(shell find cmake csrc python -type f -not -path '*/__pycache__/*' 2>/dev/null)

.PHONY: help setup ablation test check test-qemu bench gpu-check lint build build-only test-operators test-zoo clean

help: ## this list
	@echo "torch-pnn: the perturbation layer of Perturbative Neural Networks for PyTorch"
	@echo
	@echo "usage: make TARGET [VARIABLE=value ...]"
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r name text; do \
	  printf '  %-15s %s\n' "$$name" "$$text"; done
	@echo
	@sed -n '/^# Variables:/,/^$$/s/^#  \?//p' Makefile

setup: $(INSTALLED) ## make .venv: PyTorch, what the studies and tests need, torch-pnn itself
ifeq ($(PYTHON),)
	@echo "ready: $(VENV)/bin/torch-pnn, or 'source $(VENV)/bin/activate'"
endif

ablation: $(INSTALLED) ## compare CNN, LBCNN and PNN on real images and write a report (a few minutes)
ifeq ($(PYTHON),)
	$(VENV)/bin/torch-pnn ablate --out $(OUT) $(ARGS)
else
	$(FROM_TREE) $(PY) -m torch_pnn ablate --out $(OUT) $(ARGS)
endif

test: $(PACKAGES) ## all tests: C, sanitizers, each instruction set, Python, packaging
	@$(RUN) $(ARGS)

check: $(PACKAGES) ## the quick tests, in about five minutes once all is built
	@$(RUN) --quick $(ARGS)

test-operators: $(PACKAGES) ## the operators' Python tests alone, for a further PyTorch: TORCH=2.14.1 VENV=.venv-2.14
	@$(RUN) operators $(ARGS)

test-zoo: $(ZOO) ## other people's models and tools with our layer inside: TORCH=2.14.1 VENV=.venv-2.14
	@$(RUN) zoo $(ARGS)

test-qemu: build ## the same bits on emulated processors: 64-bit Arm (NEON), Nehalem, Haswell (needs qemu-user)
	@PYTHON=$(PY) tests/qemu.sh $(BUILD)

bench: build ## every speed and memory target beside plain PyTorch and the machine's ceilings (ARGS=--quick for less)
	$(FROM_TREE) $(PY) benchmarks/run.py $(ARGS)

# Nothing is installed for it: a machine with a GPU may have no network, and has its own PyTorch.
gpu-check: ## where a GPU is: build for it, compare with the CPU and the float64 reference, time (ten minutes)
	@$(or $(PYTHON),$(wildcard $(VENV)/bin/python),python3) tests/cuda/gpu_check.py $(ARGS)

lint: $(PACKAGES) ## ruff, mypy, clang-format 19, and the project's own checks of its text
	@$(PY) tests/lint.py

build: $(PACKAGES) ## build everything into $(BUILD), for use from the checkout; prints how
	@$(RUN) build

clean: ## remove what was built, and .venv
	rm -rf build dist .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

build-only:
	@$(RUN) build

# ---- the virtual environment; each stamp stands for a finished step ----

$(VENV)/bin/python:
	@python3 -m venv --help >/dev/null 2>&1 && python3 -c 'import ensurepip' 2>/dev/null || \
	  { echo "python3 can't make virtual environments: apt-get install python3-venv (Debian)" >&2; exit 1; }
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "python3 is $$(python3 -V); torch-pnn needs Python 3.10 or newer" >&2; exit 1; }
	@echo "making $(VENV) with $$(python3 -V)"
	@python3 -m venv $(VENV)

CUDA_TOOLS := $(if $(or $(wildcard /usr/local/cuda/bin/nvcc),$(shell command -v nvcc)),requirements/cuda.txt)

# torch first and alone, at its exact version: a bare `torch` from another package's requirements would take the newest.
$(VENV)/.packages-$(TORCH): requirements/build.txt requirements/run.txt requirements/test.txt requirements/interchange.txt requirements/lint.txt $(CUDA_TOOLS) | $(VENV)/bin/python
	@echo "installing PyTorch $(TORCH) and what building, studies and tests need into $(VENV)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) torch==$(TORCH)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) torch==$(TORCH) $(patsubst %,-r %,$(filter %.txt,$^))
	@rm -f $(VENV)/.packages-* $(VENV)/.installed-* $(VENV)/.zoo-*
	@touch $@

# torchvision X.Y.Z belongs to one PyTorch exactly; pip finds it by the PyTorch that is pinned beside it.
$(VENV)/.zoo-$(TORCH): $(VENV)/.packages-$(TORCH) requirements/zoo.txt
	@echo "installing other people's models and tools beside PyTorch $(TORCH) into $(VENV)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) torch==$(TORCH) torchvision -r requirements/zoo.txt
	@touch $@

# The build tree outlives the call, so that a changed file compiles alone.
$(VENV)/.installed-$(TORCH): $(VENV)/.packages-$(TORCH) $(SOURCES)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "no C++ compiler: apt-get install g++ (Debian)" >&2; exit 1; }
	@echo "building torch-pnn and installing it into $(VENV)"
	@PATH=$(abspath $(VENV))/bin:$$PATH $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps \
	  --force-reinstall --config-settings=build-dir=build/wheel$(patsubst .venv%,%,$(notdir $(VENV))) .
	@touch $@
