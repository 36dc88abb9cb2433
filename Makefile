# make setup        an environment with what training needs
# make dev-setup    the same, and what the tests need
# make quickstart   make setup, then GRPO and HDPO on a tiny model and HDPO on a pretrained one: ten minutes on 2 cores
# make compare      every method on the same tiny model, task and seeds: a table and a figure in runs/compare
# make test         set everything up, SGLang too, then lint, types, all tests but the long ones, and a part of them on the
#                   newest Megatron-Core
# make fast-test    the same without the slow tests; those of SGLang where `make sglang-env` was called
# make test-long    the tests that need many minutes each, model, weights and checkpoints on the newest Megatron-Core, and
#                   the fast tests on other Pythons; their result goes to benchmarks/test_long.json
# make fuzz         100,000 cases per target of tests/fuzz (FUZZ_CASES), hours; `make test` has 100 of each
# make newest-core  the wheel of the newest Megatron-Core, unpacked into .cache
# make te-python    the Python half of Transformer Engine (0.7 MB), unpacked into .cache: its layers, built without a GPU
# make docs         the site of the documents, in build/site; fails on a link that leads nowhere
# make sglang-env   an environment with SGLang for a CPU, for its tests
# make rehearsal-env   an environment with torch's CUDA build (5 GB): tools/rehearse.py runs a step in it without a GPU

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SGLANG := .venv-sglang
REHEARSAL := .venv-rehearsal
TORCH_INDEX ?=
NEWEST_CORE := 0.19.2
NEWEST := .cache/megatron-core-$(NEWEST_CORE)
FUZZ_CASES ?= 100000
TE_VERSION := 2.11.0
TE_PYTHON := .cache/transformer-engine-$(TE_VERSION)
# The tests of a file stay on one of two workers: they share what they prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup dev-setup sglang-env rehearsal-env newest-core te-python quickstart compare docs test all-tests fast-test \
    test-long fuzz lint clean

setup: $(VENV)/.ready

# A file of constraints pins every version. TORCH_INDEX: a package index to take torch from (README).
$(VENV)/.ready: setup.py $(wildcard constraints/*.txt)
	$(PYTHON) tools/install_environment.py $(VENV) quickstart --torch-index "$(TORCH_INDEX)"
	touch $@

dev-setup: $(VENV)/.ready-dev

$(VENV)/.ready-dev: setup.py $(wildcard constraints/*.txt)
	$(PYTHON) tools/install_environment.py $(VENV) quickstart,dev --torch-index "$(TORCH_INDEX)"
	touch $(VENV)/.ready $@

sglang-env: $(SGLANG)/.ready

$(SGLANG)/.ready: $(VENV)/.ready-dev $(addprefix tests/sglang_cpu/,install.sh requirements.txt constraints.txt)
	tests/sglang_cpu/install.sh $(BIN)/python $(SGLANG)
	touch $@

# Where pip is set to take torch's build for CPUs, TORCH_INDEX names an index that has the one for CUDA.
rehearsal-env: $(REHEARSAL)/.ready

$(REHEARSAL)/.ready: setup.py $(wildcard constraints/cu130-*.txt)
	$(PYTHON) tools/install_environment.py $(REHEARSAL) rehearsal --device cu130 --torch-index "$(TORCH_INDEX)"
	touch $@

newest-core: $(NEWEST)/.ready

# Its wheels are for newer Pythons, but it is plain Python except for a helper of its own data sets, which is not used.
$(NEWEST)/.ready: $(VENV)/.ready-dev
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.13 --dest .cache \
	    megatron-core==$(NEWEST_CORE)
	$(BIN)/python -m zipfile -e .cache/megatron_core-$(NEWEST_CORE)-*.whl $(NEWEST)
	touch $@

te-python: $(TE_PYTHON)/.ready

# Without its requirements, which are the compiled half: 180 MB, and a GPU under them.
$(TE_PYTHON)/.ready: $(VENV)/.ready-dev
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest .cache \
	    transformer-engine==$(TE_VERSION)
	$(BIN)/python -m zipfile -e .cache/transformer_engine-$(TE_VERSION)-*.whl $(TE_PYTHON)
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart/quickstart.py

compare: setup
	OMP_NUM_THREADS=1 $(BIN)/python examples/compare/compare.py

docs: dev-setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "to read it: $(BIN)/python -m http.server --directory build/site"

lint: dev-setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Started once more, so that the seconds at the end are those of everything, set-up included.
test:
	@start=$$(date +%s); $(MAKE) --no-print-directory all-tests || exit 1; \
	echo "make test: $$(( $$(date +%s) - start )) s, set-up included"

all-tests: lint sglang-env newest-core te-python
	MEGATRON_HDPO_REQUIRE_SGLANG=1 $(BIN)/python tools/run_tests.py suite newest-core

fast-test: lint
	$(PYTEST) -m "not slow and not long"

# Tests on the null GPU are among them where `make rehearsal-env` was called; else they are skipped, and say so.
test-long: dev-setup sglang-env newest-core te-python
	MEGATRON_HDPO_REQUIRE_SGLANG=1 $(BIN)/python tools/run_tests.py long newest-whole other-pythons \
	    --summary benchmarks/test_long.json

# Each target on the next free worker, without the limit for a test that hangs: a target takes long.
fuzz: dev-setup
	MEGATRON_HDPO_FUZZ_CASES=$(FUZZ_CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 0 tests/fuzz

clean:
	rm -rf $(VENV) $(SGLANG) $(REHEARSAL) .cache runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
