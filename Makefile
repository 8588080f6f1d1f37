# `make` lists the targets. ARGS reaches the tests: make test ARGS="tests/model -x"

BIN := .venv/bin
# The first Python that is new enough; another: make PYTHON=/path/to/python3.11
PYTHON := $(shell for p in python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What has JAX for the GPU; another: make gpu-check GPU_PYTHON=/path/to/python
GPU_PYTHON := python3

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check format proto docs reference bench aot aot-check gpu-check clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.stamp-run ## train, quantise, serve and query a real classifier on this machine
	$(BIN)/python tools/dev/quickstart.py

# Most of the quick tests' time goes into compiling tiny programs, whose code need not be good: with these flags that takes
# less than half as long. The slow tests run what users run.
QUICK_XLA := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
  --xla_cpu_parallel_codegen_split_count=1
test: .venv/.stamp-dev ## run the quick tests
	XLA_FLAGS="$$XLA_FLAGS $(QUICK_XLA)" $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.stamp-dev ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=0 $(ARGS)

check: .venv/.stamp-dev | .pyright/classer ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.stamp-dev ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.stamp-dev ## regenerate the Python files of serve/proto/classifier.proto, and lint it
	$(BIN)/python -m classer.serve.proto.generate

docs: .venv/.stamp-dev | .pyright/classer ## build the documentation into docs/_build/html; a warning is an error
	PYTHONPATH=.pyright $(BIN)/python -m sphinx -q -W --keep-going -j auto -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

reference: .venv/.stamp-dev ## write the generated pages of docs/ anew, after a change of what they describe
	$(BIN)/python tools/dev/make_reference.py

bench: .venv/.stamp-dev ## fine-tuning speed beside PyTorch; DATA names a folder with task.json
	$(BIN)/python tools/bench/finetune.py --data $(or $(DATA),../shared/datasets/banking77)

aot: .venv-aot/.stamp ## the compilers for GPUs and TPUs that are not there, in .venv-aot (2 GB); then .venv-aot/bin/classer aot

aot-check: .venv-aot/.stamp ## compile a small preset, training and INT8, for H100 and for TPU
	.venv-aot/bin/python tools/aot/check.py

gpu-check: | .pyright/classer ## on a machine with a CUDA GPU and JAX, Flax, Optax: numerics and speed; ARGS=--tiny anywhere
	PYTHONPATH=.pyright $(GPU_PYTHON) tools/dev/gpu_check.py $(ARGS)

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv .venv-aot .pyright .pytest_cache .ruff_cache .hypothesis build dist docs/_build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Pyright does not follow the editable install's import hook; for it the checkout is a folder of the package's name too.
.pyright/classer:
	@mkdir -p .pyright && ln -sfn .. $@

# pip is the last thing that venv puts in place, so that a broken-off attempt is made again.
$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "Classer needs Python 3.11 or newer, but neither python3.11 nor python3 is one." \
	  "Install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv

.venv/.stamp-run: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Classer and what it runs on into .venv (about 1 GB to download the first time) …"
	$(INSTALL) -e '.[train,serve]'
	@touch $@

.venv/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing Classer with its development tools into .venv …"
	$(INSTALL) -e '.[dev]'
	@touch .venv/.stamp-run $@

# Apart from .venv, because the accelerators' plugins would be found there by everything that imports JAX. Without
# TensorFlow and gRPC, which compiling does not need.
.venv-aot/.stamp: pyproject.toml constraints.txt
	@echo "Installing compilers for GPUs and TPUs into .venv-aot (2 GB) …"
	@test -x .venv-aot/bin/pip || "$(PYTHON)" -m venv .venv-aot
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  'jax[tpu]==0.10.2' jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12==12.9.86 \
	  flax optax aqtp safetensors grain scipy tqdm tyro
	.venv-aot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
