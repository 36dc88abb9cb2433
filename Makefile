# make setup        an environment with what training needs
# make dev-setup    the same, and what the tests need
# make quickstart   make setup, then GRPO and HDPO on a tiny model and HDPO on a pretrained one: ten minutes on 2 cores
# make compare      every method on the same tiny model, task and seeds: a table and a figure in runs/compare
# make test         set everything up, SGLang too, then lint, types and all tests but the long ones
# make fast-test    the same without the slow tests; those of SGLang where `make sglang-env` was called
# make test-long    the tests that need many minutes each; their result goes to benchmarks/test_long.json
# make docs         the site of the documents, in build/site; fails on a link that leads nowhere
# make sglang-env   an environment with SGLang for a CPU, for its tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SGLANG := .venv-sglang
TORCH_INDEX ?=
# The tests of a file stay on one of two workers: they share what they prepare.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup dev-setup sglang-env quickstart compare docs test all-tests fast-test test-long lint clean

setup: $(VENV)/.ready

# constraints.txt pins every version. TORCH_INDEX: a package index to take torch from (README).
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) tools/install_environment.py $(VENV) quickstart --torch-index "$(TORCH_INDEX)"
	touch $@

dev-setup: $(VENV)/.ready-dev

$(VENV)/.ready-dev: setup.py constraints.txt
	$(PYTHON) tools/install_environment.py $(VENV) quickstart,dev --torch-index "$(TORCH_INDEX)"
	touch $(VENV)/.ready $@

sglang-env: $(SGLANG)/.ready

$(SGLANG)/.ready: $(VENV)/.ready-dev $(addprefix tests/sglang_cpu/,install.sh requirements.txt constraints.txt)
	tests/sglang_cpu/install.sh $(BIN)/python $(SGLANG)
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

all-tests: lint sglang-env
	MEGATRON_HDPO_REQUIRE_SGLANG=1 $(PYTEST)

fast-test: lint
	$(PYTEST) -m "not slow and not long"

test-long: dev-setup sglang-env
	MEGATRON_HDPO_REQUIRE_SGLANG=1 $(PYTEST) -m long -o timeout=3600 --summary benchmarks/test_long.json

clean:
	rm -rf $(VENV) $(SGLANG) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
