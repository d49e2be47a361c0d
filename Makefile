# `make test` and `make demo` each do everything on a fresh clone: environment, installation, run.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: test test-long test-runtime demo check clean

# Threads of torch and llama.cpp wait by spinning: two processes with two each are slower than one.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long and not runtime" --numprocesses auto --maxprocesses 4 --dist loadfile

test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m long

# Builds llama.cpp twice, as it is and with our patch, unless that has been done, and compares them.
test-runtime: $(VENV)/.installed
	$(BIN)/mode-gguf runtime build --stock
	$(BIN)/mode-gguf runtime build
	MODE_GGUF_STOCK_BUILD="$$($(BIN)/mode-gguf runtime path --stock)" \
	MODE_GGUF_PATCHED_BUILD="$$($(BIN)/mode-gguf runtime path)" \
	$(BIN)/python -m pytest -m runtime
	$(BIN)/python -m pytest tests/experiments/test_compare_with_perplexity.py

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py --out demo-output

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-output .mypy_cache .pytest_cache .ruff_cache
