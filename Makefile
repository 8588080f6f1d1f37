# `make` lists the targets. ARGS reaches the tests: make test ARGS="tests/model -x"

BIN := .venv/bin
# The first Python that is new enough; another: make PYTHON=/path/to/python3.11
PYTHON := $(shell for p in python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check format proto bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.stamp-run ## train, quantise, serve and query a real classifier on this machine
	$(BIN)/python tools/quickstart.py

test: .venv/.stamp-dev ## run the quick tests
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/.stamp-dev ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

check: .venv/.stamp-dev | .pyright/classer ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: .venv/.stamp-dev ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/.stamp-dev ## make the Python files of serve/proto/classifier.proto anew
	$(BIN)/python -m classer.serve.proto.generate

bench: .venv/.stamp-dev ## fine-tuning speed beside PyTorch; DATA names a folder with task.json
	$(BIN)/python tools/bench_finetune.py --data $(or $(DATA),../shared/datasets/banking77)

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv .pyright .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
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
	$(INSTALL) -e '.[train,serve,dev]'
	@touch .venv/.stamp-run $@
