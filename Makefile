# make quickstart   set everything up and train a real pretrained model with HDPO, about ten minutes on 2 cores
# make compare      every method on the same tiny model, task and seeds: a table and a figure in runs/compare
# make test         set everything up, SGLang too, then lint, types and all tests
# make fast-test    the same without the slow tests; those of SGLang where `make sglang-env` was called
# make sglang-env   an environment with SGLang for a CPU, for its tests: two minutes, 2.6 GB

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SGLANG := .venv-sglang
QUICKSTART := runs/quickstart
MODEL  := runs/smollm2-135m-instruct
RANKS  := 2

.PHONY: setup sglang-env quickstart compare test fast-test lint clean

setup: $(VENV)/.ready

# constraints.txt pins every version; without it a bare torch would pull gigabytes.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[quickstart,dev]'
	touch $@

sglang-env: $(SGLANG)/.ready

$(SGLANG)/.ready: $(addprefix tests/sglang_cpu/,install.sh requirements.txt constraints.txt)
	tests/sglang_cpu/install.sh $(PYTHON) $(SGLANG)
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart/fetch_model.py $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m megatron_hdpo train examples/quickstart/hdpo.yaml
	$(BIN)/python examples/quickstart/show_result.py $(QUICKSTART)/hf

compare: setup
	OMP_NUM_THREADS=1 $(BIN)/python examples/compare/compare.py

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint sglang-env
	MEGATRON_HDPO_REQUIRE_SGLANG=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest

fast-test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

clean:
	rm -rf $(VENV) $(SGLANG) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
