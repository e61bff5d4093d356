# Every target creates what it needs in .venv; all it expects is Python 3.11 or later with pip.
# Another interpreter: make test PYTHON=python3.13. More arguments: make test ARGS="-k kl -x".

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
DATA := examples/data
# Peers: compared with in the tests and benchmarks. Tests that need one that is missing are skipped.
TORCH := torch==2.13.0
JAX := jax

.PHONY: help demo test lint format docs bench cuda-check clean

help:
	@echo "make demo    compare a small language model with its quantized versions"
	@echo "make test    run the tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff format and repair what it can"
	@echo "make docs    write docs/operations.md and docs/guide.md again"
	@echo "make bench   measure against NumPy, SciPy, PyTorch and JAX (minutes; needs a quiet machine)"
	@echo "make cuda-check  compile every CUDA kernel, and run them on the CPU (minutes; needs no GPU)"
	@echo "make clean   remove .venv and all caches"

demo: $(VENV)/.eval
	@echo "Compiling kernels, or loading them if this machine has compiled them before ..."
	@$(BIN)/python -c 'import klfast; klfast.warmup(("kl", "reverse_kl", "tv", "same_top"), "float16")'
	@echo
	@echo "A small language model with its weights rounded to 8 bits, against the original:"
	@echo
	@$(BIN)/klfast compare $(DATA)/base.npy $(DATA)/int8.npy --targets $(DATA)/targets.npy --worst 3
	@echo
	@echo "Rounded to 4 bits, with a limit on the mean divergence, as in a pipeline:"
	@echo
	@$(BIN)/klfast compare $(DATA)/base.npy $(DATA)/int4.npy --targets $(DATA)/targets.npy \
	    --worst 3 --fail-above kl.mean=0.01; \
	    status=$$?; echo "exit status $$status"; test $$status -eq 3

test: $(VENV)/.peers
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/.dev
	$(BIN)/python docs/operations.py
	$(BIN)/python docs/guide.py

bench: $(VENV)/.peers
	$(BIN)/python benchmarks/run.py $(ARGS)

cuda-check: $(VENV)/.peers
	$(BIN)/python tests/cuda/check.py --jobs $(JOBS)
	$(BIN)/python -m pytest -n $(JOBS) tests/cuda $(ARGS)

clean:
	rm -rf $(VENV) build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

# An empty file marks what is installed, so that a second make goes straight to work.

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.eval: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[eval]"
	@touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet "$(TORCH)" || echo "without PyTorch: its tests are skipped"
	$(BIN)/python -m pip install --quiet "$(JAX)" || echo "without JAX: its tests are skipped"
	@touch $@
