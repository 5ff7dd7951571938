# Everything works in a fresh clone: .venv is made when it is missing, and installed into again when setup.cfg or
# constraints.txt changed.
PYTHON ?= python3
PYTEST_ARGS ?= -q
WORKERS ?= -n 2 --dist loadfile

BIN := .venv/bin
INSTALLED := .venv/.installed

LINK_ARGS ?= --rate-gbit 0.2 1 5 --ranks 2 4 --bytes 16384 65536 262144 1048576 8388608 \
  --comm int4:g32 gauss4:g128 gauss4:g128:trellis selective4 --algorithm auto gate --repeats 20
TTFT_ARGS ?= --comm int4:g32 gauss4:g128:trellis --repeats 5

.DEFAULT_GOAL := help
.PHONY: help demo accuracy test test-full test-gpu test-triton-matrix test-megatron-matrix test-deepspeed-matrix lint bench bench-link bench-gpu clean

# A machine with a GPU has its own torch and triton, and often nothing can be installed there: with PYTHON=python3 on the
# command line that Python runs these two as it is. They need torch, triton and numpy, tests pytest and hypothesis too.
ifeq ($(origin PYTHON),command line)
GPU_PYTHON := $(PYTHON)
else
GPU_PYTHON := $(BIN)/python
GPU_INSTALLED := $(INSTALLED)
endif

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## generate text with tensor parallelism, exact and compressed side by side
	@$(BIN)/python -m megatron_lowbit generate --compare --temperature 0.6 --top-k 20 $(DEMO_ARGS)

accuracy: $(INSTALLED)  ## what every codec costs in accuracy, into the tables of docs/accuracy.md (TEXT=FILE: on another text)
	@$(BIN)/python benchmarks/accuracy.py $(if $(TEXT),--text $(TEXT)) --json benchmarks/results/accuracy.json
	@$(BIN)/python benchmarks/tables.py

test: $(INSTALLED)  ## run the tests that take a few minutes in all (PYTEST_ARGS="-q -k codec" to choose)
	@$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-full: $(INSTALLED)  ## run the slow tests too
	@$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS) -m "not gpu"

test-gpu: $(GPU_INSTALLED)  ## run the tests that need a CUDA device (PYTHON=python3: without .venv; PYTEST_ARGS="-q -n 8")
	@$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

test-triton-matrix: $(INSTALLED)  ## run the tests of the kernels with older versions of Triton, which are downloaded
	@$(BIN)/python -m tests.triton_matrix $(MATRIX_ARGS)

test-megatron-matrix: $(INSTALLED)  ## run the tests of the Megatron patch with other releases, which are downloaded
	@$(BIN)/python -m tests.megatron_matrix $(MATRIX_ARGS)

test-deepspeed-matrix: $(INSTALLED)  ## run the tests of both patches with other releases of DeepSpeed and Transformers
	@$(BIN)/python -m tests.deepspeed_matrix $(MATRIX_ARGS)
	@$(BIN)/python -m tests.transformers_matrix $(TRANSFORMERS_MATRIX_ARGS)

lint: $(INSTALLED)  ## check the code with ruff, and that the tables in the docs are those of the JSON
	@$(BIN)/ruff check .
	@$(BIN)/python benchmarks/tables.py --check

bench: bench-link  ## measure on this machine, into benchmarks/results/ and the tables of README.md and docs/
	@$(BIN)/python benchmarks/codecs.py --json benchmarks/results/codecs.json
	@$(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json --plot docs/sqnr.png
	@$(BIN)/python benchmarks/alternatives.py --json benchmarks/results/alternatives.json
	@$(BIN)/python benchmarks/scale_formats.py --json benchmarks/results/scale_formats.json
	@$(BIN)/python benchmarks/spike_formats.py --json benchmarks/results/spike_formats.json
	@$(BIN)/python benchmarks/kernels.py --predict --json benchmarks/results/kernels_predicted.json
	@$(BIN)/python benchmarks/evaluating.py --json benchmarks/results/evaluating.json
	@$(BIN)/python benchmarks/demo.py --json benchmarks/results/demo.json
	@$(BIN)/python benchmarks/cost_model.py --fit --write >/dev/null
	@$(BIN)/python benchmarks/cost_model.py --json benchmarks/results/cost_model.json --plot docs/cost_model.png
	@$(BIN)/python benchmarks/tables.py

bench-link: $(INSTALLED)  ## all-reduce and time to first token on shaped links, in 15 minutes (needs root; else loopback)
	@$(BIN)/python benchmarks/link.py $(LINK_ARGS) --json benchmarks/results/link.json --plot docs/link.png
	@$(BIN)/python benchmarks/ttft.py $(TTFT_ARGS) --json benchmarks/results/ttft.json --plot docs/ttft.png
	@$(BIN)/python benchmarks/tables.py

bench-gpu: $(GPU_INSTALLED)  ## measure the kernels on the GPU, for 9 minutes; again: go on (PYTHON=python3: without .venv)
	@$(GPU_PYTHON) benchmarks/kernels.py --json benchmarks/results/kernels.json --plot docs/kernels.png
	@$(GPU_PYTHON) benchmarks/tables.py

clean:  ## remove what was built and cached (.venv stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: resolved together with the rest, pip may take the CUDA build and gigabytes with it.
$(INSTALLED): setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"the pinned versions need Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@touch $@
