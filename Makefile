# The project's commands. `make demo` and `make test` need only Python >= 3.11, git and a compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test verify lint types check docs clean
export OMP_NUM_THREADS ?= 1
export PYTHONDONTWRITEBYTECODE ?= 1

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev,onnx,hf,examples,video]'
	@touch $@

demo: $(STAMP)  ## teacher, student alone, KD, MGD + KD on real digits; prints a table and writes runs/demo/report.html
	$(BIN)/tutelage demo

test: $(STAMP) lint types  ## lint, types and the whole suite
	$(BIN)/python -m pytest -n 2 --dist loadgroup

verify: $(STAMP)  ## the slow checks: sweeps, inductor, full-scale models
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache
