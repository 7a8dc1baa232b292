# `make demo` and `make test` need nothing but Python 3.11 or newer: they make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out

.PHONY: venv demo test test-clients lint format bench docs vllm-venv clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The whole chain on the demo model that ships with the package.
demo: venv
	$(BIN)/l4pack build demo --recipe int4 --out $(DEMO_OUT) --device h100 --context 2048

test: venv
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# llama.cpp and MLX themselves load what is exported for them; their environment is made once and kept by version. CI runs it.
test-clients: venv
	tools/clients/run.sh $(BIN)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What should fit in ten minutes of two cores (not timed as a whole) and 5 GB of disk; benchmarks/README.md has the rest.
bench: venv
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/real_size.py scout --runs 1
	$(BIN)/python benchmarks/moe_layer.py --tokens 512 --against
	$(BIN)/python benchmarks/full_size.py scout .bench/headers --headers-only
	$(BIN)/python benchmarks/full_size.py maverick .bench/headers --headers-only

# The documentation as a site, to be opened at site/index.html; it needs no server and no network.
docs: venv
	$(BIN)/mkdocs build --strict

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# vLLM's Python sources and a CPU torch, to check artifacts with vLLM's own loader.
vllm-venv:
	tools/vllm/make_vllm_venv.sh

clean:
	rm -rf $(VENV) $(DEMO_OUT) dist build site
