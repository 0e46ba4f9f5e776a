# make install | demo | test | bench | lint | format | clean.  Everything happens inside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torchrun sets one thread a rank by default; said here so that two ranks never fight over two cores.
RANKS ?= 2

.PHONY: install demo test bench lint format clean

# The slow part (downloads) runs again only when what it depends on changed; the in-place build of the
# extension always runs and takes a second when nothing changed.
install: $(STAMP)
	@$(BIN)/python setup.py -q build_ext --inplace

$(STAMP): constraints.txt pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/python -m rsmodels.demo --ranks $(RANKS)

test: install
	@$(BIN)/python -m pytest $(ARGS)

bench: install
	@$(BIN)/python -m benchmarks.report

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

format: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

clean:
	rm -rf build dist *.egg-info rskernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
