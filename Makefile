# Every target sets up what it needs in .venv; nothing else is touched.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Python compiles what it imports and keeps that, where pip would compile all of it: a minute more.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test check test-gpu bench clean

train: $(READY)  ## two peers on handwritten digits, from nothing to a result
	$(BIN)/cutnmix train quickstart resume=auto

test: $(READY)  ## all tests that need no GPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 3 --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, format, types
	mkdir -p build/types/cutnmix
	for folder in pipeline trainer models benchmarks configs; do ln -sfn ../../../$$folder build/types/cutnmix/$$folder; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

bench: $(READY)  ## what everything costs on this machine: make bench BENCH="--root DIR --device cuda"
	$(BIN)/cutnmix bench all $(BENCH)

$(READY): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
