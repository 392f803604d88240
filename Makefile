# make demo · make test · make lint · make codegen · make bench · make report: the set-up is done on the first call
# make gpu: everything that needs a GPU, with the Python and torch that are there, without a network
# (its parts: make gpu-build · gpu-kernels · gpu-models · gpu-bench · gpu-bench-tokens)
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint codegen bench report clean
.PHONY: gpu gpu-build gpu-kernels gpu-models gpu-bench gpu-bench-tokens

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
OTHER_TRITON := $(VENV)/triton-3.6.0
CSRC := $(wildcard csrc/*)
# the Python of `make gpu`
PYTHON ?= python3
OUT ?= out
# a kernel that hangs must not cost the benchmarks their turn
TEST_SECONDS ?= 270
BLOCKS ?= 9
# files of tests run side by side, a thread each
WORKERS ?= 2

help:
	@sed -n '1,3s/^# //p' Makefile

# torch comes first and alone: what is installed after it keeps the build (CPU or CUDA) that it took
$(INSTALLED): pyproject.toml constraints.txt setup.py
	@set -e; if [ ! -x $(PY) ]; then \
	  for python in python3.11 python3.12 python3; do \
	    if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	      2>/dev/null; then echo "setting up $(VENV) with $$python"; $$python -m venv $(VENV); break; fi; \
	  done; \
	  [ -x $(PY) ] || { echo "sdvg needs Python 3.11 or 3.12: install one, then run make again"; exit 1; }; \
	fi
	$(PY) -m pip install -q -c constraints.txt torch==2.13.0
	$(PY) -m pip install -q -c constraints.txt setuptools wheel ninja
	SDVG_SKIP_CUDA_BUILD=1 $(PY) -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

$(BUILT): $(INSTALLED) $(CSRC) setup.py
	$(PY) setup.py -q build_ext --inplace
	@touch $@

setup: $(BUILT)

demo: setup
	@mkdir -p $(OUT)
	$(VENV)/bin/sdvg generate "a seven moving left" --blocks $(BLOCKS) --router reward --tau -0.7 \
	  --seed 0 --out $(OUT)/demo.mp4

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(filter %.cu %.cuh %.h %.cpp,$(CSRC))

# kernels must compile with the Triton of the newest torch and with the one before it
$(OTHER_TRITON)/.installed: | $(INSTALLED)
	rm -rf $(OTHER_TRITON)
	$(PY) -m pip install -q --no-deps --target $(OTHER_TRITON) triton==3.6.0
	@touch $@

codegen: setup $(OTHER_TRITON)/.installed
	$(PY) -m sdvg_kernels.codegen
	PYTHONPATH=$(OTHER_TRITON) $(PY) -m sdvg_kernels.codegen --no-cuda

bench: setup
	$(PY) -m benchmarks.run_all

report: setup
	$(PY) -m benchmarks.report

# a part that fails does not keep the next from running, it fails the target at the end. Each part is
# a target too, and ends within ten minutes: for machines that are lent for some minutes at a time
gpu: gpu-build
	@failed=0; for part in gpu-kernels gpu-models gpu-bench gpu-bench-tokens; do \
	  $(MAKE) --no-print-directory $$part || failed=1; \
	done; exit $$failed

# only this GPU's architecture is built, unless SDVG_CUDA_ARCHS says otherwise
gpu-build:
	@archs=$${SDVG_CUDA_ARCHS:-$$($(PYTHON) -c 'import torch; c = torch.cuda.get_device_capability(); \
	  print("%d%d" % c + "a" * (c >= (9, 0)))')} && \
	SDVG_CUDA_ARCHS=$$archs SDVG_FORCE_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace

# packages that a machine without a network was given stay in sight
GPU_ENV = PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH}
# interrupted, pytest still says what has failed; a file that cannot be imported costs no other
GPU_TEST = $(GPU_ENV) timeout -s INT -k 15 $(TEST_SECONDS) $(PYTHON) -m pytest -W default -m gpu \
  --continue-on-collection-errors

# mostly compilations: with xdist they run side by side, as many as cores and memory take (a test
# has up to 10 GB)
gpu-kernels: gpu-build
	@workers=$$($(PYTHON) -c 'import os, torch, xdist; \
	  memory = torch.cuda.get_device_properties(0).total_memory; \
	  print("-n", max(1, min(os.cpu_count() - 2, memory // 13_000_000_000)))' 2>/dev/null); \
	echo "GPU tests of the kernels $$workers"; \
	$(GPU_TEST) $$workers tests/kernels

# one by one: some of them measure
gpu-models: gpu-build
	@$(GPU_TEST) tests --ignore=tests/kernels

gpu-bench: gpu-build
	@$(GPU_ENV) $(PYTHON) -m benchmarks.run_all --part video

gpu-bench-tokens: gpu-build
	@$(GPU_ENV) $(PYTHON) -m benchmarks.run_all --part tokens

clean:
	rm -rf build $(BUILT) sdvg_kernels/_C*.so
